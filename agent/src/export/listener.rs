//! Accepts connections, and keeps those that have not connected yet few.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::Exports;
use crate::nvme_tcp::connection::{self, NvmeTcp};
use crate::reactor::Waker;

/// Connections that have not passed Connect. Beyond this the oldest is closed
/// for the newest: a host connects within milliseconds, who waits is no host.
const HALF_OPEN: usize = 256;
/// After accept failed for want of descriptors or memory.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// A silent peer is asked after this many seconds, …
const KEEPALIVE_IDLE: u32 = 30;
/// … then each so many, …
const KEEPALIVE_INTERVAL: u32 = 10;
/// … and is gone after so many questions without an answer.
const KEEPALIVE_COUNT: u32 = 3;

/// Accepts until `stop` becomes true or its sender is gone.
pub async fn serve(
    exports: &Arc<Exports>,
    listener: &TcpListener,
    mut stop: watch::Receiver<bool>,
) {
    let waiting = Arc::new(HalfOpen::default());
    let stopped = async move {
        // An error says that the sender is gone, so nobody wants this served.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    tokio::pin!(stopped);
    loop {
        let accepted = tokio::select! {
            () = &mut stopped => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => begin(exports, &waiting, stream, peer),
            Err(error) => {
                tracing::warn!(%error, "accept an NVMe/TCP connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

fn begin(exports: &Arc<Exports>, waiting: &Arc<HalfOpen>, stream: TcpStream, peer: SocketAddr) {
    // A host without keep-alive that loses its power would be served for ever.
    let kept = setsockopt(&stream, sockopt::KeepAlive, &true)
        .and_then(|()| setsockopt(&stream, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE))
        .and_then(|()| setsockopt(&stream, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL))
        .and_then(|()| setsockopt(&stream, sockopt::TcpKeepCount, &KEEPALIVE_COUNT));
    if let Err(errno) = kept {
        tracing::debug!(%peer, %errno, "set TCP keepalive");
    }
    let (place, made_room) = HalfOpen::enter(waiting);
    if made_room {
        exports.target.metrics.evicted();
    }
    let target = Arc::clone(&exports.target);
    let address = stream.local_addr().map_or(peer.ip(), |local| local.ip());
    let protocol = NvmeTcp::new(target, peer, address, Some(Box::new(place)), Instant::now());
    let served = stream
        .into_std()
        .and_then(|socket| exports.reactors.serve(socket, Box::new(protocol)));
    if let Err(error) = served {
        tracing::warn!(%peer, %error, "hand a connection to the data path");
    }
}

/// The connections that have not passed Connect, oldest first.
#[derive(Default)]
struct HalfOpen {
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, Arc<Wanted>>,
}

/// Whether a place is wanted back, and who is told so.
#[derive(Default)]
struct Wanted {
    wanted: AtomicBool,
    waker: OnceLock<Waker>,
}

/// One of those connections' place; given up when dropped.
struct Place {
    number: u64,
    wanted: Arc<Wanted>,
    of: Arc<HalfOpen>,
}

impl HalfOpen {
    /// A place for one more, and whether another has to go for it.
    fn enter(this: &Arc<Self>) -> (Place, bool) {
        let wanted = Arc::new(Wanted::default());
        let mut places = this.places.lock().unwrap_or_else(PoisonError::into_inner);
        let number = places.next;
        places.next += 1;
        places.taken.insert(number, Arc::clone(&wanted));
        let oldest = (places.taken.len() > HALF_OPEN)
            .then(|| places.taken.pop_first())
            .flatten();
        if let Some((_, oldest)) = &oldest {
            oldest.wanted.store(true, Ordering::Release);
            if let Some(waker) = oldest.waker.get() {
                waker.wake();
            }
        }
        let of = Arc::clone(this);
        (Place { number, wanted, of }, oldest.is_some())
    }
}

impl connection::Place for Place {
    fn wakes(&self, waker: Waker) {
        let waker = self.wanted.waker.get_or_init(|| waker);
        // It may have been wanted before.
        waker.wake();
    }

    fn wanted(&self) -> bool {
        self.wanted.wanted.load(Ordering::Acquire)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self
            .of
            .places
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        places.taken.remove(&self.number);
    }
}
