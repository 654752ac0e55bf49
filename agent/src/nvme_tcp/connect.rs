//! The beginning of a connection: agreeing on the wire's form, and Connect
//! (NVM Express Base Specification 2.0, 6.3).

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use uuid::Uuid;

use super::command::{Entry, FABRICS, Place};
use super::controller::Controller;
use super::identify::QUEUE_ENTRIES;
use super::metrics::Metrics;
use super::queue::Shape;
use super::reader::{End, Pdu, Reader};
use super::status::Status;
use super::subsystem::{Directory, Found, Host, Refusal};
use super::wire::{self, COMMON, Completion, Flaw, IcReq, Kind, u16_at, u32_at};

const CONNECT: u8 = 0x01;
const CONNECT_DATA: u32 = 1024;
/// A controller id of an admin Connect: the target chooses.
const ANY_CONTROLLER: u16 = 0xffff;
/// Bit 16 of an invalid parameter's place: it is in the data, not in the command.
const IN_DATA: u32 = 1 << 16;

/// The command in a CapsuleCmd.
pub fn entry(pdu: &Pdu) -> Entry {
    let header: &[u8; 72] = pdu.header();
    let bytes = header[COMMON..]
        .first_chunk()
        .expect("72 bytes less 8 are 64");
    Entry::new(*bytes)
}

/// Takes ICReq and answers ICResp; the reader knows the digests from then on.
pub async fn agree(reader: &mut Reader, writer: &mut OwnedWriteHalf) -> Result<(), End> {
    let pdu = reader.next().await?;
    match pdu.frame.kind {
        Kind::IcReq => {}
        _ => return Err(pdu.malformed(Flaw::Sequence.at(0))),
    }
    let request = IcReq::decode(pdu.header()).map_err(|malformed| pdu.malformed(malformed))?;
    send(writer, &wire::ic_resp(request.digests)).await?;
    reader.digests = request.digests;
    Ok(())
}

/// Takes Connect and answers it: with an admitted association or a refusal,
/// after which only the connection's end is waited for.
pub async fn connect(
    reader: &mut Reader,
    writer: &mut OwnedWriteHalf,
    directory: &dyn Directory,
    metrics: &Metrics,
    peer: SocketAddr,
) -> Result<(Arc<Controller>, Shape), End> {
    let pdu = reader.next().await?;
    if pdu.frame.kind != Kind::CapsuleCmd {
        return Err(pdu.malformed(Flaw::Sequence.at(0)));
    }
    let mut data = vec![0; pdu.frame.data];
    let sound = reader.data(&pdu.frame, &mut data).await?;
    let entry = entry(&pdu);
    let decoded = match data.first_chunk() {
        _ if !sound => Err(Status::TRANSIENT_TRANSPORT_ERROR.into()),
        Some(data) => Request::decode(&entry, data),
        None => Err(Status::DATA_SGL_LENGTH_INVALID.into()),
    };
    let admitted = match &decoded {
        Ok(request) => request.admit(directory).await,
        Err(refusal) => Err(*refusal),
    };
    let digests = reader.digests;
    let no_flow_control = decoded
        .as_ref()
        .is_ok_and(|request| request.no_flow_control);
    let (result, status) = match &admitted {
        Ok(controller) => (controller.id().into(), Status::SUCCESS),
        Err(refusal) => (refusal.result, refusal.status),
    };
    let completion = Completion {
        result: result.into(),
        sq_head: if no_flow_control { 0xffff } else { 1 },
        command: entry.command(),
        status: status.0,
    };
    metrics.command(true, FABRICS, status);
    let sent = send(writer, &completion.encode(digests)).await;
    match (admitted, decoded) {
        (Ok(controller), Ok(request)) => {
            if sent.is_err() && request.queue == 0 {
                controller.end();
            }
            sent?;
            tracing::info!(
                %peer, subsystem = %request.subsystem, controller = controller.id(),
                queue = request.queue, "connected"
            );
            let depth = request.entries;
            Ok((
                controller,
                Shape {
                    id: request.queue,
                    depth,
                    digests,
                    no_flow_control,
                },
            ))
        }
        (_, decoded) => {
            let subsystem = decoded.map(|request| request.subsystem).unwrap_or_default();
            let status = format!("{:#06x}", status.0);
            tracing::warn!(%peer, subsystem, status, "Connect refused");
            metrics.refused(refusal_name(completion.status));
            // The host closes: were it done here, it might come before the answer is read.
            reader.drain().await;
            Err(End::Closed)
        }
    }
}

fn refusal_name(status: u16) -> &'static str {
    match Status(status) {
        Status::CONTROLLER_BUSY => "busy-or-unknown",
        Status::CONNECT_INVALID_HOST => "host-or-closed",
        _ => "invalid",
    }
}

async fn send(writer: &mut OwnedWriteHalf, bytes: &[u8]) -> Result<(), End> {
    let sent = writer.write_all(bytes).await;
    sent.map_err(|source| End::Io {
        call: "write a PDU",
        source,
    })
}

/// A Connect command.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    queue: u16,
    entries: u16,
    keep_alive: u32,
    no_flow_control: bool,
    controller: u16,
    subsystem: String,
    host: Host,
}

impl Request {
    fn decode(entry: &Entry, data: &[u8; CONNECT_DATA as usize]) -> Result<Self, Refusal> {
        let invalid = |result| Refusal {
            status: Status::CONNECT_INVALID_PARAMETERS,
            result,
        };
        let command = entry.bytes();
        if (entry.opcode(), entry.fabrics_type()) != (FABRICS, CONNECT) {
            return Err(Status::COMMAND_SEQUENCE_ERROR.into());
        }
        match entry.data(CONNECT_DATA)? {
            Place::Capsule => {}
            Place::Host => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID.into()),
        }
        if u16_at(command, 40) != 0 {
            return Err(Status::INCOMPATIBLE_FORMAT.into());
        }
        let (queue, size) = (u16_at(command, 42), u16_at(command, 44));
        if size == 0 || size >= QUEUE_ENTRIES {
            return Err(invalid(44));
        }
        let id = data.first_chunk().expect("1024 bytes have 16");
        Ok(Self {
            queue,
            entries: size + 1,
            keep_alive: u32_at(command, 48),
            no_flow_control: command[46] & 1 << 2 != 0,
            controller: u16_at(data, 16),
            subsystem: name(&data[256..512]).ok_or(invalid(IN_DATA | 256))?,
            host: Host {
                nqn: name(&data[512..768]).ok_or(invalid(IN_DATA | 512))?,
                id: Uuid::from_bytes(*id),
            },
        })
    }

    async fn admit(&self, directory: &dyn Directory) -> Result<Arc<Controller>, Refusal> {
        let subsystem = match directory.find(&self.subsystem) {
            Found::Live(subsystem) => subsystem,
            // For good: the host's controller goes, and its I/O fails.
            Found::Closed => return Err(Status::CONNECT_INVALID_HOST.into()),
            // Not for good: the home may be about to restore it.
            Found::Unknown => return Err(Status::CONTROLLER_BUSY.into()),
        };
        if self.queue == 0 {
            if self.controller != ANY_CONTROLLER {
                let status = Status::CONNECT_INVALID_PARAMETERS;
                return Err(Refusal {
                    status,
                    result: IN_DATA | 16,
                });
            }
            return subsystem.admit(&self.host, self.keep_alive).await;
        }
        let controller = subsystem.join(&self.host, self.controller)?;
        controller.connect_queue(self.queue).map_err(|status| {
            let place = if status == Status::CONNECT_INVALID_PARAMETERS {
                42
            } else {
                0
            };
            Refusal {
                status,
                result: place,
            }
        })?;
        Ok(controller)
    }
}

/// The text of a field that is filled with zeroes.
fn name(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&field[..end]).ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}
