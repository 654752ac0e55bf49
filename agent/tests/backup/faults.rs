//! Backup streams against repositories that fail, fill up, hang in the kernel,
//! are damaged or are locked. The tests named `root_` need root and loop
//! devices; they clean up after themselves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use drover::backup::{BackupError, Outcome, RestoreSpec, Stream};

use crate::bench::{Bench, GRACE, MIB, Random, SEGMENT, failure, kill, latest, same};

async fn must_be_whole(bench: &Bench) {
    let (outcome, _) = bench.back_up(bench.spec()).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let outcome = bench.restore(latest()).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    same(&bench.path("snap-1"), &bench.path("restored"));
    bench.restic(&["check", "--read-data"]);
}

/// The largest pack: one that holds segments.
fn a_pack(bench: &Bench) -> PathBuf {
    let folders = std::fs::read_dir(bench.repo.join("data")).unwrap();
    let packs = folders.flat_map(|folder| std::fs::read_dir(folder.unwrap().path()).unwrap());
    packs
        .map(|pack| pack.unwrap().path())
        .max_by_key(|pack| pack.metadata().unwrap().len())
        .unwrap()
}

fn run(program: &str, args: &[&Path]) {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
}

async fn until_done(stream: &Stream, bytes: u64) {
    let mut progress = stream.progress();
    let reached = progress.wait_for(|p| p.bytes_done > bytes || p.phase.ended());
    tokio::time::timeout(GRACE, reached).await.unwrap().unwrap();
}

/// A small file system of its own; unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn xfs(image: &Path, at: &Path) -> Self {
        File::create(image).unwrap().set_len(320 * MIB).unwrap();
        run("mkfs.xfs", &[Path::new("-q"), image]);
        std::fs::create_dir(at).unwrap();
        run("mount", &[Path::new("-o"), Path::new("loop"), image, at]);
        Self(at.to_owned())
    }

    fn tmpfs(bytes: u64, at: &Path) -> Self {
        std::fs::create_dir(at).unwrap();
        let options = format!("size={bytes}");
        let args = ["-t", "tmpfs", "-o", &options, "tmpfs"].map(Path::new);
        run("mount", &[&args[..], &[at]].concat());
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze")
            .arg("-u")
            .arg(&self.0)
            .stderr(Stdio::null())
            .status();
        let _ = Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .stderr(Stdio::null())
            .status();
    }
}

/// Ends a process when dropped.
struct Held(Child);

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_backup_cut_off_at_random_comes_out_whole() {
    let seed = u64::from(std::process::id()) * 0x9e37_79b9 + 1;
    println!("seed {seed}");
    let mut random = Random(seed);
    let bench = Bench::new(12 * SEGMENT);
    for round in 0..4 {
        let mut spec = bench.spec();
        spec.repo.limit_upload = Some(64 * MIB);
        let stream = bench.streams.start(spec).await.unwrap();
        until_done(&stream, random.next() % bench.size).await;
        let outcome = match random.next() % 2 {
            0 => stream.interrupt(GRACE).await,
            _ => stream.interrupt(Duration::ZERO).await,
        };
        println!(
            "round {round}: {outcome:?} {:?}",
            *stream.progress().borrow()
        );
        assert!(!matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    }
    must_be_whole(&bench).await;
}

#[tokio::test]
async fn a_missing_pack_is_found_and_never_called_a_backup() {
    let bench = Bench::new(3 * SEGMENT);
    let outcome = bench.back_up(bench.spec()).await.0;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let pack = a_pack(&bench);
    let aside = bench.path("pack");
    std::fs::rename(&pack, &aside).unwrap();
    let error = failure(bench.back_up(bench.spec()).await.0);
    assert!(matches!(error, BackupError::NotWhole { .. }), "{error}");
    assert!(error.to_string().contains("is missing or short"), "{error}");
    let error = failure(bench.restore(latest()).await);
    assert!(error.to_string().contains("read blob"), "{error}");
    std::fs::rename(&aside, &pack).unwrap();
    // A damaged one is found when it is read.
    let file = File::options().write(true).open(&pack).unwrap();
    file.write_all_at(&[0x5a; 4096], 4096).unwrap();
    let error = failure(bench.restore(latest()).await);
    assert!(error.to_string().contains("read blob"), "{error}");
}

#[tokio::test]
async fn an_exclusive_lock_of_the_stock_tool_is_respected() {
    let bench = Bench::new(2 * SEGMENT);
    let outcome = bench.back_up(bench.spec()).await.0;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let check = bench
        .restic_command(&["check", "--read-data"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let check = Held(check);
    let locks = bench.repo.join("locks");
    let locked = tokio::time::timeout(GRACE, async {
        let whole = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.is_ok_and(|entry| entry.file_name().len() == 64)
        };
        while !std::fs::read_dir(&locks).unwrap().any(whole) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    locked.await.expect("restic takes no lock");
    kill(check.0.id(), "STOP");
    let error = failure(bench.back_up(bench.spec()).await.0);
    assert!(matches!(error, BackupError::Locked { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", check.0.id())),
        "{error}"
    );
    kill(check.0.id(), "CONT");
    let mut check = check;
    assert!(check.0.wait().unwrap().success(), "ours did not disturb it");
    must_be_whole(&bench).await;
}

#[tokio::test]
async fn root_a_repository_that_is_full_ends_with_an_error_and_resumes_in_more_room() {
    let mut bench = Bench::new(8 * SEGMENT);
    let mounted = Mounted::tmpfs(18 * MIB, &bench.path("mnt"));
    bench.repo = bench.path("mnt").join("repo");
    let stream = bench.streams.start(bench.spec()).await.unwrap();
    let error = failure(stream.ended().await);
    assert!(matches!(error, BackupError::Repository { .. }), "{error}");
    assert!(error.to_string().contains("No space left"), "{error}");
    let target = bench.path("mnt");
    run(
        "mount",
        &[Path::new("-o"), Path::new("remount,size=100M"), &target],
    );
    let stream = bench.streams.start(bench.spec()).await.unwrap();
    assert!(matches!(stream.ended().await, Outcome::Done(_)));
    let resumed = stream.progress().borrow().bytes_resumed;
    assert!(resumed >= 2 * SEGMENT, "it resumed at {resumed}");
    must_be_whole(&bench).await;
    drop(mounted);
}

#[tokio::test]
async fn root_a_repository_that_cannot_be_written_or_read_says_so() {
    let mut bench = Bench::new(2 * SEGMENT);
    let mounted = Mounted::tmpfs(64 * MIB, &bench.path("mnt"));
    bench.repo = bench.path("mnt").join("repo");
    let remount = |how: &'static str| {
        let target = bench.path("mnt");
        run("mount", &[Path::new("-o"), Path::new(how), &target]);
    };
    remount("remount,ro");
    let error = failure(bench.back_up(bench.spec()).await.0);
    assert!(error.to_string().contains("Read-only"), "{error}");
    remount("remount,rw");
    let outcome = bench.back_up(bench.spec()).await.0;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    remount("remount,ro");
    let mut spec = bench.spec();
    spec.id = "backup-2".parse().unwrap();
    let error = failure(bench.streams.start(spec).await.unwrap().ended().await);
    assert!(error.to_string().contains("Read-only"), "{error}");
    // A restore and a listing need no more than to read.
    let outcome = bench.restore(latest()).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let listed = bench.streams.list_backups(bench.repository(), GRACE).await;
    assert_eq!(listed.unwrap().len(), 1);
    remount("remount,rw");
    // Its index is not a folder any more: not an empty repository, but an error.
    std::fs::rename(bench.repo.join("index"), bench.repo.join("hidden")).unwrap();
    std::fs::write(bench.repo.join("index"), b"").unwrap();
    let mut spec = bench.spec();
    spec.id = "backup-3".parse().unwrap();
    let error = failure(bench.streams.start(spec).await.unwrap().ended().await);
    assert!(error.to_string().contains("read the index"), "{error}");
    drop(mounted);
}

#[tokio::test]
async fn root_a_repository_that_hangs_in_the_kernel_is_left_behind_and_reaped() {
    let mut bench = Bench::new(6 * SEGMENT);
    let at = bench.path("mnt");
    let mounted = Mounted::xfs(&bench.path("image"), &at);
    bench.repo = at.join("repo");
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(8 * MIB);
    let stream = bench.streams.start(spec).await.unwrap();
    until_done(&stream, 0).await;
    // A write to a frozen file system waits where no signal reaches it.
    run("fsfreeze", &[Path::new("-f"), &at]);
    let pid = stream.pid();
    in_state(pid, 'D').await;
    let answered = tokio::time::timeout(GRACE, stream.interrupt(Duration::from_millis(300)));
    assert_eq!(answered.await.unwrap(), Outcome::Abandoned);
    assert!(
        Path::new(&format!("/proc/{pid}")).exists(),
        "it was no hang"
    );
    run("fsfreeze", &[Path::new("-u"), &at]);
    let reaped = tokio::time::timeout(GRACE, async {
        while Path::new(&format!("/proc/{pid}")).exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    reaped.await.expect("it is never reaped");
    must_be_whole(&bench).await;
    drop(mounted);
}

#[tokio::test]
async fn root_a_block_device_is_restored_into_unless_it_is_in_use() {
    let bench = Bench::new(2 * SEGMENT + 512);
    let outcome = bench.back_up(bench.spec()).await.0;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let image = bench.path("image");
    File::create(&image).unwrap().set_len(320 * MIB).unwrap();
    let device = Loop::over(&image);
    run("mkfs.xfs", &[Path::new("-q"), &device.0]);
    let at = bench.path("mnt");
    std::fs::create_dir(&at).unwrap();
    run("mount", &[&device.0, &at]);
    let mounted = Mounted(at);
    let spec = RestoreSpec {
        id: "restore-1".parse().unwrap(),
        volume: "vol-1".parse().unwrap(),
        repo: bench.repository(),
        which: latest(),
        target: device.0.clone(),
        size: None,
    };
    let refused = bench
        .streams
        .restore(spec.clone())
        .await
        .unwrap()
        .ended()
        .await;
    let error = failure(refused);
    assert!(error.to_string().contains("busy"), "{error}");
    run("umount", &[&mounted.0]);
    let outcome = bench.streams.restore(spec).await.unwrap().ended().await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let restored = std::fs::read(&device.0).unwrap();
    let source = std::fs::read(bench.path("snap-1")).unwrap();
    assert!(restored[..source.len()] == source[..]);
    assert!(
        restored[source.len()..].iter().all(|byte| *byte == 0),
        "the rest is zeroes"
    );
}

/// A loop device; detached when dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(image: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(image)
            .output()
            .unwrap();
        assert!(output.status.success());
        Self(String::from_utf8(output.stdout).unwrap().trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Waits until some thread of a process is in a state.
async fn in_state(pid: u32, state: char) {
    let seen = tokio::time::timeout(GRACE, async {
        loop {
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
            let stats = threads.filter_map(|thread| {
                std::fs::read_to_string(thread.ok()?.path().join("stat")).ok()
            });
            let wanted = format!(") {state} ");
            if stats.into_iter().any(|stat| stat.contains(&wanted)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    seen.await.expect("it never came into that state");
}
