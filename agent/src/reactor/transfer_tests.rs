//! Transfers that the kernel gives up: which are done again by a thread that
//! may wait, and which are told to the device.

use std::io;
use std::os::fd::RawFd;

use nix::errno::Errno;

use super::*;
use crate::block::Direct;
use crate::reactor::bell::{Inbox, Message};
use crate::reactor::driver::{Driver, Event, Key, Memory, Way};
use crate::reactor::polling::Polling;
use crate::reactor::serve::Serving;
use crate::reactor::threads::handle;
use crate::reactor::workers::Workers;

/// Takes each transfer, and fails it.
struct Failing {
    sockets: Polling,
    errno: Errno,
    taken: Vec<u32>,
}

impl Driver for Failing {
    unsafe fn receive(&mut self, key: Key, socket: RawFd, memory: Memory) {
        // SAFETY: the caller keeps the trait's promise.
        unsafe { self.sockets.receive(key, socket, memory) };
    }

    unsafe fn send(&mut self, key: Key, socket: RawFd, message: *const libc::msghdr) {
        // SAFETY: the caller keeps the trait's promise.
        unsafe { self.sockets.send(key, socket, message) };
    }

    unsafe fn transfer(&mut self, number: u32, _: Direct, _: Memory, _: Way) -> bool {
        self.taken.push(number);
        true
    }

    fn turn(&mut self, wait: Option<Duration>, ended: &mut Vec<Event>) -> io::Result<()> {
        let wait = match self.taken.is_empty() {
            true => wait,
            false => Some(Duration::ZERO),
        };
        self.sockets.turn(wait, ended)?;
        let failed = self.taken.drain(..);
        ended.extend(failed.map(|number| Event::Moved(number, Err(self.errno))));
        Ok(())
    }

    fn forget(&mut self, socket: RawFd) {
        self.sockets.forget(socket);
    }
}

/// Whether a durable write was done, and whether the device serves afterwards,
/// when the kernel gives each transfer up with `errno`.
fn durable_write(errno: Errno) -> (bool, bool) {
    let (_folder, device) = file();
    let inbox = Inbox::new(false).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut host = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let toy = Toy {
        device: Arc::clone(&device),
        gate: Gate::new(),
        seen: Arc::default(),
        deadline: None,
        writing: (Lba(0), false),
    };
    let (socket, _) = listener.accept().unwrap();
    inbox.post(Message::Serve(socket, Box::new(toy), handle(&inbox)));
    let theirs = Arc::clone(&inbox);
    let serving = std::thread::spawn(move || {
        let sockets = Polling::new(theirs.bell()).unwrap();
        let driver = Failing {
            sockets,
            errno,
            taken: Vec::new(),
        };
        let workers = Workers::start(|| {}).unwrap();
        Serving::new(Box::new(driver), theirs, workers).run();
    });
    host.write_all(&request(WRITE_DURABLY, 2, 1)).unwrap();
    host.write_all(&[5; BLOCK as usize]).unwrap();
    let written = answer(&mut host, 1) == [1];
    let mut block = [0; BLOCK as usize];
    let read = device.read(Lba(2), &mut block);
    assert!(!written || block == [5; BLOCK as usize]);
    inbox.post(Message::Stop);
    drop(host);
    serving.join().unwrap();
    (written, read.is_ok())
}

#[test]
fn a_durable_write_that_reached_no_disk_is_done_again() {
    for errno in [Errno::EINTR, Errno::EAGAIN, Errno::ENOMEM] {
        assert_eq!(durable_write(errno), (true, true), "{errno}");
    }
    assert_eq!(durable_write(Errno::EIO), (false, false));
}
