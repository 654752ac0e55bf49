//! Jobs on threads that wait: devices whose calls hang, and gates that close.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::block::gate::Gate;
use crate::block::{BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};
use crate::reactor::{Buffer, Failed, Outcome, Tag};

/// A device whose flushes wait for it.
struct Slow {
    open: AtomicBool,
    written: AtomicBool,
    begun: AtomicUsize,
}

impl Slow {
    fn new(open: bool) -> Arc<Self> {
        Arc::new(Self {
            open: AtomicBool::new(open),
            written: AtomicBool::new(false),
            begun: AtomicUsize::new(0),
        })
    }
}

impl BlockDevice for Slow {
    fn size(&self) -> Bytes {
        Bytes(0)
    }
    fn read(&self, _: Lba, _: &mut [u8]) -> Result<(), DeviceError> {
        Ok(())
    }
    fn write(&self, _: Lba, _: &[u8], _: bool) -> Result<(), DeviceError> {
        self.written.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        while !self.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
    fn write_zeroes(&self, _: Lba, _: u64, _: bool) -> Result<(), DeviceError> {
        Ok(())
    }
    fn deallocate(&self, _: Lba, _: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Bench {
    workers: Arc<Workers>,
    inbox: Arc<Inbox>,
}

impl Bench {
    fn new() -> Self {
        Self {
            workers: Workers::start(|| {}).unwrap(),
            inbox: Inbox::new(false).unwrap(),
        }
    }

    fn run(&self, device: &Arc<Slow>, tag: u64, gate: Option<&Arc<Gate>>) {
        self.begin(device, tag, gate, Operation::Flush);
    }

    fn begin(&self, device: &Arc<Slow>, tag: u64, gate: Option<&Arc<Gate>>, operation: Operation) {
        self.workers.run(Job {
            inbox: Arc::clone(&self.inbox),
            key: Key { place: 0, turn: 0 },
            begun: Begun {
                tag: Tag(tag),
                device: Arc::clone(device) as Arc<dyn BlockDevice>,
                operation,
                passes: [gate.and_then(Gate::enter), None, None],
            },
        });
    }

    /// The ends of so many jobs.
    fn ends(&self, count: usize) -> Vec<(u64, Outcome)> {
        let (mut messages, mut ends) = (VecDeque::new(), Vec::new());
        let until = Instant::now() + Duration::from_secs(20);
        while ends.len() < count {
            assert!(Instant::now() < until, "{} of {count} ended", ends.len());
            self.inbox.take(&mut messages);
            for message in messages.drain(..) {
                if let Message::Done(_, Tag(tag), outcome) = message {
                    ends.push((tag, outcome));
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        ends
    }
}

#[test]
fn a_device_that_hangs_holds_nobody_else_up() {
    let bench = Bench::new();
    let (hangs, other) = (Slow::new(false), Slow::new(true));
    let gate = Gate::new();
    for tag in 0..600 {
        bench.run(&hangs, tag, Some(&gate));
    }
    bench.run(&other, 1000, Some(&gate));
    assert_eq!(bench.ends(1)[0].0, 1000);
    // What holds no gate of the device that hangs, such as a host's proof.
    let call = Operation::Call(Box::new(|_| Outcome::new(None, Ok(()))));
    bench.begin(&hangs, 1001, None, call);
    assert_eq!(bench.ends(1)[0].0, 1001);
    // The device hangs still, so nobody waited for it.
    assert!(hangs.begun.load(Ordering::SeqCst) <= super::super::lanes::AT_ONCE);
    hangs.open.store(true, Ordering::SeqCst);
    let ends = bench.ends(600);
    assert!(ends.iter().all(|(_, outcome)| outcome.result.is_ok()));
}

#[test]
fn calls_may_wait_for_a_write_that_comes_behind_them() {
    let bench = Bench::new();
    let (device, gate) = (Slow::new(true), Gate::new());
    for tag in 0..100 {
        let waited_for = Arc::clone(&device);
        let call = Operation::Call(Box::new(move |_| {
            while !waited_for.written.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Outcome::new(None, Ok(()))
        }));
        bench.begin(&device, tag, Some(&gate), call);
    }
    let write = Operation::Write {
        lba: Lba(0),
        buffer: Buffer::zeroed(4096),
        fua: false,
    };
    bench.begin(&device, 100, Some(&gate), write);
    assert_eq!(bench.ends(101).len(), 101);
}

#[test]
fn what_waits_behind_a_closed_gate_is_not_begun() {
    let bench = Bench::new();
    let (device, gate, other) = (Slow::new(false), Gate::new(), Gate::new());
    for tag in 0..600 {
        bench.run(&device, tag, Some(&gate));
    }
    bench.run(&device, 600, Some(&other));
    let most = super::super::lanes::AT_ONCE;
    while device.begun.load(Ordering::SeqCst) < most {
        std::thread::yield_now();
    }
    assert_eq!(gate.close(), 600);
    device.open.store(true, Ordering::SeqCst);
    let ends = bench.ends(601);
    assert_eq!(gate.inside(), 0);
    let closed = |one: &&(u64, Outcome)| matches!(one.1.result, Err(Failed::Closed));
    assert_eq!(ends.iter().filter(closed).count(), 600 - most);
    assert_eq!(
        device.begun.load(Ordering::SeqCst),
        most + 1,
        "and the other's"
    );
    assert!(
        ends.iter()
            .any(|(tag, end)| *tag == 600 && end.result.is_ok())
    );
}
