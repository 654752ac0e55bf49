//! Backups made, interrupted, killed, resumed and refused.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use drover::backup::{
    BackupError, Outcome, Phase, Progress, Secret, Stream, StreamSpec, Streams, Which,
};
use drover::ids::Bytes;

use crate::bench::{Bench, GRACE, MIB, PASSWORD, SEGMENT, failure, kill, same};

/// Waits until the cursor of a stream holds so many bytes, and at least something.
async fn until_committed(stream: &Stream, bytes: u64) -> Progress {
    let mut progress = stream.progress();
    let reached =
        progress.wait_for(|p| p.bytes_held >= bytes && p.bytes_held > 0 || p.phase.ended());
    let reached = tokio::time::timeout(GRACE, reached).await.unwrap().unwrap();
    assert!(!reached.phase.ended(), "it ended: {reached:?}");
    reached.clone()
}

/// Waits until a worker has ended.
async fn until_gone(pid: u32) {
    let gone = tokio::time::timeout(GRACE, async {
        // A zombie of ours is as gone as can be.
        while std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|s| !s.contains(") Z "))
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    gone.await.expect("the worker lives on");
}

#[tokio::test]
async fn a_backup_is_whole_for_the_stock_tool_and_for_our_restore() {
    // Not a multiple of a segment, nor of a block.
    let bench = Bench::new(5 * SEGMENT + 12_345);
    let (outcome, progress) = bench.back_up(bench.spec()).await;
    let Outcome::Done(id) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(progress.phase, Phase::Done);
    assert_eq!(progress.bytes_done, bench.size);
    assert_eq!(progress.bytes_resumed, 0);
    assert_eq!(
        progress.bytes_read,
        bench.size - SEGMENT,
        "the hole is not read"
    );
    assert_eq!(progress.bytes_uncommitted, 0);
    assert_eq!(progress.restic_snapshot.as_deref(), Some(&id[..]));
    bench.prove();
    let tags = bench.tags();
    assert_eq!(tags.len(), 1, "the slices are gone: {tags:?}");
    for tag in [
        "drover",
        "volume=vol-1",
        "snapshot=snap-1",
        "backup=backup-1",
    ] {
        assert!(tags[0].iter().any(|t| t == tag), "{tag} in {tags:?}");
    }

    let outcome = bench
        .restore(Which::LatestOf("vol-1".parse().unwrap()))
        .await;
    assert_eq!(outcome, Outcome::Done(id.clone()));
    same(&bench.path("snap-1"), &bench.path("restored"));
    // Again, over what is there and is larger: its tail reads as zeroes.
    let file = OpenOptions::new()
        .write(true)
        .open(bench.path("restored"))
        .unwrap();
    file.write_all_at(&[7; 64], 2 * SEGMENT).unwrap();
    file.write_all_at(&[7; 64], bench.size).unwrap();
    let outcome = bench.restore(Which::Restic(id[..8].to_owned())).await;
    assert_eq!(outcome, Outcome::Done(id.clone()));
    file.write_all_at(&[], 0).unwrap();
    let restored = std::fs::read(bench.path("restored")).unwrap();
    assert_eq!(
        restored[..bench.size as usize],
        std::fs::read(bench.path("snap-1")).unwrap()
    );
    assert_eq!(restored[bench.size as usize..], [0; 64]);

    let listed = bench
        .streams
        .list_backups(bench.repository(), GRACE)
        .await
        .unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].restic_id, id);
    assert_eq!(listed[0].size, Bytes(bench.size));
    assert!(listed[0].complete);

    // The same backup again finds that it is there.
    let (again, progress) = bench.back_up(bench.spec()).await;
    assert_eq!(again, Outcome::Done(id));
    assert_eq!(
        (progress.bytes_read, progress.bytes_resumed),
        (0, bench.size)
    );
}

#[tokio::test]
async fn an_interrupted_backup_resumes_and_uploads_nothing_twice() {
    let bench = Bench::new(20 * SEGMENT);
    let mut uploaded = 0;
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(8 * MIB);
    let (mut resumed, mut held) = (Vec::new(), 0);
    for slice in [1, 4, 6] {
        let stream = bench.streams.start(spec.clone()).await.unwrap();
        // More than the run before, which may have been slow to stop.
        until_committed(&stream, (slice * SEGMENT).max(held + 1)).await;
        if slice == 4 {
            kill(stream.pid(), "TERM");
            assert_eq!(stream.ended().await, Outcome::Interrupted);
        }
        assert_eq!(stream.interrupt(GRACE).await, Outcome::Interrupted);
        let progress = stream.progress().borrow().clone();
        assert_eq!(progress.phase, Phase::Interrupted);
        assert!(progress.bytes_held >= slice * SEGMENT);
        held = progress.bytes_held;
        assert_eq!(progress.bytes_uncommitted, 0, "all of it has a cursor");
        uploaded += progress.bytes_uploaded;
        resumed.push(progress.bytes_resumed);
        assert!(
            bench
                .tags()
                .iter()
                .all(|t| t.iter().any(|t| t == "drover-partial"))
        );
    }
    spec.repo.limit_upload = None;
    let (outcome, progress) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    resumed.push(progress.bytes_resumed);
    assert!(
        resumed.is_sorted_by(|a, b| a < b),
        "each run went on: {resumed:?}"
    );
    assert_eq!(resumed[0], 0);
    uploaded += progress.bytes_uploaded;
    // Random data does not compress: had anything been uploaded twice, it would be more than this.
    let data = bench.size - SEGMENT;
    assert!(bench.packed() < data + MIB, "{} packed", bench.packed());
    assert!(
        (data..data + MIB).contains(&uploaded),
        "{uploaded} uploaded"
    );
    assert_eq!(bench.tags().len(), 1);
    bench.prove();
}

#[tokio::test]
async fn a_killed_worker_costs_at_most_its_slice() {
    let bench = Bench::new(10 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(12 * MIB);
    let stream = bench.streams.start(spec.clone()).await.unwrap();
    until_committed(&stream, 5 * SEGMENT).await;
    // A pack that a worker began long ago and never finished is swept up.
    let left = bench.path("repo/data/00/abandoned-tmp-");
    let began = std::time::SystemTime::now() - Duration::from_secs(25 * 3600);
    File::create(&left).unwrap().set_modified(began).unwrap();
    kill(stream.pid(), "KILL");
    let error = failure(stream.ended().await);
    assert!(matches!(error, BackupError::Worker { .. }), "{error}");
    assert_eq!(stream.progress().borrow().phase, Phase::Failed);
    spec.repo.limit_upload = None;
    let (outcome, progress) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert!(progress.bytes_resumed >= 5 * SEGMENT, "{progress:?}");
    // Behind the cursor was one slice of two segments.
    let data = bench.size - SEGMENT;
    assert!(
        bench.packed() < data + 2 * SEGMENT + MIB,
        "{}",
        bench.packed()
    );
    bench.prove();
    assert_eq!(
        std::fs::read_dir(bench.path("repo/locks")).unwrap().count(),
        0
    );
    assert!(!left.exists());
}

#[tokio::test]
async fn a_worker_that_hangs_is_interrupted_in_bounded_time() {
    let bench = Bench::new(6 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(4 * MIB);
    let stream = bench.streams.start(spec.clone()).await.unwrap();
    until_committed(&stream, 0).await;
    kill(stream.pid(), "STOP");
    let interrupted = stream.interrupt(Duration::from_millis(300));
    let outcome = tokio::time::timeout(GRACE, interrupted).await;
    let outcome = outcome.expect("what hangs is waited for");
    // Abandoned where it takes the machine long to end it.
    assert!(
        matches!(outcome, Outcome::Killed | Outcome::Abandoned),
        "{outcome:?}"
    );
    until_gone(stream.pid()).await;
    spec.repo.limit_upload = None;
    let (outcome, _) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    bench.prove();
}

#[tokio::test]
async fn the_end_of_the_agent_ends_its_workers() {
    let bench = Bench::new(6 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(4 * MIB);
    // An agent that dies takes its runtime with it, and so the pipe's end.
    let agent = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let streams = bench.streams.clone();
    let pid = agent
        .spawn(async move {
            let stream = streams.start(spec).await.unwrap();
            until_committed(&stream, 0).await;
            stream.pid()
        })
        .await
        .unwrap();
    agent.shutdown_background();
    until_gone(pid).await;
}

#[tokio::test]
async fn a_snapshot_that_was_deleted_is_a_final_error_and_its_cursor_void() {
    let bench = Bench::new(6 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(6 * MIB);
    let stream = bench.streams.start(spec.clone()).await.unwrap();
    until_committed(&stream, 2 * SEGMENT).await;
    std::fs::remove_file(&spec.file).unwrap();
    let error = failure(stream.ended().await);
    assert!(matches!(error, BackupError::SnapshotGone { .. }), "{error}");
    assert!(bench.tags().is_empty(), "{:?}", bench.tags());
    let (outcome, progress) = bench.back_up(spec).await;
    let error = failure(outcome);
    assert!(matches!(error, BackupError::SnapshotGone { .. }), "{error}");
    assert!(progress.error.unwrap().contains("snap-1 is gone"));
    bench.restic(&["check", "--read-data"]);
}

#[tokio::test]
async fn two_instants_are_never_joined() {
    let bench = Bench::new(6 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(6 * MIB);
    let stream = bench.streams.start(spec.clone()).await.unwrap();
    until_committed(&stream, 2 * SEGMENT).await;
    assert_eq!(stream.interrupt(GRACE).await, Outcome::Interrupted);
    // Another file under the same name.
    let other = bench.path("other");
    std::fs::copy(&spec.file, &other).unwrap();
    let file = OpenOptions::new().write(true).open(&other).unwrap();
    file.write_all_at(b"another instant", 5).unwrap();
    std::fs::rename(&other, &spec.file).unwrap();
    spec.repo.limit_upload = None;
    let (outcome, progress) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert_eq!(progress.bytes_resumed, 0, "the cursor is of another file");
    assert_eq!(bench.tags().len(), 1, "and it is cleared away");
    bench.prove();
}

#[tokio::test]
async fn bad_repositories_and_requests_are_told_apart() {
    let bench = Bench::new(SEGMENT);
    let (outcome, _) = bench.back_up(bench.spec()).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");

    let mut wrong = bench.spec();
    wrong.repo.password = Secret::new("wrong");
    let error = failure(bench.back_up(wrong).await.0);
    assert!(
        matches!(error, BackupError::WrongPassword { .. }),
        "{error}"
    );

    std::fs::create_dir(bench.path("photos")).unwrap();
    std::fs::write(bench.path("photos/cat.jpg"), b"cat").unwrap();
    for (path, text) in [("photos", "holds cat.jpg"), ("snap-1", "not a folder")] {
        let mut spec = bench.spec();
        spec.repo.path = bench.path(path);
        let error = failure(bench.back_up(spec).await.0);
        assert!(
            matches!(error, BackupError::NotARepository { .. }),
            "{error}"
        );
        assert!(error.to_string().contains(text), "{error}");
    }
    let mut spec = bench.spec();
    spec.repo.path = "relative".into();
    let error = failure(bench.back_up(spec).await.0);
    assert!(error.to_string().contains("absolute path"), "{error}");

    let mut spec = bench.spec();
    spec.size = Bytes(SEGMENT + 1);
    let error = failure(bench.back_up(spec).await.0);
    assert!(matches!(error, BackupError::WrongSize { .. }), "{error}");

    let mut none = bench.repository();
    none.path = bench.path("none");
    let error = bench.streams.list_backups(none, GRACE).await.unwrap_err();
    assert!(matches!(error, BackupError::NoRepository { .. }), "{error}");
    assert!(
        !bench.path("none").exists(),
        "a listing makes no repository"
    );

    let error = failure(
        bench
            .restore(Which::LatestOf("vol-2".parse().unwrap()))
            .await,
    );
    assert!(matches!(error, BackupError::NoBackup { .. }), "{error}");
    std::fs::write(bench.path("restored"), b"small").unwrap();
    let error = failure(
        bench
            .restore(Which::LatestOf("vol-1".parse().unwrap()))
            .await,
    );
    assert!(
        matches!(error, BackupError::TargetTooSmall { .. }),
        "{error}"
    );
    assert_eq!(std::fs::read(bench.path("restored")).unwrap(), b"small");

    let error = Streams::new("/nonexistent/drover".into())
        .start(bench.spec())
        .await
        .err()
        .unwrap();
    assert!(matches!(error, BackupError::Spawn { .. }), "{error}");
}

#[tokio::test]
async fn a_repository_half_made_by_a_killed_worker_is_made_whole() {
    let bench = Bench::new(SEGMENT);
    let (outcome, _) = bench.back_up(bench.spec()).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    let keys = bench.path("repo/keys");
    let half = bench.path("half");
    let copied = Command::new("cp")
        .arg("-a")
        .arg(&keys)
        .arg(bench.path("k"))
        .status()
        .unwrap();
    assert!(copied.success());
    std::fs::create_dir(&half).unwrap();
    std::fs::rename(bench.path("k"), half.join("keys")).unwrap();
    let mut spec = bench.spec();
    spec.repo.path = half.clone();
    let (outcome, _) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert_eq!(std::fs::read_dir(half.join("keys")).unwrap().count(), 1);
    // Without its config, one that holds data is not made anew.
    std::fs::remove_file(bench.path("repo/config")).unwrap();
    let error = failure(bench.back_up(bench.spec()).await.0);
    assert!(
        error.to_string().contains("config file is missing"),
        "{error}"
    );
}

#[tokio::test]
async fn streams_that_make_one_repository_at_once_make_it_once() {
    let bench = Bench::new(SEGMENT);
    let specs = [1, 2, 3, 4].map(|n| StreamSpec {
        id: format!("backup-{n}").parse().unwrap(),
        volume: format!("vol-{n}").parse().unwrap(),
        ..bench.spec()
    });
    let ends = specs.map(|spec| bench.back_up(spec));
    for (outcome, _) in futures::future::join_all(ends).await {
        assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    }
    bench.restic(&["check", "--read-data"]);
}

#[tokio::test]
async fn a_running_backup_keeps_the_stock_prune_out_and_respects_it() {
    let bench = Bench::new(6 * SEGMENT);
    let mut spec = bench.spec();
    spec.repo.limit_upload = Some(4 * MIB);
    let stream = bench.streams.start(spec.clone()).await.unwrap();
    until_committed(&stream, 0).await;
    let prune = Command::new("restic")
        .args(["--no-cache", "-r"])
        .arg(bench.path("repo"))
        .arg("prune")
        .env("RESTIC_PASSWORD", PASSWORD)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&prune.stderr).into_owned();
    assert!(!prune.status.success(), "prune ran beside a backup");
    assert!(
        said.contains("already locked") && said.contains("by drover"),
        "{said}"
    );

    // The same stream asked for again is the same stream; for another volume it is refused.
    let again = bench.streams.start(spec.clone()).await.unwrap();
    assert_eq!(again.pid(), stream.pid());
    let mut other = spec.clone();
    other.volume = "vol-2".parse().unwrap();
    let error = bench.streams.start(other).await.err().unwrap();
    assert!(matches!(error, BackupError::Busy { .. }), "{error}");
    assert_eq!(stream.interrupt(GRACE).await, Outcome::Interrupted);
    bench.restic(&["prune"]);
    spec.repo.limit_upload = None;
    let (outcome, _) = bench.back_up(spec).await;
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    bench.prove();
}

#[tokio::test]
async fn counters_and_phases_are_exported() {
    let bench = Bench::new(SEGMENT);
    let mut registry = prometheus_client::registry::Registry::default();
    bench.streams.register_metrics(&mut registry);
    bench.back_up(bench.spec()).await;
    let mut wrong = bench.spec();
    wrong.id = "backup-2".parse().unwrap();
    wrong.file = bench.path("none");
    failure(bench.back_up(wrong).await.0);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for line in [
        "drover_backup_streams{phase=\"done\"} 1",
        "drover_backup_streams{phase=\"failed\"} 1",
        "drover_backup_streams{phase=\"running\"} 0",
        "drover_backup_failures_total 1",
        &format!("drover_backup_read_bytes_total {SEGMENT}"),
    ] {
        assert!(text.contains(line), "{line} in:\n{text}");
    }
    assert_eq!(bench.streams.list().len(), 2);
}
