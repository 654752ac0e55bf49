//! drover's processes on one kernel: a controller, and agents with host
//! identities of their own; the volumes live on agent a, on XFS in a loop device.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use nix::unistd::Pid;

use crate::csi;
use crate::link::Link;
use crate::{Place, Protocol};

/// A process of drover's is ready within this, or has refused to be; emulated
/// kernels and machines with much else to do included.
pub const READY: Duration = Duration::from_secs(90);
/// The size of a pool's disk.
const POOL: u64 = 1536 << 20;
/// The node whose pool holds every volume.
pub const HOME: &str = "a";
/// The password of the rig's repositories.
pub const PASSWORD: &str = "rig";
/// The device mapper name of a pool's disk that a story changes.
pub const POOL_DISK: &str = "rig-pool";

/// A running drover.
pub struct Cluster {
    place: Place,
    controller: Option<Child>,
    agents: BTreeMap<&'static str, Option<Child>>,
    /// Between a and b, if b has a network of its own.
    link: Option<Link>,
}

/// A folder in which something is mounted until it is dropped.
fn mount_pool(scratch: &Path, mapped: bool) -> anyhow::Result<()> {
    let (image, pool) = (scratch.join("pool.img"), scratch.join("pool"));
    fs::create_dir_all(&pool)?;
    File::create(&image)?.set_len(POOL)?;
    run("mkfs.xfs", ["-q", "-m", "reflink=1"], [&image])?;
    if !mapped {
        return run("mount", ["-o", "loop"], [&image, &pool]).map(drop);
    }
    let device = run("losetup", ["--find", "--show"], [&image])?;
    let table = format!("0 {} linear {} 0", POOL / 512, device.trim());
    run("dmsetup", ["create", POOL_DISK, "--table", &table], [])?;
    let disk = PathBuf::from(format!("/dev/mapper/{POOL_DISK}"));
    run("mount", [], [&disk, &pool]).map(drop)
}

/// Runs a tool to its end and returns what it printed.
///
/// # Errors
/// When it cannot be run or fails, with its words.
pub fn run<'a>(
    tool: &str,
    words: impl IntoIterator<Item = &'a str>,
    paths: impl IntoIterator<Item = &'a PathBuf>,
) -> anyhow::Result<String> {
    let output = Command::new(tool)
        .args(words)
        .args(paths)
        .stdin(Stdio::null())
        .output();
    checked(tool, output.with_context(|| format!("run {tool}"))?)
}

fn checked(what: &str, output: Output) -> anyhow::Result<String> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{what}: {}: {}",
        output.status,
        stderr.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Cluster {
    /// Makes the pool and starts a controller and the agents a and b.
    ///
    /// # Errors
    /// When a part does not become ready.
    pub async fn start(place: &Place) -> anyhow::Result<Self> {
        Self::with(place, None, false).await
    }

    /// As [`Cluster::start`], with [`POOL_DISK`] below the pool.
    ///
    /// # Errors
    /// When a part does not become ready.
    pub async fn start_mapped(place: &Place) -> anyhow::Result<Self> {
        Self::with(place, None, true).await
    }

    /// As [`Cluster::start`], with b behind a link that can be cut.
    ///
    /// # Errors
    /// When a part does not become ready.
    pub async fn start_apart(place: &Place) -> anyhow::Result<Self> {
        Self::with(place, Some(Link::make()?), false).await
    }

    async fn with(place: &Place, link: Option<Link>, mapped: bool) -> anyhow::Result<Self> {
        fs::create_dir_all(place.scratch.join("logs"))?;
        mount_pool(&place.scratch, mapped)?;
        fs::write(place.scratch.join("password"), PASSWORD)?;
        let mut cluster = Self {
            place: place.clone(),
            controller: None,
            agents: BTreeMap::new(),
            link,
        };
        cluster.start_controller().await?;
        for node in ["a", "b"] {
            cluster.start_agent(node).await?;
        }
        Ok(cluster)
    }

    /// Starts the controller and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_controller(&mut self) -> anyhow::Result<()> {
        let words = self.controller_words();
        self.controller = Some(self.spawn("controller", &words)?);
        self.ready("controller").await
    }

    fn controller_words(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).to_string_lossy().into_owned();
        [
            "controller",
            "--node",
            "controller",
            "--state",
            &path("controller.redb"),
        ]
        .into_iter()
        .map(String::from)
        .chain(["--csi-socket".into(), path("controller.sock")])
        .chain(["--controller".into(), self.controller_address()])
        .chain([
            "--metrics-address".into(),
            self.metrics_address("controller").to_string(),
        ])
        .collect()
    }

    /// Starts an agent and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_agent(&mut self, node: &'static str) -> anyhow::Result<()> {
        let child = self.spawn(node, &self.agent_words(node))?;
        self.agents.insert(node, Some(child));
        self.ready(node).await
    }

    fn agent_words(&self, node: &str) -> Vec<String> {
        let path = |name: &str| self.path(name).to_string_lossy().into_owned();
        let mut words: Vec<String> = vec!["agent".into(), "--node".into(), node.into()];
        words.extend(["--state-dir".into(), path(&format!("state-{node}"))]);
        words.extend(["--controller".into(), self.controller_address()]);
        words.extend(["--agent-address".into(), self.agent(node).to_string()]);
        words.extend(["--csi-socket".into(), path(&format!("{node}.sock"))]);
        words.extend([
            "--metrics-address".into(),
            self.metrics_address(node).to_string(),
        ]);
        words.extend(["--progress-window".into(), "3s".into()]);
        if node == HOME {
            words.extend(["--pool".into(), path("pool/drover")]);
            let (nvme, iscsi) = (self.at(node, 4420), self.at(node, 3260));
            words.extend(["--nvme-address".into(), nvme.to_string()]);
            words.extend(["--iscsi-address".into(), iscsi.to_string()]);
        }
        words
    }

    fn spawn(&self, name: &str, words: &[String]) -> anyhow::Result<Child> {
        fs::create_dir_all(self.path("pool/drover"))?;
        let log = self.path(&format!("logs/{name}.log"));
        let log = OpenOptions::new().create(true).append(true).open(&log)?;
        let prefix = self.link.as_ref().map_or(&[][..], |link| link.prefix(name));
        let program = [self.place.drover.as_os_str()];
        let mut parts = prefix.iter().map(OsStr::new).chain(program);
        Command::new(parts.next().context("no command")?)
            .args(parts)
            .args(words)
            .env("DROVER_LOG", "info,drover=debug")
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.place.drover.display()))
    }

    async fn ready(&mut self, name: &str) -> anyhow::Result<()> {
        let address = self.metrics_address(name);
        let start = Instant::now();
        loop {
            let report = http(address, "/readyz");
            if report
                .as_ref()
                .is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
            {
                return Ok(());
            }
            let child = match name {
                "controller" => self.controller.as_mut(),
                node => self.agents.get_mut(node).and_then(Option::as_mut),
            };
            let ended = child
                .and_then(|child| child.try_wait().transpose())
                .transpose()?;
            if let Some(status) = ended {
                bail!("{name} ended: {status}\n{}", self.log(name));
            }
            if start.elapsed() > READY {
                bail!("{name} is not ready: {report:?}\n{}", self.log(name));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Ends the controller as a crash would, by SIGKILL.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_controller(&mut self) -> anyhow::Result<()> {
        end(self
            .controller
            .take()
            .ok_or_else(|| anyhow!("no controller runs"))?)
    }

    /// Ends an agent as a crash would, by SIGKILL.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_agent(&mut self, node: &'static str) -> anyhow::Result<()> {
        let child = self.agents.get_mut(node).and_then(Option::take);
        end(child.ok_or_else(|| anyhow!("no agent {node} runs"))?)
    }

    /// The process id of the controller, or of a node's agent.
    ///
    /// # Errors
    /// When it was not started.
    pub fn pid(&self, name: &str) -> anyhow::Result<Pid> {
        let child = match name {
            "controller" => self.controller.as_ref(),
            node => self.agents.get(node).and_then(Option::as_ref),
        };
        let child = child.with_context(|| format!("no {name} runs"))?;
        Ok(Pid::from_raw(i32::try_from(child.id())?))
    }

    /// The CSI Controller.
    ///
    /// # Errors
    /// When its socket makes no endpoint.
    pub fn controller(&self) -> anyhow::Result<csi::Controller> {
        csi::Controller::at(&self.path("controller.sock"))
    }

    /// The CSI Node of an agent.
    ///
    /// # Errors
    /// When its socket makes no endpoint.
    pub fn node(&self, node: &str) -> anyhow::Result<csi::Node> {
        csi::Node::at(&self.path(&format!("{node}.sock")))
    }

    /// The link to b.
    ///
    /// # Errors
    /// When b has no network of its own.
    pub fn link(&self) -> anyhow::Result<&Link> {
        self.link.as_ref().context("b has no network of its own")
    }

    /// Where an agent listens for the controller.
    pub fn agent(&self, node: &str) -> SocketAddr {
        self.at(node, if node == HOME { 9761 } else { 9771 })
    }

    fn metrics_address(&self, process: &str) -> SocketAddr {
        let port = match process {
            "controller" => 9753,
            HOME => 9762,
            _ => 9772,
        };
        self.at(process, port)
    }

    fn controller_address(&self) -> String {
        self.at("controller", 9750).to_string()
    }

    fn at(&self, process: &str, port: u16) -> SocketAddr {
        let alone = IpAddr::from([127, 0, 0, 1]);
        let address = self
            .link
            .as_ref()
            .map_or(alone, |link| link.address(process));
        SocketAddr::new(address, port)
    }

    /// The protocol that volumes are exported over.
    pub fn protocol(&self) -> Protocol {
        self.place.protocol
    }

    /// The drover binary.
    pub fn drover(&self) -> &Path {
        &self.place.drover
    }

    /// A path in the scratch folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.scratch.join(name)
    }

    /// Where kubelet on `node` would stage a volume.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn staging(&self, node: &str, volume: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(&format!("kubelet-{node}/{volume}/globalmount"));
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// Where kubelet on `node` would publish a volume to its pod.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn target(&self, node: &str, volume: &str) -> anyhow::Result<PathBuf> {
        let folder = self.path(&format!("kubelet-{node}/{volume}"));
        fs::create_dir_all(&folder)?;
        Ok(folder.join("mount"))
    }

    /// Runs a verb of drover's command line and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn cli<const N: usize>(&self, words: [&str; N]) -> anyhow::Result<String> {
        let output = Command::new(&self.place.drover)
            .args(words)
            .env("DROVER_CONTROLLER", self.controller_address())
            .env("RESTIC_PASSWORD", PASSWORD)
            .env("DROVER_LOG", "warn")
            .stdin(Stdio::null())
            .output()
            .context("run drover")?;
        checked(&format!("drover {}", words.join(" ")), output)
    }

    /// A new backup repository, made by stock restic, which fits the cost of its
    /// key to the machine; the key that drover makes costs each process that
    /// opens it ten seconds and more of an emulated one.
    ///
    /// # Errors
    /// When restic fails, with its words.
    pub fn repository(&self) -> anyhow::Result<PathBuf> {
        let path = self.path("repository");
        self.restic(&path, ["init"])?;
        Ok(path)
    }

    /// Runs stock restic on a repository.
    ///
    /// # Errors
    /// When it fails, with its words.
    pub fn restic<const N: usize>(
        &self,
        repository: &Path,
        words: [&str; N],
    ) -> anyhow::Result<String> {
        let output = Command::new("restic")
            .arg("--no-cache")
            .arg("--repo")
            .arg(repository)
            .args(words)
            .env("RESTIC_PASSWORD", PASSWORD)
            .stdin(Stdio::null())
            .output()
            .context("run restic")?;
        checked(&format!("restic {}", words.join(" ")), output)
    }

    /// What a process says at /metrics.
    ///
    /// # Errors
    /// When it does not answer with 200.
    pub fn metrics(&self, process: &str) -> anyhow::Result<String> {
        let answer = http(self.metrics_address(process), "/metrics")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer of HTTP")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{process}: {head}");
        Ok(body.to_owned())
    }

    /// The end of a process' log.
    pub fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.path(&format!("logs/{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// The ends of all logs, for a failure.
    pub fn logs(&self) -> String {
        ["controller", "a", "b"]
            .map(|name| format!("--- {name}\n{}", self.log(name)))
            .join("\n")
    }
}

/// Disconnects what is left of drover's exports, so that nothing waits for a
/// home that will never come back.
fn disconnect_all(protocol: Protocol) -> anyhow::Result<()> {
    if protocol == Protocol::Iscsi {
        for session in fs::read_dir("/sys/class/iscsi_session")? {
            let session = session?.path();
            let target = fs::read_to_string(session.join("targetname")).unwrap_or_default();
            let name = session.file_name().unwrap_or_default().to_string_lossy();
            if let Some(number) = name.strip_prefix("session")
                && target.starts_with("iqn.2026-11.io.drover:")
            {
                let words = ["--mode", "session", "--sid", number, "--logout"];
                run("iscsiadm", words, [])?;
            }
        }
        return Ok(());
    }
    for controller in fs::read_dir("/sys/class/nvme")? {
        let controller = controller?.path();
        let nqn = fs::read_to_string(controller.join("subsysnqn")).unwrap_or_default();
        if nqn.starts_with("nqn.2026-11.io.drover:") {
            fs::write(controller.join("delete_controller"), "1")?;
        }
    }
    Ok(())
}

impl Drop for Cluster {
    /// Disconnects what is attached, ends every process it started, and takes
    /// the pool off. A dead device's mount goes with the VM.
    fn drop(&mut self) {
        if let Err(error) = disconnect_all(self.place.protocol) {
            eprintln!("rig: disconnect: {error:#}");
        }
        let agents = std::mem::take(&mut self.agents);
        let children = agents.into_values().flatten().chain(self.controller.take());
        for child in children {
            if let Err(error) = end(child) {
                eprintln!("rig: {error:#}");
            }
        }
        if let Err(error) = run("umount", ["-l"], [&self.path("pool")]) {
            eprintln!("rig: {error:#}");
        }
    }
}

fn end(mut child: Child) -> anyhow::Result<()> {
    child.kill().context("kill")?;
    child.wait().context("wait for a killed process")?;
    Ok(())
}

fn http(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, READY)?;
    stream.set_read_timeout(Some(READY))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: drover\r\nConnection: close\r\n\r\n"
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
