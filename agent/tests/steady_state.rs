//! The data path in its steady state allocates nothing per command: iSCSI over
//! real sockets, on each engine, on a disk and in memory, with every allocation
//! of the target's threads counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use drover::block::file::FileDevice;
use drover::ids::Bytes;
use drover::iscsi::connection::{Iscsi, Shared};
use drover::iscsi::metrics::Metrics;
use drover::iscsi::scsi::inquiry::Identity;
use drover::iscsi::target::{Access, Directory, Found, Spec, Target};
use drover::iscsi::unit::Unit;
use drover::reactor::{Engine, POLL, Reactors, Settings};
use nix::sys::resource::{UsageWho, getrusage};
use uuid::Uuid;

/// Counts what is allocated by threads that are not the test's own.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread's allocations are not the target's.
    static OTHER: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: it hands everything on to the system's allocator; counting allocates
// nothing, since the thread-local value needs neither a start nor an end.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !OTHER.get() {
            ALLOCATED.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TARGET: &str = "iqn.2026-11.io.drover:steady";
const INITIATOR: &str = "iqn.2026-11.org.example:steady";
const SIZE: u64 = 4 << 20;
const READ: u8 = 0x28;
const WRITE: u8 = 0x2a;
const SYNCHRONIZE_CACHE: u8 = 0x35;
const BHS: usize = 48;
const BLOCK: usize = 4096;
/// Commands in flight: as many as a session may have.
const DEPTH: u32 = 64;
/// Rounds before the count, in which buffers get their memory, and counted ones.
const ROUNDS: u32 = 200;

struct One(Arc<Target>);

impl Directory for One {
    fn find(&self, target: &str) -> Found {
        if target == self.0.name() {
            Found::Live(Arc::clone(&self.0))
        } else {
            Found::Unknown
        }
    }

    fn visible(&self, _initiator: &str) -> Vec<String> {
        Vec::new()
    }
}

/// Serves a file of a folder to one connection.
fn serve(folder: &Path, engine: Engine) -> (Arc<Reactors>, TcpStream) {
    let path = folder.join("volume");
    File::create(&path)
        .and_then(|mut file| file.write_all(&vec![1; usize::try_from(SIZE).unwrap()]))
        .unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let device = Arc::new(FileDevice::new(file, &path, Bytes(SIZE)).unwrap());
    let identity = Identity {
        uuid: Uuid::new_v4(),
        target: TARGET.to_owned(),
    };
    let spec = Spec {
        name: TARGET.to_owned(),
        access: vec![Access {
            initiator: INITIATOR.to_owned(),
            incoming: None,
            outgoing: None,
        }],
        max_sessions: 4,
    };
    let target = Target::new(spec, Unit::new(device, identity, false, None).unwrap());
    let shared = Shared::new(Arc::new(One(target)), Metrics::default());
    let reactors = Reactors::start(Settings {
        threads: 1,
        engine: Some(engine),
        poll: POLL,
        held: Vec::new(),
    })
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let portal = listener.local_addr().unwrap();
    let socket = TcpStream::connect(portal).unwrap();
    let (served, peer) = listener.accept().unwrap();
    let protocol = Iscsi::new(shared, peer, portal, None, Instant::now());
    reactors.serve(served, Box::new(protocol)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    (reactors, socket)
}

/// An initiator that allocates nothing once it is logged in.
struct Initiator {
    socket: TcpStream,
    command: u32,
    status: u32,
    out: Vec<u8>,
    data: Vec<u8>,
}

fn header(opcode: u8, flags: u8, data: usize) -> [u8; BHS] {
    let mut header = [0; BHS];
    (header[0], header[1]) = (opcode, flags);
    header[5..8].copy_from_slice(&data.to_be_bytes()[5..8]);
    header
}

impl Initiator {
    /// Logs in by one request: operational negotiation to full feature phase.
    fn log_in(mut socket: TcpStream) -> Self {
        let text = format!(
            "InitiatorName={INITIATOR}\0TargetName={TARGET}\0SessionType=Normal\0\
             HeaderDigest=None\0DataDigest=None\0ImmediateData=Yes\0\
             MaxRecvDataSegmentLength=262144\0"
        );
        let mut login = header(0x43, 0x87, text.len());
        login[8] = 0x80;
        login[24..28].copy_from_slice(&1u32.to_be_bytes());
        let mut bytes = login.to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        socket.write_all(&bytes).unwrap();
        let mut initiator = Self {
            socket,
            command: 1,
            status: 0,
            out: Vec::with_capacity(DEPTH as usize * (BHS + BLOCK)),
            data: vec![0; 64 << 10],
        };
        let answer = initiator.answer();
        assert_eq!((answer[0], answer[1] & 0x83, answer[36]), (0x23, 0x83, 0));
        initiator
    }

    /// The next PDU's header; its data is read and thrown away.
    fn answer(&mut self) -> [u8; BHS] {
        let mut answer = [0; BHS];
        self.socket.read_exact(&mut answer).unwrap();
        let data = u32::from_be_bytes([0, answer[5], answer[6], answer[7]]) as usize;
        let data = &mut self.data[..data.next_multiple_of(4)];
        self.socket.read_exact(data).unwrap();
        answer
    }

    /// READ(10) or WRITE(10) of one block, or SYNCHRONIZE CACHE(10), `depth` at once.
    fn round(&mut self, opcode: u8, flags: u8, fua: bool, depth: u32) {
        self.out.clear();
        for number in 0..depth {
            let write = opcode == WRITE;
            let mut command = header(0x01, flags, if write { BLOCK } else { 0 });
            command[16..20].copy_from_slice(&number.to_be_bytes());
            let length = if opcode == SYNCHRONIZE_CACHE {
                0
            } else {
                BLOCK as u32
            };
            command[20..24].copy_from_slice(&length.to_be_bytes());
            command[24..28].copy_from_slice(&self.command.to_be_bytes());
            command[28..32].copy_from_slice(&self.status.to_be_bytes());
            self.command += 1;
            command[32] = opcode;
            command[33] = u8::from(fua) << 3;
            command[34..38].copy_from_slice(&number.to_be_bytes());
            command[40] = 1;
            self.out.extend_from_slice(&command);
            if write {
                self.out.extend_from_slice(&[7; BLOCK]);
            }
        }
        self.socket.write_all(&self.out).unwrap();
        let mut ended = 0;
        while ended < depth {
            let answer = self.answer();
            let last = match answer[0] {
                0x21 => true,
                0x25 => answer[1] & 1 != 0,
                other => panic!("a PDU with opcode {other:#x}"),
            };
            if last {
                ended += 1;
                self.status = u32::from_be_bytes(answer[24..28].try_into().unwrap()) + 1;
                // The first command of a session meets a unit attention.
                assert!(answer[3] == 0 || self.command < 2 * DEPTH, "{answer:?}");
            }
        }
    }

    fn read(&mut self) {
        self.round(READ, 0xc1, false, DEPTH);
    }

    fn write(&mut self, fua: bool) {
        self.round(WRITE, 0xa1, fua, DEPTH);
    }

    /// One at a time: with more of them, more threads are started to wait for the disk.
    fn flush(&mut self) {
        self.round(SYNCHRONIZE_CACHE, 0x81, false, 1);
    }
}

/// Pages that the process met for the first time.
fn faults() -> i64 {
    let used = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    used.minor_page_faults()
}

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Allocations of the target for many commands. Buffers are mapped, not allocated:
/// one that is new to its command is seen by the pages it meets. Where one more
/// thread was started to wait for the disk, as one is when those there are were
/// not back in time, the commands are counted again.
fn allocations(mut round: impl FnMut()) -> usize {
    for _ in 0..ROUNDS {
        round();
    }
    for _ in 0..10 {
        let there = threads();
        let (before, met) = (ALLOCATED.load(Ordering::SeqCst), faults());
        for _ in 0..ROUNDS {
            round();
        }
        let (made, met) = (ALLOCATED.load(Ordering::SeqCst) - before, faults() - met);
        if threads() == there {
            assert!(met < i64::from(ROUNDS) / 2, "{met} new pages");
            return made;
        }
    }
    panic!("threads are started for ever");
}

#[test]
fn no_command_allocates() {
    OTHER.set(true);
    for (engine, folder) in [
        (Engine::Uring, "/dev/shm"),
        (Engine::Threads, "/dev/shm"),
        (Engine::Uring, "/var/tmp"),
    ] {
        let folder = tempfile::tempdir_in(folder).unwrap();
        let (_reactors, socket) = serve(folder.path(), engine);
        let mut initiator = Initiator::log_in(socket);
        let read = allocations(|| initiator.read());
        let write = allocations(|| initiator.write(false));
        let durable = allocations(|| initiator.write(true));
        let flush = allocations(|| initiator.flush());
        assert_eq!(
            (read, write, durable, flush),
            (0, 0, 0, 0),
            "reads, writes, durable writes and flushes by {engine:?} in {}",
            folder.path().display()
        );
    }
}
