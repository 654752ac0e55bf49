//! Streams of backup tools that nobody registered: a process under such a name
//! that reads, sends and writes what it is told to. Needs what
//! [`super::root_loop_tests`] needs.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use super::process;
use super::root_loop_tests::bench::{self, Bench, Child, LoopDisk, direct, until};
use super::streams::{Flow, Motion, Owner};
use super::*;
use crate::attach::ports::Verdict;

/// What it reads, sends or writes at a time.
const BLOCK: u64 = 4096;

/// A process that does as it is told, over a socket that is not TCP's.
struct Actor {
    child: Child,
    orders: UnixStream,
    sink: TcpStream,
}

impl Actor {
    /// It has these disks open: it reads the first and writes the last.
    fn named(name: &str, disks: &[&LoopDisk]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("orders");
        let orders = UnixListener::bind(&place).unwrap();
        let sink = TcpListener::bind("127.0.0.1:0").unwrap();
        let paths: Vec<_> = disks.iter().map(|disk| disk.path()).collect();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "evidence::root_tool_tests::actor", "--ignored"])
            .stdout(Stdio::null())
            .env("ACTOR_NAME", name)
            .env("ACTOR_DISKS", std::env::join_paths(paths).unwrap())
            .env("ACTOR_ORDERS", place)
            .env("ACTOR_SINK", sink.local_addr().unwrap().to_string());
        let mut child = Child::spawn(&mut command);
        orders.set_nonblocking(true).unwrap();
        let (orders, _) = until(|| {
            assert!(child.is_alive(), "{name} did not begin");
            orders.accept().ok()
        });
        orders.set_nonblocking(false).unwrap();
        // It has connected here before.
        let (sink, _) = sink.accept().unwrap();
        let patience = Some(Duration::from_secs(60));
        orders.set_read_timeout(patience).unwrap();
        sink.set_read_timeout(patience).unwrap();
        Self {
            child,
            orders,
            sink,
        }
    }

    /// Lets it do this; it has done so when this returns.
    fn told(&mut self, order: &str) {
        self.orders
            .write_all(format!("{order}\n").as_bytes())
            .unwrap();
        self.orders.read_exact(&mut [0]).unwrap();
        if order == "send" {
            self.sink.read_exact(&mut [0; BLOCK as usize]).unwrap();
        }
    }
}

#[test]
#[ignore = "a process of the other tests here"]
fn actor() {
    let var = |name| std::env::var_os(name);
    let Some(disks) = var("ACTOR_DISKS") else {
        return;
    };
    let set_name = |name: &[u8]| fs::write("/proc/self/comm", name).unwrap();
    set_name(var("ACTOR_NAME").unwrap().as_bytes());
    let disks = std::env::split_paths(&disks).enumerate();
    let disks: Vec<_> = disks.map(|(n, path)| direct(&path, n > 0)).collect();
    let (first, last) = (disks.first().unwrap(), disks.last().unwrap());
    let sink = var("ACTOR_SINK").unwrap().into_string().unwrap();
    let mut sink = TcpStream::connect(sink).unwrap();
    let orders = UnixStream::connect(var("ACTOR_ORDERS").unwrap()).unwrap();
    for order in BufReader::new(&orders).lines() {
        match order.unwrap().as_str() {
            "read" => bench::read_block(first, 0),
            "read-last" => bench::read_block(last, 0),
            "write-last" => bench::write_block(last, 0),
            "send" => sink.write_all(&[7; BLOCK as usize]).unwrap(),
            name => set_name(name.as_bytes()),
        }
        (&orders).write_all(b".").unwrap();
    }
}

fn label(bench: &Bench, volumes: &[(&str, &LoopDisk)]) {
    let label = |(volume, disk): &(&str, &LoopDisk)| {
        let label = Label {
            volume: volume.parse().unwrap(),
            pvc: String::new(),
            namespace: String::new(),
            node: "a".to_owned(),
        };
        (disk.disk.diskseq, label)
    };
    bench.evidence.label(volumes.iter().map(label).collect());
}

fn only(bench: &Bench) -> ReaderStatus {
    let mut all = bench.evidence.readers();
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[test]
fn a_tool_that_nobody_registered_has_a_stream_from_its_first_read_to_its_end() {
    let bench = Bench::new();
    let (disk, other) = (LoopDisk::new(16), LoopDisk::new(16));
    label(&bench, &[("vol-1", &disk)]);
    let mut tool = Actor::named("restic", &[&disk, &other]);
    tool.told("send");
    assert_eq!(bench.evidence.readers(), [], "it has read nothing");

    tool.told("read");
    let status = only(&bench);
    let pid = tool.child.pid();
    assert_eq!(status.who, format!("pid {pid} (restic)"));
    assert!(
        status.alive && status.owner.ticket().is_none(),
        "{status:?}"
    );
    assert_eq!(status.volume.as_str(), "vol-1");
    assert_eq!(status.read.bytes.0, BLOCK);
    let window = bench.evidence.window_ms();
    // What it sent before it was seen is not counted.
    assert_eq!(status.sent.unwrap().bytes.0, 0);
    assert_eq!(status.motion(window), Motion::Reads);

    tool.told("send");
    let status = only(&bench);
    assert_eq!(status.sent.unwrap().bytes.0, BLOCK);
    assert_eq!(status.motion(window), Motion::Flows);

    tool.told("write-last");
    let status = only(&bench);
    assert_eq!((status.read.bytes.0, status.wrote.bytes.0), (BLOCK, BLOCK));

    bench.ahead(31);
    let status = only(&bench);
    assert!(status.alive && status.last_progress_ms() >= Some(31_000));
    assert_eq!(status.motion(window), Motion::Rests);

    tool.child.kill();
    assert_eq!(bench.evidence.readers(), [], "it has ended");
    let kernel = bench.evidence.inner.kernel.as_ref().unwrap();
    assert!(kernel.sent().unwrap().is_empty(), "nobody is watched");
}

/// It reads on while nothing leaves it, and the other way round.
#[test]
fn a_tool_that_only_reads_is_told_from_one_that_only_sends() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    label(&bench, &[("vol-1", &disk)]);
    let mut tool = Actor::named("kopia", &[&disk]);
    tool.told("read");
    only(&bench);
    tool.told("send");
    let since = |of: fn(&ReaderStatus) -> Flow| {
        until(|| of(&only(&bench)).last_ms.filter(|ms| *ms >= 50));
    };
    let within = |ms: Option<u64>| ms.expect("it was seen");

    since(|status| status.sent.unwrap());
    tool.told("read");
    let status = only(&bench);
    assert_eq!(status.read.bytes.0, 2 * BLOCK);
    assert_eq!(status.motion(within(status.read.last_ms)), Motion::Reads);

    since(|status| status.read);
    tool.told("send");
    let status = only(&bench);
    let sent = status.sent.unwrap();
    assert_eq!(sent.bytes.0, 2 * BLOCK);
    assert_eq!(status.motion(within(sent.last_ms)), Motion::Sends);
}

#[test]
fn a_stream_is_one_volumes_and_one_owners() {
    let bench = Bench::new();
    let (one, two, strange) = (LoopDisk::new(16), LoopDisk::new(16), LoopDisk::new(16));
    label(&bench, &[("vol-1", &one), ("vol-2", &two)]);
    // Of a disk that is no volume's, and of no tool, nothing is shown.
    let mut elsewhere = Actor::named("restic", &[&strange]);
    elsewhere.told("read");
    let mut nobody = Actor::named("restic-not", &[&one]);
    nobody.told("read");
    assert_eq!(bench.evidence.readers(), []);

    let mut tool = Actor::named("rustic", &[&one, &two]);
    tool.told("read");
    tool.told("read-last");
    let volumes = || {
        let all = bench.evidence.readers().into_iter();
        all.map(|status| (status.volume.to_string(), status.owner.ticket().cloned()))
            .collect::<Vec<_>>()
    };
    let of = |volume: &str, ticket: Option<&TicketId>| (volume.to_owned(), ticket.cloned());
    let by_name = [of("vol-1", None), of("vol-2", None)];
    assert_eq!(volumes(), by_name);

    // Registered, it is the registration's; no longer, it is a tool's again.
    let ticket = TicketId::random();
    bench.register(Reader {
        who: Who::Process(tool.child.pid()),
        volume: "vol-2".parse().unwrap(),
        ticket: ticket.clone(),
        disk: two.disk.clone(),
    });
    assert_eq!(volumes(), [of("vol-2", Some(&ticket)), of("vol-1", None)]);
    bench.evidence.unregister(&ticket);
    assert_eq!(volumes(), by_name);

    // Under another name it is nobody known.
    tool.told("cat");
    assert_eq!(bench.evidence.readers(), []);
    tool.told("rustic");
    let owners = bench.evidence.readers().into_iter().map(|s| s.owner);
    let began = process::stat(tool.child.pid()).unwrap().began;
    let is_it = |owner: &Owner| match owner {
        Owner::Tool { name, process } => {
            name == "rustic" && (process.pid, process.began) == (tool.child.pid(), began)
        }
        Owner::Ticket(_) => false,
    };
    assert_eq!(owners.filter(is_it).count(), 2);
}

/// A stream by name is for display: who could write is live all the same.
#[test]
fn a_stream_by_name_takes_nothing_from_a_verdict() {
    let bench = Bench::new();
    let (disk, other) = (LoopDisk::new(16), LoopDisk::new(16));
    label(&bench, &[("vol-1", &disk), ("vol-2", &other)]);
    let mut tool = Actor::named("restic", &[&disk, &other]);
    tool.told("read");
    tool.told("read-last");
    assert_eq!(bench.evidence.readers().len(), 2);
    bench.settles(&disk, &[], Verdict::BackupRunning);
    bench.settles(&other, &[], Verdict::Live);
}
