//! Accepts connections, of whichever protocol, and keeps those that are
//! nobody's yet few.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use crate::reactor::{HalfOpen, Place, Protocol, Reactors};

/// After accept failed for want of descriptors or memory.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// A silent peer is asked after this many seconds, …
const KEEPALIVE_IDLE: u32 = 30;
/// … then each so many, …
const KEEPALIVE_INTERVAL: u32 = 10;
/// … and is gone after so many questions without an answer.
const KEEPALIVE_COUNT: u32 = 3;

/// Connections that the kernel keeps until they are accepted (it takes
/// net.core.somaxconn at most, 4096 by default). When they are more it drops a
/// host's SYN, and Linux sends the next one a second later.
const BACKLOG: u32 = 4096;

/// Listens for hosts.
///
/// # Errors
/// The address is not this machine's, or somebody listens there.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // What is left of an earlier agent's connections does not keep this one out.
    socket.set_reuseaddr(true)?;
    // A host without keep-alive that loses its power would be served for ever.
    // What is accepted inherits all of this (tcp(7)), so it costs no call each.
    socket.set_keepalive(true)?;
    setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE)?;
    setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL)?;
    setsockopt(&socket, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A protocol, as its listener sees it.
pub trait Front: Send + Sync {
    /// Its name, for the log.
    const NAME: &'static str;
    /// The protocol's side of a connection that `peer` made to `local` now.
    fn connection(
        self: &Arc<Self>,
        peer: SocketAddr,
        local: SocketAddr,
        place: Place,
        now: Instant,
    ) -> Box<dyn Protocol>;
    /// Counts a connection that had to make room.
    fn evicted(&self);
}

/// Accepts until `stop` becomes true or its sender is gone.
pub async fn serve<F: Front>(
    front: &Arc<F>,
    reactors: &Reactors,
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
            Ok((stream, peer)) => begin(front, reactors, &waiting, stream, peer),
            Err(error) => {
                tracing::warn!(%error, "accept an {} connection", F::NAME);
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

fn begin<F: Front>(
    front: &Arc<F>,
    reactors: &Reactors,
    waiting: &Arc<HalfOpen>,
    stream: TcpStream,
    peer: SocketAddr,
) {
    let (place, caller, made_room) = waiting.enter(peer.ip().to_canonical());
    if made_room {
        front.evicted();
    }
    let local = stream.local_addr().unwrap_or(peer);
    let protocol = front.connection(peer, local, place, Instant::now());
    let served = stream
        .into_std()
        .and_then(|socket| reactors.serve(socket, protocol));
    match served {
        Ok(waker) => caller.wakes(waker),
        Err(error) => {
            tracing::warn!(%peer, %error, "hand an {} connection to the data path", F::NAME);
        }
    }
}
