//! A small protocol over real sockets, on every engine: requests of 16 bytes
//! (what, lba, blocks), writes followed by their data, answers of one byte and
//! then what was read.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::block::file::FileDevice;
use crate::block::gate::Gate;
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};

const READ: u8 = 1;
const WRITE: u8 = 2;
const FLUSH: u8 = 3;
const BYE: u8 = 4;
const ECHO: u8 = 5;
const WRITE_DURABLY: u8 = 6;
const BUG: u8 = 7;
const SIZE: u64 = 4 << 20;

#[derive(Default)]
struct Seen {
    woken: AtomicUsize,
    ended: Mutex<Vec<End>>,
}

struct Toy {
    device: Arc<dyn BlockDevice>,
    gate: Arc<Gate>,
    seen: Arc<Seen>,
    deadline: Option<Instant>,
    /// What the fill under way is for: where it goes, and whether it is to be durable.
    writing: (Lba, bool),
}

impl Protocol for Toy {
    fn received(&mut self, link: &mut Link) -> Result<(), End> {
        let Some(request) = link.input().first_chunk::<16>() else {
            return Ok(());
        };
        let what = request[0];
        let lba = Lba(u32::from_le_bytes(request[4..8].try_into().unwrap()).into());
        let blocks = u32::from_le_bytes(request[8..12].try_into().unwrap());
        let length = blocks as usize * BLOCK as usize;
        match what {
            READ | WRITE | WRITE_DURABLY => {
                let Some(buffer) = link.buffer(length) else {
                    return Ok(());
                };
                link.consume(16);
                if what != READ {
                    self.writing = (lba, what == WRITE_DURABLY);
                    link.fill(buffer, 0..length);
                } else {
                    let passes = [self.gate.enter(), None, None];
                    link.begin(
                        Tag(1),
                        &self.device,
                        Operation::Read { lba, buffer },
                        passes,
                    );
                }
            }
            FLUSH => {
                link.consume(16);
                let passes = [self.gate.enter(), None, None];
                link.begin(Tag(0), &self.device, Operation::Flush, passes);
            }
            ECHO => {
                link.consume(16);
                link.send(&[0; 512]);
            }
            BUG => panic!("asked to"),
            _ => {
                link.send(b"bye");
                return Err(End::Protocol("asked to"));
            }
        }
        Ok(())
    }

    fn filled(&mut self, buffer: Buffer, link: &mut Link) -> Result<(), End> {
        let (lba, fua) = self.writing;
        let write = Operation::Write { lba, buffer, fua };
        link.begin(Tag(0), &self.device, write, [self.gate.enter(), None, None]);
        Ok(())
    }

    fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        link.send(&[u8::from(outcome.result.is_ok())]);
        if let Some(buffer) = outcome.buffer {
            if tag == Tag(1) && outcome.result.is_ok() {
                let length = buffer.len();
                link.send_buffer(buffer, 0..length);
            } else {
                link.recycle(buffer);
            }
        }
        Ok(())
    }

    fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        self.seen.woken.fetch_add(1, Ordering::SeqCst);
        if self.deadline.take_if(|at| *at <= link.now()).is_some() {
            link.send(b"late");
            return Err(End::Protocol("the deadline"));
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    fn ended(&mut self, end: &End) {
        self.seen.ended.lock().unwrap().push(end.clone());
    }
}

#[path = "barrier_tests.rs"]
mod barrier;
#[path = "transfer_tests.rs"]
mod transfer;

struct Bench {
    reactors: Arc<Reactors>,
    device: Arc<dyn BlockDevice>,
    gate: Arc<Gate>,
    listener: TcpListener,
}

impl Bench {
    fn new(engine: Engine, device: Arc<dyn BlockDevice>) -> Self {
        Self::holding(engine, device, Vec::new())
    }

    fn holding(engine: Engine, device: Arc<dyn BlockDevice>, held: Vec<OwnedFd>) -> Self {
        let settings = Settings {
            threads: 2,
            engine: Some(engine),
            poll: POLL,
            held,
        };
        Self {
            reactors: Reactors::start(settings).unwrap(),
            device,
            gate: Gate::new(),
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
        }
    }

    fn host(&self, deadline: Option<Duration>) -> (TcpStream, Arc<Seen>, Waker) {
        let host = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let (seen, waker) = self.accept(deadline);
        (host, seen, waker)
    }

    fn accept(&self, deadline: Option<Duration>) -> (Arc<Seen>, Waker) {
        let (socket, _) = self.listener.accept().unwrap();
        let seen = Arc::new(Seen::default());
        let toy = Toy {
            device: Arc::clone(&self.device),
            gate: Arc::clone(&self.gate),
            seen: Arc::clone(&seen),
            deadline: deadline.map(|after| Instant::now() + after),
            writing: (Lba(0), false),
        };
        let waker = self.reactors.serve(socket, Box::new(toy)).unwrap();
        (seen, waker)
    }
}

fn engines() -> Vec<Engine> {
    // A machine that forbids io_uring still tests the other.
    let settings = Settings {
        threads: 1,
        engine: Some(Engine::Uring),
        poll: POLL,
        held: Vec::new(),
    };
    match Reactors::start(settings) {
        Ok(_) => vec![Engine::Uring, Engine::Threads],
        Err(error) => {
            eprintln!("no io_uring on this machine: {error}");
            vec![Engine::Threads]
        }
    }
}

fn file() -> (tempfile::TempDir, Arc<dyn BlockDevice>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    file.set_len(SIZE).unwrap();
    let device = FileDevice::new(file, &path, Bytes(SIZE)).unwrap();
    (folder, Arc::new(device))
}

fn request(what: u8, lba: u32, blocks: u32) -> [u8; 16] {
    let mut request = [0; 16];
    request[0] = what;
    request[4..8].copy_from_slice(&lba.to_le_bytes());
    request[8..12].copy_from_slice(&blocks.to_le_bytes());
    request
}

fn answer(host: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut answer = vec![0; length];
    host.read_exact(&mut answer).unwrap();
    answer
}

fn until(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "it came about in time");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn what_is_written_is_read_back() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (mut host, seen, _) = bench.host(None);
        let data: Vec<u8> = (0..100 * BLOCK).map(|at| (at / 7) as u8).collect();
        host.write_all(&request(WRITE, 3, 100)).unwrap();
        host.write_all(&data).unwrap();
        assert_eq!(answer(&mut host, 1), [1]);
        host.write_all(&request(FLUSH, 0, 0)).unwrap();
        assert_eq!(answer(&mut host, 1), [1]);
        host.write_all(&request(READ, 3, 100)).unwrap();
        assert_eq!(answer(&mut host, 1 + data.len())[1..], data);
        // Beyond the end: the thread that may wait says so.
        host.write_all(&request(READ, 1023, 2)).unwrap();
        assert_eq!(answer(&mut host, 1), [0]);
        drop(host);
        until(|| *seen.ended.lock().unwrap() == [End::Closed]);
        assert_eq!(bench.gate.inside(), 0);
    }
}

#[test]
fn a_durable_write_that_fails_latches_the_device_and_a_plain_one_does_not() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        std::fs::write(&path, [3; 2 * BLOCK as usize]).unwrap();
        // Open for reading only: each write fails (EBADF).
        let file = std::fs::File::open(&path).unwrap();
        let device = FileDevice::new(file, &path, Bytes(2 * BLOCK)).unwrap();
        let bench = Bench::new(engine, Arc::new(device));
        let (mut host, ..) = bench.host(None);
        let mut write_and_read = |what| {
            host.write_all(&request(what, 0, 1)).unwrap();
            host.write_all(&[4; BLOCK as usize]).unwrap();
            assert_eq!(answer(&mut host, 1), [0], "{engine:?}");
            host.write_all(&request(READ, 0, 1)).unwrap();
            let read = answer(&mut host, 1) == [1];
            read.then(|| answer(&mut host, BLOCK as usize))
        };
        assert_eq!(write_and_read(WRITE), Some(vec![3; BLOCK as usize]));
        assert_eq!(write_and_read(WRITE_DURABLY), None, "{engine:?}");
        assert_eq!(bench.gate.inside(), 0);
    }
}

#[test]
fn what_is_written_durably_is_read_back() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (mut host, ..) = bench.host(None);
        host.write_all(&request(WRITE_DURABLY, 2, 1)).unwrap();
        host.write_all(&[5; BLOCK as usize]).unwrap();
        assert_eq!(answer(&mut host, 1), [1]);
        host.write_all(&request(READ, 2, 1)).unwrap();
        assert_eq!(
            answer(&mut host, 1 + BLOCK as usize)[1..],
            [5; BLOCK as usize]
        );
    }
}

#[test]
fn many_requests_at_once_stay_within_the_budget_and_are_all_answered() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (mut host, ..) = bench.host(None);
        // 64 MiB of reads asked for before the first is taken.
        for _ in 0..256 {
            host.write_all(&request(READ, 0, 64)).unwrap();
        }
        for _ in 0..256 {
            assert_eq!(answer(&mut host, 1 + 64 * BLOCK as usize)[0], 1);
        }
        host.write_all(&request(BYE, 0, 0)).unwrap();
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"bye");
    }
}

#[test]
fn a_peer_that_asks_and_does_not_take_is_not_listened_to() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (mut host, ..) = bench.host(None);
        host.set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        // What is never taken stops what is sent.
        let chatter: Vec<u8> = (0..4096).flat_map(|_| request(ECHO, 0, 0)).collect();
        let mut sent = 0;
        while let Ok(some) = host.write(&chatter) {
            sent += some;
            assert!(sent < 256 << 20, "{engine:?}: it is heard without end");
        }
    }
}

#[test]
fn wakes_and_deadlines_reach_the_protocol() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (_host, seen, waker) = bench.host(None);
        waker.wake();
        until(|| seen.woken.load(Ordering::SeqCst) == 1);
        waker.wake();
        until(|| seen.woken.load(Ordering::SeqCst) == 2);
        let (mut host, seen, _) = bench.host(Some(Duration::from_millis(50)));
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"late");
        assert_eq!(*seen.ended.lock().unwrap(), [End::Protocol("the deadline")]);
    }
}

/// A device whose reads wait until they are let go.
struct Held {
    go: AtomicBool,
    waiting: AtomicUsize,
}

impl BlockDevice for Held {
    fn size(&self) -> Bytes {
        Bytes(SIZE)
    }
    fn read(&self, _: Lba, buffer: &mut [u8]) -> Result<(), DeviceError> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        until(|| self.go.load(Ordering::SeqCst));
        buffer.fill(9);
        Ok(())
    }
    fn write(&self, _: Lba, _: &[u8], _: bool) -> Result<(), DeviceError> {
        Ok(())
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write_zeroes(&self, _: Lba, _: u64, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }
    fn deallocate(&self, _: Lba, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[test]
fn a_pass_is_held_until_the_device_has_settled_though_the_host_has_gone() {
    for engine in engines() {
        let device = Arc::new(Held {
            go: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
        });
        let bench = Bench::new(engine, Arc::clone(&device) as Arc<dyn BlockDevice>);
        let (mut host, seen, _) = bench.host(None);
        for _ in 0..3 {
            host.write_all(&request(READ, 0, 1)).unwrap();
        }
        until(|| device.waiting.load(Ordering::SeqCst) == 3);
        drop(host);
        until(|| !seen.ended.lock().unwrap().is_empty());
        assert_eq!(bench.gate.close(), 3);
        device.go.store(true, Ordering::SeqCst);
        until(|| bench.gate.inside() == 0);
        // Another connection is served all the while.
        let (mut host, ..) = bench.host(None);
        host.write_all(&request(FLUSH, 0, 0)).unwrap();
        assert_eq!(answer(&mut host, 1), [1]);
    }
}

#[test]
fn stopping_ends_the_connections() {
    for engine in engines() {
        let (_folder, device) = file();
        let bench = Bench::new(engine, device);
        let (mut host, seen, _) = bench.host(None);
        host.write_all(&request(FLUSH, 0, 0)).unwrap();
        assert_eq!(answer(&mut host, 1), [1]);
        let reader = std::thread::spawn(move || {
            let mut rest = Vec::new();
            host.read_to_end(&mut rest).unwrap();
            rest
        });
        drop(bench);
        assert_eq!(reader.join().unwrap(), b"");
        assert_eq!(seen.ended.lock().unwrap().len(), 1);
    }
}

/// The other half of the test below, in a process that is its own.
#[test]
#[ignore = "ends its process"]
fn a_bug_on_the_data_path() {
    let (_folder, device) = file();
    let bench = Bench::new(Engine::Threads, device);
    let (mut host, _, _) = bench.host(None);
    host.write_all(&request(BUG, 0, 0)).unwrap();
    let _ = host.read(&mut [0; 1]);
}

#[test]
fn a_panic_of_a_data_path_thread_is_the_end_of_the_process() {
    let mut process = std::process::Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "reactor::tests::a_bug_on_the_data_path"]);
    let output = process.args(["--ignored", "--nocapture"]).output().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(signal, Some(libc::SIGABRT), "{:?}: {said}", output.status);
    assert!(said.contains("asked to"), "it says why: {said}");
}
