//! Servers: a listener, and a thread a connection.

use std::io::{self, Write, stdout};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};

use crate::inbox::{Inbox, Receiver};
use crate::outbox::Outbox;

/// Says where it listens, and serves for ever.
///
/// # Errors
/// The listener's. A connection's go to standard error and end it alone.
pub fn listen(
    address: SocketAddr,
    serve: impl Fn(&TcpStream) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
    println!("listening on {}", listener.local_addr()?);
    stdout().flush().context("print")?;
    let serve = Arc::new(serve);
    for socket in listener.incoming() {
        let socket = socket.context("accept")?;
        socket.set_nodelay(true).context("set TCP_NODELAY")?;
        let serve = Arc::clone(&serve);
        thread::spawn(move || {
            let Err(error) = serve(&socket) else { return };
            let cause = error.downcast_ref().map(io::Error::kind);
            // That the client is done is how every connection ends.
            if cause != Some(io::ErrorKind::UnexpectedEof) {
                eprintln!("a connection ended: {error:#}");
            }
        });
    }
    Ok(())
}

/// Answers a connection by what `target` says, until the client closes it.
///
/// # Errors
/// The socket's and the target's.
pub fn answer(target: &mut impl Receiver, socket: &TcpStream) -> Result<()> {
    let (mut inbox, mut out) = (Inbox::default(), Outbox::default());
    loop {
        inbox.receive(socket, true)?;
        inbox.hand_out(target, &mut out)?;
        out.flush(socket, true)?;
    }
}
