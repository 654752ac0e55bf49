//! The targets under load, each a process on a loopback port of its own.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::plan::{Medium, Side};
use crate::{places, process};

/// The iSCSI name of every target here, drover's and others'.
pub const TARGET: &str = "iqn.2026-01.io.drover:bench";
/// The initiator's.
pub const INITIATOR: &str = "iqn.2026-01.io.drover:load";
/// The NVMe subsystem.
pub const SUBSYSTEM: &str = "nqn.2026-01.io.drover:bench";
/// The NVMe host and its identifier.
pub const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-00000000000a";
/// The identifier.
pub const HOST_ID: &str = "00000000-0000-4000-8000-00000000000a";
const NAMESPACE: &str = "00000000-0000-4000-8000-0000000000be";

/// Sessions that drover's example takes at once; more than any figure has.
const SESSIONS: &str = "64";
/// Until a target listens.
const START: Duration = Duration::from_secs(20);
/// For one tgtadm.
const ADMIN: Duration = Duration::from_secs(20);

/// A target that runs; it is ended when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl Server {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // drover's example ends with its input.
        drop(self.child.stdin.take());
        process::end(&mut self.child);
    }
}

/// What the targets are made of.
pub struct Stand<'a> {
    /// The folder of release builds.
    pub build: &'a Path,
    /// Where their logs go.
    pub logs: &'a Path,
}

impl Stand<'_> {
    /// Starts a target on a file.
    ///
    /// # Errors
    /// When it does not listen in time; with the path of its log.
    pub fn start(&self, side: Side, medium: Medium, file: &Path) -> Result<Server> {
        let address = free_address()?;
        let command = self.command(side, file, address)?;
        let log = self.logs.join(format!("{side:?}-{medium:?}.log"));
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let mut spawned = deadly(&command);
        let child = spawned
            .stdin(Stdio::piped())
            .stdout(output.try_clone().context("duplicate a descriptor")?)
            .stderr(output)
            .env("RUST_LOG", "warn")
            .env("PATH", places::path()?)
            .spawn()
            .with_context(|| format!("start {}", process::words(&command)))?;
        let mut server = Server { child, address };
        server
            .wait(&command)
            .with_context(|| format!("its log: {}", log.display()))?;
        if side == Side::Tgt {
            configure(address.port(), medium, file)?;
        }
        Ok(server)
    }

    fn command(&self, side: Side, file: &Path, address: SocketAddr) -> Result<Command> {
        let at = address.to_string();
        let example = |name: &str| self.build.join("examples").join(name);
        let mut command;
        match side {
            Side::DroverIscsi => {
                command = Command::new(example("iscsi_target"));
                command.args(["--listen", &at, "--iqn", TARGET, "--initiator", INITIATOR]);
                command.args(["--sessions", SESSIONS]);
            }
            Side::DroverNvme => {
                command = Command::new(example("nvme_target"));
                command.args(["--listen", &at, "--subsystem", SUBSYSTEM]);
                command.args([
                    "--namespace",
                    NAMESPACE,
                    "--host",
                    HOST,
                    "--host-id",
                    HOST_ID,
                ]);
            }
            Side::Tgt => {
                command = Command::new("tgtd");
                command.args(["-f", "-C", &control_port(address.port())]);
                command.args(["--iscsi", &format!("portal={at}")]);
                return Ok(command);
            }
            Side::Limit => {
                command = Command::new(self.build.join("load"));
                command.args(["serve-raw", "--listen", &at]);
            }
            Side::NullIscsi | Side::NullNvme => {
                let wire = if side == Side::NullIscsi {
                    "iscsi"
                } else {
                    "nvme"
                };
                command = Command::new(self.build.join("load"));
                command.args(["serve-null", wire, "--listen", &at]);
                return Ok(command);
            }
        }
        command.arg("--file").arg(file);
        Ok(command)
    }
}

impl Server {
    fn wait(&mut self, command: &Command) -> Result<()> {
        let begin = Instant::now();
        let what = || process::words(command);
        while TcpStream::connect(self.address).is_err() {
            if let Some(status) = self.child.try_wait().context("wait for a target")? {
                bail!("{} ended with {status}", what());
            }
            if begin.elapsed() > START {
                bail!("{} does not listen after {} s", what(), START.as_secs());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// The command, killed when xtask is: tgtd takes no heed of Ctrl-C.
fn deadly(command: &Command) -> Command {
    let mut deadly = Command::new("setpriv");
    deadly.args(["--pdeathsig", "KILL"]);
    deadly.arg(command.get_program()).args(command.get_args());
    deadly
}

/// A loopback port that nobody has. Another may take it before the target does;
/// the target then says so and ends.
pub fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    listener.local_addr().context("find a free port")
}

/// The number of tgtd's control socket, below 32768 as it demands; by the port,
/// which is free, so that a tgtd of others is left alone.
fn control_port(port: u16) -> String {
    (port / 2).to_string()
}

/// Gives tgt its target and logical unit. On a disk it is told to do direct I/O
/// as drover does, or its reads would come from the page cache.
fn configure(port: u16, medium: Medium, file: &Path) -> Result<()> {
    let file = file.to_str().context("the file's path is not UTF-8")?;
    let mut unit = vec!["logicalunit", "--op", "new", "--tid", "1", "--lun", "1"];
    unit.extend(["--backing-store", file]);
    if medium == Medium::Disk {
        unit.extend(["--bsoflags", "direct"]);
    }
    let target = [
        "target",
        "--op",
        "new",
        "--tid",
        "1",
        "--targetname",
        TARGET,
    ];
    let bind = [
        "target",
        "--op",
        "bind",
        "--tid",
        "1",
        "--initiator-address",
        "ALL",
    ];
    for words in [&target[..], &unit, &bind] {
        let mut command = Command::new("tgtadm");
        command.env("PATH", places::path()?);
        command
            .args(["-C", &control_port(port), "--lld", "iscsi", "--mode"])
            .args(words);
        process::read(&mut command, ADMIN)?;
    }
    Ok(())
}

/// Has the tgtd on this port end its target at once, whoever uses it: nobody may
/// log in again, each connection is deleted, and then the target, as soon as tgtd
/// takes it.
///
/// # Errors
/// When tgtadm fails, or tgtd still has the target in use after a while.
pub fn delete_by_force(port: u16) -> Result<()> {
    let tgtadm = |words: &[&str]| -> Result<String> {
        let mut command = Command::new("tgtadm");
        command
            .env("PATH", places::path()?)
            .args(["-C", &control_port(port), "--lld", "iscsi", "--tid", "1"])
            .args(words);
        process::read(&mut command, ADMIN)
    };
    tgtadm(&[
        "--mode",
        "target",
        "--op",
        "unbind",
        "--initiator-address",
        "ALL",
    ])?;
    let connections = tgtadm(&["--mode", "conn", "--op", "show"])?;
    let mut session = String::new();
    for line in connections.lines() {
        match line.trim().split_once(": ") {
            Some(("Session", number)) => number.clone_into(&mut session),
            Some(("Connection", number)) => {
                tgtadm(&[
                    "--mode", "conn", "--op", "delete", "--sid", &session, "--cid", number,
                ])?;
            }
            _ => {}
        }
    }
    let begin = Instant::now();
    loop {
        match tgtadm(&["--mode", "target", "--op", "delete", "--force"]) {
            Err(_) if begin.elapsed() < ADMIN => thread::sleep(Duration::from_millis(1)),
            ended => return ended.map(drop),
        }
    }
}

/// What the names of backing files and pools begin with; their process's id is at the end.
const PREFIX: &str = "drover-bench-";

/// Removes the files and folders of runs that were killed.
fn remove_stale(folder: &Path) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let id = rest.and_then(|rest| rest.rsplit('-').next()?.parse::<u32>().ok());
        if id.is_some_and(|id| !Path::new(&format!("/proc/{id}")).exists()) {
            let path = entry.path();
            // One that cannot be removed is in nobody's way.
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        }
    }
}

/// A file whose blocks tell their places; it is removed when dropped.
pub struct Backing {
    path: PathBuf,
}

impl Backing {
    /// Its size: large enough that a disk's own cache is not all there is.
    const MIB: &str = "1024";
    const FILL: Duration = Duration::from_secs(300);

    /// Makes one where the medium is.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn make(build: &Path, medium: Medium) -> Result<Self> {
        let folder = match medium {
            Medium::Memory => "/dev/shm",
            Medium::Disk => "/var/tmp",
        };
        remove_stale(Path::new(folder));
        let name = format!("{PREFIX}{}", std::process::id());
        let backing = Self {
            path: Path::new(folder).join(name),
        };
        let mut fill = Command::new(build.join("load"));
        fill.arg("fill")
            .arg("--file")
            .arg(&backing.path)
            .args(["--mib", Self::MIB]);
        process::read(&mut fill, Self::FILL)?;
        Ok(backing)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // It may never have come to be.
        let _ = fs::remove_file(&self.path);
    }
}

/// A folder on a disk for drover's pool, removed when dropped.
pub struct PoolFolder(pub PathBuf);

impl PoolFolder {
    /// Names one, which is there when the pool makes it.
    pub fn new() -> Self {
        let folder = Path::new("/var/tmp");
        remove_stale(folder);
        Self(folder.join(format!("{PREFIX}pool-{}", std::process::id())))
    }
}

impl Drop for PoolFolder {
    fn drop(&mut self) {
        // It may never have come to be.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_runs_that_are_gone_are_removed() {
        let folder = std::env::temp_dir().join(format!("bench-stale-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        // Linux gives no process an id beyond 2^22.
        let (gone, alive) = (4_200_000, std::process::id());
        for id in [gone, alive] {
            fs::write(folder.join(format!("{PREFIX}{id}")), "").unwrap();
        }
        fs::write(folder.join("drover-bench-notes"), "").unwrap();
        fs::create_dir(folder.join(format!("{PREFIX}pool-{gone}"))).unwrap();
        remove_stale(&folder);
        let mut left: Vec<String> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(
            left,
            [format!("{PREFIX}{alive}"), "drover-bench-notes".into()]
        );
    }

    #[test]
    fn control_ports_are_within_what_tgtd_takes() {
        assert_eq!(control_port(u16::MAX), "32767");
    }
}
