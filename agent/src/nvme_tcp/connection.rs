//! One TCP connection: from its first byte to its end.
//!
//! ```text
//!   accepted ── ICReq ──► agreed ── Connect ──► serving ──► closed
//!       └───────────────── 10 s ────────┘
//! ```
//!
//! While it serves, a reader takes PDUs in, a writer sends what the
//! [`Queue`] holds, and each I/O command is a task of its own. Such a task is
//! never cancelled: it holds passes of the association's and the export's
//! gates until its device call has settled, whatever becomes of the connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWriteExt, BufWriter};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedReceiver;

use super::admin::{self, Reply};
use super::command::{Entry, Io, Place};
use super::connect;
use super::controller::Controller;
use super::metrics::Metrics;
use super::queue::{Outgoing, Queue, Slot};
use super::reader::{End, Pdu, Reader, term_status};
use super::status::Status;
use super::subsystem::Directory;
use super::wire::{self, Data, FLAG_LAST, Flaw, Kind};
use crate::block::gate::Pass;

/// From accept to an admitted Connect.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// A host that takes nothing for this long is gone.
const WRITE_STALLED: Duration = Duration::from_secs(30);
/// A host that was asked for data and has not sent all of it is gone.
const DATA_STALLED: Duration = Duration::from_secs(60);
/// What is left to be sent when a connection ends gets this long.
const LAST_WORDS: Duration = Duration::from_secs(1);
const WRITE_BUFFER: usize = 64 << 10;

/// Serves one accepted connection to its end. `evicted`, or the time
/// `handshake`, ends it early while it has not connected; when it has,
/// `connected` is dropped.
pub async fn serve<T>(
    stream: TcpStream,
    peer: SocketAddr,
    directory: &dyn Directory,
    metrics: &Metrics,
    handshake: Duration,
    evicted: impl Future<Output = ()>,
    connected: T,
) {
    let _counted = metrics.connection();
    // Answers are small and waited for.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "set TCP_NODELAY");
    }
    let (reading, mut writing) = stream.into_split();
    let mut reader = Reader::new(reading);
    let connecting = async {
        connect::agree(&mut reader, &mut writing).await?;
        connect::connect(&mut reader, &mut writing, directory, metrics, peer).await
    };
    let admitted = tokio::select! {
        admitted = tokio::time::timeout(handshake, connecting) => {
            admitted.unwrap_or(Err(End::Late("Connect")))
        }
        () = evicted => Err(End::Ended("closed before Connect, to make room for newer connections")),
    };
    let (controller, shape) = match admitted {
        Ok(admitted) => admitted,
        Err(end) => {
            report(peer, metrics, &end);
            if let Some(term) = term(&end) {
                // Best effort: the host may have gone.
                let _ = tokio::time::timeout(LAST_WORDS, writing.write_all(&term)).await;
                let _ = tokio::time::timeout(LAST_WORDS, writing.shutdown()).await;
                let _ = tokio::time::timeout(LAST_WORDS, reader.drain()).await;
            }
            return;
        }
    };
    drop(connected);
    let _in_subsystem = controller.subsystem().count();
    let _association = (shape.id == 0).then(|| metrics.association());
    let (queue, sending) = Queue::new(shape, metrics.clone());
    let mut writer = std::pin::pin!(write(writing, sending));
    let end = tokio::select! {
        end = read(&mut reader, &queue, &controller) => end,
        written = &mut writer => written.err().unwrap_or(End::Closed),
        end = attend(&queue, &controller) => end,
    };
    report(peer, metrics, &end);
    if shape.id == 0 {
        controller.end();
    }
    queue.end();
    if let Some(term) = term(&end) {
        queue.send(Outgoing::Pdu(term));
    }
    queue.send(Outgoing::Last);
    if !matches!(end, End::Io { .. } | End::Late(_)) {
        let _ = tokio::time::timeout(LAST_WORDS, &mut writer).await;
    }
    if matches!(end, End::Malformed { .. }) {
        // Closing with unread bytes would reset the connection, and the host
        // would not get to read why.
        let _ = tokio::time::timeout(LAST_WORDS, reader.drain()).await;
    }
}

fn report(peer: SocketAddr, metrics: &Metrics, end: &End) {
    match end {
        End::Malformed { malformed, .. } => {
            metrics.malformed(malformed.flaw);
            tracing::warn!(%peer, reason = %end, "connection ended");
        }
        End::Terminated { .. } | End::Late(_) => {
            tracing::warn!(%peer, reason = %end, "connection ended");
        }
        End::Closed | End::Io { .. } | End::Ended(_) => {
            tracing::debug!(%peer, reason = %end, "connection ended");
        }
    }
}

fn term(end: &End) -> Option<Vec<u8>> {
    match end {
        End::Malformed { malformed, header } => Some(wire::c2h_term(*malformed, header)),
        _ => None,
    }
}

/// What happens to a connection from this side: its end, the export's, and
/// on the admin queue events and the keep-alive timeout.
async fn attend(queue: &Queue, controller: &Controller) -> End {
    let events = async {
        if queue.shape().id != 0 {
            return std::future::pending().await;
        }
        loop {
            let (command, result) = controller.event().await;
            queue.answer_event(command, result);
        }
    };
    let silent = async {
        if queue.shape().id != 0 {
            return std::future::pending().await;
        }
        controller.silent().await;
    };
    let gone = async {
        controller.subsystem().gone().await;
        if queue.shape().id != 0 {
            queue.answer_all(Status::RESERVATION_CONFLICT);
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = controller.ended() => End::Ended("the association has ended"),
        () = silent => {
            tracing::warn!(
                subsystem = controller.subsystem().nqn(), controller = controller.id(),
                "the host was silent beyond its keep-alive timeout"
            );
            End::Late("keep alive")
        }
        () = events => End::Closed,
        () = gone => End::Closed,
    }
}

async fn write(
    stream: OwnedWriteHalf,
    mut sending: UnboundedReceiver<Outgoing>,
) -> Result<(), End> {
    let mut stream = BufWriter::with_capacity(WRITE_BUFFER, stream);
    loop {
        let next = match sending.try_recv() {
            Ok(next) => next,
            Err(_) => {
                timely(stream.flush()).await?;
                match sending.recv().await {
                    Some(next) => next,
                    None => return Ok(()),
                }
            }
        };
        match next {
            Outgoing::Pdu(bytes) => timely(stream.write_all(&bytes)).await?,
            Outgoing::Data {
                header,
                data,
                behind,
                permit,
            } => {
                timely(stream.write_all(&header)).await?;
                // Small steps: each has its own deadline, and none holds more than it needs.
                for some in data.chunks(WRITE_BUFFER) {
                    timely(stream.write_all(some)).await?;
                }
                timely(stream.write_all(&behind)).await?;
                drop(permit);
            }
            Outgoing::Last => {
                timely(stream.flush()).await?;
                return timely(stream.shutdown()).await;
            }
        }
    }
}

async fn timely(written: impl Future<Output = std::io::Result<()>>) -> Result<(), End> {
    let written = tokio::time::timeout(WRITE_STALLED, written).await;
    let written = written.map_err(|_| End::Late("the host's taking of an answer"))?;
    written.map_err(|source| End::Io {
        call: "write a PDU",
        source,
    })
}

async fn read(reader: &mut Reader, queue: &Arc<Queue>, controller: &Arc<Controller>) -> End {
    loop {
        let taken = match reader.next().await {
            Ok(pdu) => take(reader, &pdu, queue, controller).await,
            Err(end) => Err(end),
        };
        if let Err(end) = taken {
            return end;
        }
    }
}

async fn take(
    reader: &mut Reader,
    pdu: &Pdu,
    queue: &Arc<Queue>,
    controller: &Arc<Controller>,
) -> Result<(), End> {
    match pdu.frame.kind {
        Kind::CapsuleCmd => {
            let mut data = vec![0; pdu.frame.data];
            let sound = reader.data(&pdu.frame, &mut data).await?;
            let entry = connect::entry(pdu);
            controller.heard();
            let slot = queue.begin(entry.command(), entry.opcode());
            let Some(slot) = slot.map_err(|malformed| pdu.malformed(malformed))? else {
                return Ok(());
            };
            if !sound {
                queue.answer(slot, 0, Status::TRANSIENT_TRANSPORT_ERROR);
            } else if queue.shape().id == 0 {
                administer(queue, controller, slot, &entry);
            } else {
                start(queue, controller, slot, entry, data);
            }
            Ok(())
        }
        Kind::H2CData => {
            let length = pdu.frame.data;
            let data = Data::decode(pdu.header());
            let last = pdu.frame.flags & FLAG_LAST != 0;
            let transfer = queue.transfer(data, length, last);
            let mut transfer = transfer.map_err(|malformed| pdu.malformed(malformed))?;
            let sound = reader
                .data(&pdu.frame, Queue::window(&mut transfer, length))
                .await?;
            queue.received(transfer, length, sound);
            Ok(())
        }
        Kind::H2CTermReq => Err(End::Terminated {
            fes: term_status(pdu.header()),
        }),
        _ => Err(pdu.malformed(Flaw::Sequence.at(0))),
    }
}

fn administer(queue: &Arc<Queue>, controller: &Arc<Controller>, slot: Slot, entry: &Entry) {
    match admin::handle(controller, entry) {
        Ok(Reply::Done(result)) => queue.answer(slot, result, Status::SUCCESS),
        Ok(Reply::Data(data)) => queue.answer_data(slot, data, None),
        Ok(Reply::Later) => {}
        Ok(Reply::ShutDown) => {
            queue.answer(slot, 0, Status::SUCCESS);
            let (queue, controller) = (Arc::clone(queue), Arc::clone(controller));
            tokio::spawn(async move {
                // A flush that fails latches the device; the shutdown is over all the same.
                // After a fence there is nothing to flush, and nothing was late either.
                let fenced = controller.subsystem().gate().is_closed();
                if !fenced && let Ok(_passes) = enter(&queue, &controller) {
                    let _ = perform(Io::Flush, &controller, Vec::new()).await;
                }
                controller.shutdown_complete();
            });
        }
        Err(status) => queue.answer(slot, 0, status),
    }
}

/// Begins an I/O command as a task of its own.
fn start(
    queue: &Arc<Queue>,
    controller: &Arc<Controller>,
    slot: Slot,
    entry: Entry,
    capsule: Vec<u8>,
) {
    let (queue, controller) = (Arc::clone(queue), Arc::clone(controller));
    tokio::spawn(async move {
        match run(&queue, &controller, slot, &entry, capsule).await {
            Ok(Answer::Empty) => queue.answer(slot, 0, Status::SUCCESS),
            Ok(Answer::Data(data, permit)) => {
                queue.metrics().read(data.len());
                queue.answer_data(slot, data, Some(permit));
            }
            Err(Unanswered::Refused(status)) => queue.answer(slot, 0, status),
            // The connection or the association has ended: there is nobody to tell.
            Err(Unanswered::Ended) => {}
        }
    });
}

enum Answer {
    Empty,
    Data(Vec<u8>, OwnedSemaphorePermit),
}

enum Unanswered {
    Refused(Status),
    Ended,
}

impl From<Status> for Unanswered {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

async fn run(
    queue: &Queue,
    controller: &Controller,
    slot: Slot,
    entry: &Entry,
    mut capsule: Vec<u8>,
) -> Result<Answer, Unanswered> {
    let subsystem = controller.subsystem();
    // Ahead of all other checks: whatever it was, it came too late.
    timely_enough(queue, controller)?;
    if !controller.enabled() {
        return Err(Status::COMMAND_SEQUENCE_ERROR.into());
    }
    let mut io = Io::decode(entry, subsystem.read_only())?;
    if let Io::Write { fua, .. } | Io::WriteZeroes { fua, .. } = &mut io {
        *fua |= !controller.write_cache();
    }
    let outgoing = io.outgoing(entry)?;
    let room;
    let data = match io.incoming(entry)? {
        Some((Place::Capsule, length)) => {
            if capsule.len() != length as usize {
                return Err(Status::DATA_SGL_LENGTH_INVALID.into());
            }
            room = None;
            std::mem::take(&mut capsule)
        }
        Some((Place::Host, length)) => {
            room = Some(queue.room(length).await.ok_or(Unanswered::Ended)?);
            timely_enough(queue, controller)?;
            let asked = queue.ask(slot, length).ok_or(Unanswered::Ended)?;
            match tokio::time::timeout(DATA_STALLED, asked).await {
                Ok(Ok(data)) => data?,
                Ok(Err(_)) => return Err(Unanswered::Ended),
                Err(_) => {
                    tracing::warn!(
                        subsystem = subsystem.nqn(),
                        "a host did not send the data it was asked for"
                    );
                    controller.end();
                    return Err(Unanswered::Ended);
                }
            }
        }
        None => {
            room = match outgoing {
                0 => None,
                length => Some(queue.room(length).await.ok_or(Unanswered::Ended)?),
            };
            vec![0; outgoing as usize]
        }
    };
    // Only now: a gate waits for the disk, never for a host that does not send.
    let passes = enter(queue, controller)?;
    if io.writes() {
        subsystem.note_write();
    }
    let (done, data) = perform(io, controller, data).await;
    drop(passes);
    done?;
    if let Io::Write { .. } = io {
        queue.metrics().written(data.len());
    }
    Ok(match (io, room) {
        (Io::Read { .. }, Some(permit)) => Answer::Data(data, permit),
        _ => Answer::Empty,
    })
}

/// Does a command on a thread that may wait, and gives its data back.
async fn perform(
    io: Io,
    controller: &Controller,
    mut data: Vec<u8>,
) -> (Result<(), Status>, Vec<u8>) {
    let device = Arc::clone(controller.subsystem().device());
    let done = tokio::task::spawn_blocking(move || (io.perform(&*device, &mut data), data));
    done.await
        .unwrap_or_else(|_| (Err(Status::INTERNAL_ERROR), Vec::new()))
}

/// Lets a command through the export's gate and the association's.
fn enter(queue: &Queue, controller: &Controller) -> Result<[Pass; 2], Unanswered> {
    let Some(export) = controller.subsystem().gate().enter() else {
        queue.metrics().late();
        return Err(Status::RESERVATION_CONFLICT.into());
    };
    let association = controller.gate().enter().ok_or(Unanswered::Ended)?;
    Ok([export, association])
}

/// Refuses a command, as late, when its export's gate is closed already.
fn timely_enough(queue: &Queue, controller: &Controller) -> Result<(), Unanswered> {
    if controller.subsystem().gate().is_closed() {
        // Closed for good, so this refuses, and counts that.
        enter(queue, controller).map(drop)?;
    }
    Ok(())
}
