//! Drives one connection's protocol over a tokio socket, until the reactor's
//! own threads do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};

use crate::reactor::{Connection, End, Outcome, Protocol, Tag, Waker};

/// What is left to be sent when a connection ends gets this long.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Longer than anything that is waited for.
const LONG: Duration = Duration::from_secs(3600);

/// Serves one accepted connection to its end.
pub async fn drive(mut stream: TcpStream, protocol: Box<dyn Protocol>) {
    // Answers are small and waited for.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
    }
    let woken = Arc::new(Notify::new());
    let notify = Arc::clone(&woken);
    let waker = Waker::new(Arc::new(move || notify.notify_one()));
    let mut connection = Connection::new(protocol, waker, Instant::now());
    let (done, mut outcomes) = mpsc::unbounded_channel();
    while connection.end().is_none() {
        begin(&mut connection, &done);
        if let Err(end) = send(&mut connection, &stream) {
            connection.finish(end);
            break;
        }
        if connection.end().is_some() {
            break;
        }
        let deadline = connection
            .deadline()
            .unwrap_or_else(|| Instant::now() + LONG);
        let sending = connection.wants_to_send();
        let receiving = connection.space().is_some();
        tokio::select! {
            biased;
            outcome = outcomes.recv() => if let Some((tag, outcome)) = outcome {
                connection.done(tag, outcome, Instant::now());
            },
            () = woken.notified() => connection.woken(Instant::now()),
            _ = stream.writable(), if sending => {}
            _ = stream.readable(), if receiving => receive(&mut connection, &stream),
            () = tokio::time::sleep_until(deadline.into()) => connection.woken(Instant::now()),
        }
    }
    begin(&mut connection, &done);
    if matches!(connection.end(), Some(End::Protocol(_) | End::Closed)) {
        let last: Vec<u8> = connection.output().flatten().copied().collect();
        let farewell = async {
            stream.write_all(&last).await?;
            stream.shutdown().await?;
            // Closing with unread bytes would reset the connection, and the
            // peer would not get to read why.
            let mut dropped = [0; 512];
            while stream.read(&mut dropped).await? > 0 {}
            std::io::Result::Ok(())
        };
        // Best effort: the peer may have gone.
        let _ = tokio::time::timeout(LAST_WORDS, farewell).await;
    }
}

fn begin(connection: &mut Connection, done: &mpsc::UnboundedSender<(Tag, Outcome)>) {
    while let Some(begun) = connection.begun() {
        let done = done.clone();
        tokio::task::spawn_blocking(move || {
            let outcome = begun.operation.perform(&*begun.device);
            drop(begun.passes);
            // The connection has ended: nobody waits for it.
            let _ = done.send((begun.tag, outcome));
        });
    }
}

fn send(connection: &mut Connection, stream: &TcpStream) -> Result<(), End> {
    while connection.wants_to_send() {
        let chunks: Vec<_> = connection
            .output()
            .take(64)
            .map(std::io::IoSlice::new)
            .collect();
        match stream.try_write_vectored(&chunks) {
            Ok(sent) => {
                drop(chunks);
                connection.sent(sent, Instant::now());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(failed("write", &error)),
        }
    }
    Ok(())
}

fn receive(connection: &mut Connection, stream: &TcpStream) {
    let Some(space) = connection.space() else {
        return;
    };
    match stream.try_read(space) {
        Ok(bytes) => connection.received(bytes, Instant::now()),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
        Err(error) => connection.finish(failed("read", &error)),
    }
}

fn failed(call: &'static str, error: &std::io::Error) -> End {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    End::Io { call, errno }
}
