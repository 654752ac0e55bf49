//! The reactor's threads: how they are started, and how connections come to them.

use std::cell::Cell;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Once, OnceLock, Weak};
use std::time::Duration;

use super::bell::{Handle, Inbox, Message};
use super::driver::Driver;
use super::link::Waker;
use super::polling::Polling;
use super::protocol::Protocol;
use super::serve::Serving;
use super::uring::Uring;
use super::workers::Workers;

/// How the kernel is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// io_uring for sockets and files.
    Uring,
    /// epoll for sockets, threads that wait for files.
    Threads,
}

impl FromStr for Engine {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "io-uring" => Ok(Self::Uring),
            "threads" => Ok(Self::Threads),
            _ => Err(format!(
                "{text:?} is no engine; known are io-uring and threads"
            )),
        }
    }
}

/// How long a thread looks out unless it is told otherwise: what a command on a
/// volume with one in flight takes, on a network of today, and then some.
pub const POLL: Duration = Duration::from_micros(200);

/// How the data path's threads are made.
pub struct Settings {
    /// How many there are.
    pub threads: usize,
    /// What they use. None: io_uring where the kernel allows it.
    pub engine: Option<Engine>,
    /// How long a thread on io_uring looks out for what comes next before it
    /// sleeps, as long as that pays.
    pub poll: Duration,
    /// Must stay open as long as any of their I/O can reach a disk, even after
    /// this process was killed: the pool's lock.
    pub held: Vec<OwnedFd>,
}

/// The data path's threads. When this is dropped they end their connections
/// and, as soon as no disk has anything in hand, themselves: nobody waits for that.
pub struct Reactors {
    inboxes: Vec<Arc<Inbox>>,
    next: AtomicUsize,
    engine: Engine,
    _held: Arc<[OwnedFd]>,
}

impl Reactors {
    /// Starts the threads and says in the log what they use.
    ///
    /// # Errors
    /// A thread cannot be started; the engine that was asked for cannot be had.
    pub fn start(settings: Settings) -> io::Result<Arc<Self>> {
        die_as_a_whole();
        let workers = Workers::start(prepare)?;
        let held: Arc<[OwnedFd]> = settings.held.into();
        let start = |engine| {
            let mut started = Vec::new();
            for number in 0..settings.threads.max(1) {
                let held = Arc::clone(&held);
                started.push(thread(number, engine, settings.poll, held, &workers)?);
            }
            Ok::<_, io::Error>(started)
        };
        let (engine, started) = match settings.engine {
            Some(engine) => (engine, start(engine)?),
            None => match start(Engine::Uring) {
                Ok(started) => (Engine::Uring, started),
                Err(error) => {
                    tracing::warn!(
                        %error,
                        "no io_uring here: the data path uses epoll and threads, which is slower"
                    );
                    (Engine::Threads, start(Engine::Threads)?)
                }
            },
        };
        tracing::info!(
            ?engine,
            threads = started.len(),
            "the data path has started"
        );
        Ok(Arc::new(Self {
            inboxes: started,
            next: AtomicUsize::new(0),
            engine,
            _held: held,
        }))
    }

    /// What the threads use.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Serves a connection until it ends. The waker wakes its protocol.
    ///
    /// # Errors
    /// The socket cannot be made ready for it.
    pub fn serve(&self, socket: TcpStream, protocol: Box<dyn Protocol>) -> io::Result<Waker> {
        // io_uring waits for the socket itself, and epoll asks without waiting.
        socket.set_nonblocking(false)?;
        // Answers are small and waited for.
        socket.set_nodelay(true)?;
        let number = self.next.fetch_add(1, Ordering::Relaxed) % self.inboxes.len();
        let inbox = Arc::clone(&self.inboxes[number]);
        let handle = handle(&inbox);
        let waker = handle.waker.clone();
        inbox.post(Message::Serve(socket, protocol, handle));
        Ok(waker)
    }
}

/// A connection's handle: its waker posts a wake that names it.
pub(super) fn handle(inbox: &Arc<Inbox>) -> Arc<Handle> {
    Arc::new_cyclic(|this: &Weak<Handle>| {
        let (this, inbox) = (Weak::clone(this), Arc::clone(inbox));
        Handle {
            waker: Waker::new(Arc::new(move || {
                if let Some(handle) = this.upgrade() {
                    inbox.post(Message::Wake(handle));
                }
            })),
            key: OnceLock::new(),
        }
    })
}

impl Drop for Reactors {
    fn drop(&mut self) {
        for inbox in &self.inboxes {
            inbox.post(Message::Stop);
        }
    }
}

fn thread(
    number: usize,
    engine: Engine,
    poll: Duration,
    held: Arc<[OwnedFd]>,
    workers: &Arc<Workers>,
) -> io::Result<Arc<Inbox>> {
    let inbox = Inbox::new(engine == Engine::Uring)?;
    let (ready, started) = mpsc::channel();
    let (mine, workers) = (Arc::clone(&inbox), Arc::clone(workers));
    std::thread::Builder::new()
        .name(format!("drover-data-{number}"))
        .spawn(move || {
            prepare();
            let serve = |made: io::Result<_>| match made {
                Ok(driver) => {
                    // Who started this waits for it.
                    let _ = ready.send(Ok(()));
                    Serving::new(driver, mine.clone(), workers).run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            };
            // A ring belongs to the thread that makes it.
            let held: Vec<_> = held.iter().map(AsRawFd::as_raw_fd).collect();
            let bell = mine.bell();
            serve(match engine {
                Engine::Uring => {
                    Uring::new(bell, &held, poll).map(|uring| Box::new(uring) as Box<dyn Driver>)
                }
                Engine::Threads => {
                    Polling::new(bell).map(|polling| Box::new(polling) as Box<dyn Driver>)
                }
            });
        })?;
    started
        .recv()
        .unwrap_or_else(|_| Err(io::Error::other("the thread ended at its start")))?;
    Ok(inbox)
}

thread_local! {
    /// Whether this thread has others' I/O in its hands.
    static CARRIES: Cell<bool> = const { Cell::new(false) };
}

/// Ends the process when a thread of the data path panics, before anything of
/// that thread is unwound. To go on without it would be worse: its connections
/// would hang, and its commands would leave their gates while the kernel still
/// carries them out. A successor waits for those by the pool's lock.
fn die_as_a_whole() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            usual(panic);
            if CARRIES.get() {
                std::process::abort();
            }
        }));
    });
}

/// Makes the calling thread one of the data path. What it allocates never waits
/// for the writes that it is to carry out (PR_SET_IO_FLUSHER,
/// Documentation/admin-guide of Linux 5.6 and newer), and its panic is the
/// process's end.
fn prepare() {
    CARRIES.set(true);
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: the call takes numbers only.
    let set = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if set != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(%error, "PR_SET_IO_FLUSHER (it needs CAP_SYS_RESOURCE)");
    }
}
