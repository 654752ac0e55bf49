//! Accepts connections, and keeps those that have not connected yet few.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

use super::Exports;
use crate::nvme_tcp::connection;

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
    let (place, evicted, made_room) = HalfOpen::enter(waiting);
    if made_room {
        exports.metrics.evicted();
    }
    let exports = Arc::clone(exports);
    tokio::spawn(async move {
        let evicted = async {
            if evicted.await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        connection::serve(
            stream,
            peer,
            &*exports,
            &exports.metrics,
            exports.handshake,
            evicted,
            place,
        )
        .await;
    });
}

/// The connections that have not passed Connect, oldest first.
#[derive(Default)]
struct HalfOpen {
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, oneshot::Sender<()>>,
}

/// One of those connections' place; given up when dropped.
struct Place {
    number: u64,
    of: Arc<HalfOpen>,
}

impl HalfOpen {
    /// A place for one more, what tells it to go, and whether another had to.
    fn enter(this: &Arc<Self>) -> (Place, oneshot::Receiver<()>, bool) {
        let (evict, evicted) = oneshot::channel();
        let mut places = this.places.lock().unwrap_or_else(PoisonError::into_inner);
        let number = places.next;
        places.next += 1;
        places.taken.insert(number, evict);
        let oldest = (places.taken.len() > HALF_OPEN)
            .then(|| places.taken.pop_first())
            .flatten();
        let made_room = oldest.is_some();
        if let Some((_, evict)) = oldest {
            // It may just have connected or gone: then there is room anyway.
            let _ = evict.send(());
        }
        (
            Place {
                number,
                of: Arc::clone(this),
            },
            evicted,
            made_room,
        )
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
