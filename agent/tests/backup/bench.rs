//! A snapshot to back up, and a repository to put it in.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use drover::backup::{
    BackupError, Outcome, Progress, RepositorySpec, RestoreSpec, Secret, SliceLimits, StreamSpec,
    Streams, Which,
};
use drover::ids::Bytes;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;
pub const SEGMENT: u64 = 4 * MIB;
pub const PASSWORD: &str = "correct horse";
pub const GRACE: Duration = Duration::from_secs(20);

/// Numbers that look random, the same for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A pool with one snapshot in it, and room for a repository.
pub struct Bench {
    pub dir: TempDir,
    pub size: u64,
    pub repo: PathBuf,
    pub streams: Arc<Streams>,
}

impl Bench {
    /// A snapshot of `size` bytes that do not compress, but for a hole in its third segment.
    pub fn new(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("snap-1")).unwrap();
        file.set_len(size).unwrap();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut block = vec![0_u8; MIB as usize];
        let mut at = 0;
        while at < size {
            for word in block.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
            let length = (size - at).min(MIB);
            if !(2 * SEGMENT..3 * SEGMENT).contains(&at) {
                file.write_all_at(&block[..length as usize], at).unwrap();
            }
            at += length;
        }
        Self {
            repo: dir.path().join("repo"),
            dir,
            size,
            streams: Streams::new(PathBuf::from(env!("CARGO_BIN_EXE_drover"))),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn repository(&self) -> RepositorySpec {
        RepositorySpec {
            path: self.repo.clone(),
            password: Secret::new(PASSWORD),
            limit_upload: None,
        }
    }

    pub fn spec(&self) -> StreamSpec {
        StreamSpec {
            id: "backup-1".parse().unwrap(),
            volume: "vol-1".parse().unwrap(),
            snapshot: "snap-1".parse().unwrap(),
            file: self.path("snap-1"),
            size: Bytes(self.size),
            home: "a".parse().unwrap(),
            repo: self.repository(),
            slice: SliceLimits {
                segments: 2,
                ..SliceLimits::default()
            },
        }
    }

    pub async fn back_up(&self, spec: StreamSpec) -> (Outcome, Progress) {
        let stream = self.streams.start(spec).await.unwrap();
        let outcome = stream.ended().await;
        (outcome, stream.progress().borrow().clone())
    }

    pub async fn restore(&self, which: Which) -> Outcome {
        let spec = RestoreSpec {
            id: "restore-1".parse().unwrap(),
            volume: "vol-1".parse().unwrap(),
            repo: self.repository(),
            which,
            target: self.path("restored"),
            size: Some(Bytes(self.size)),
        };
        self.streams.restore(spec).await.unwrap().ended().await
    }

    /// The stock restic on the repository.
    pub fn restic_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command.args(["--no-cache", "-r"]).arg(&self.repo);
        command.args(args).env("RESTIC_PASSWORD", PASSWORD);
        command
    }

    /// Runs the stock restic on the repository; it must succeed.
    pub fn restic(&self, args: &[&str]) -> String {
        let output = self.restic_command(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "restic {args:?}: {text}{errors}");
        text
    }

    /// Checks all of it with the stock tool, restores with it and compares.
    pub fn prove(&self) {
        self.restic(&["check", "--read-data"]);
        let out = self.path("stock");
        self.restic(&["restore", "latest", "--target", out.to_str().unwrap()]);
        let folder = out.join("drover/vol-1");
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e != "json"))
            .collect();
        names.sort();
        let mut whole = File::create(self.path("joined")).unwrap();
        for name in names {
            whole.write_all(&std::fs::read(name).unwrap()).unwrap();
        }
        same(&self.path("snap-1"), &self.path("joined"));
        std::fs::remove_dir_all(&out).unwrap();
    }

    /// Bytes in all packs of the repository.
    pub fn packed(&self) -> u64 {
        let mut total = 0;
        for folder in std::fs::read_dir(self.repo.join("data")).unwrap() {
            for pack in std::fs::read_dir(folder.unwrap().path()).unwrap() {
                total += pack.unwrap().metadata().unwrap().len();
            }
        }
        total
    }

    pub fn tags(&self) -> Vec<Vec<String>> {
        let snapshots: serde_json::Value =
            serde_json::from_str(&self.restic(&["snapshots", "--json"])).unwrap();
        let tags = |snapshot: &serde_json::Value| {
            let tags = snapshot["tags"].as_array().unwrap().iter();
            tags.map(|tag| tag.as_str().unwrap().to_owned()).collect()
        };
        snapshots.as_array().unwrap().iter().map(tags).collect()
    }
}

pub fn same(a: &Path, b: &Path) {
    let status = Command::new("cmp").arg(a).arg(b).status().unwrap();
    assert!(
        status.success(),
        "{} and {} differ",
        a.display(),
        b.display()
    );
}

pub fn failure(outcome: Outcome) -> BackupError {
    match outcome {
        Outcome::Failed(error) => error,
        other => panic!("it should have failed: {other:?}"),
    }
}

pub fn latest() -> Which {
    Which::LatestOf("vol-1".parse().unwrap())
}

pub fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status();
    assert!(status.unwrap().success());
}
