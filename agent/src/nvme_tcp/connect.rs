//! The beginning of an association: Connect, and who is admitted
//! (NVM Express Base Specification 2.0, 6.3).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use uuid::Uuid;

use super::command::{Entry, FABRICS, Place};
use super::controller::Controller;
use super::identify::QUEUE_ENTRIES;
use super::queue::Shape;
use super::status::Status;
use super::subsystem::{Directory, Found, Host, Refusal, TAKEOVER_WAIT};
use super::wire::{Digests, u16_at, u32_at};

/// Fabrics type of Connect.
pub const CONNECT: u8 = 0x01;
const CONNECT_DATA: u32 = 1024;
/// A controller id of an admin Connect: the target chooses.
const ANY_CONTROLLER: u16 = 0xffff;
/// Bit 16 of an invalid parameter's place: it is in the data, not in the command.
const IN_DATA: u32 = 1 << 16;

/// A refusal's name in metrics.
pub fn refusal_name(status: Status) -> &'static str {
    match status {
        Status::CONTROLLER_BUSY => "busy-or-unknown",
        Status::CONNECT_INVALID_HOST => "host-or-closed",
        _ => "invalid",
    }
}

/// A Connect command.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// The queue id; 0 is the admin queue.
    pub queue: u16,
    /// Entries of the queue.
    pub entries: u16,
    /// Milliseconds; 0: none.
    pub keep_alive: u32,
    /// Whether the host does without submission queue flow control.
    pub no_flow_control: bool,
    /// The controller that an I/O queue belongs to.
    pub controller: u16,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// Who connects.
    pub host: Host,
}

impl Request {
    /// Reads a Connect command and its data.
    ///
    /// # Errors
    /// Another command, or fields that do not fit.
    pub fn decode(entry: &Entry, data: &[u8]) -> Result<Self, Refusal> {
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
        let data: &[u8; CONNECT_DATA as usize] = data
            .try_into()
            .map_err(|_| Status::DATA_SGL_LENGTH_INVALID)?;
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

    /// How its connection is used.
    pub fn shape(&self, digests: Digests) -> Shape {
        Shape {
            id: self.queue,
            depth: self.entries,
            digests,
            no_flow_control: self.no_flow_control,
        }
    }
}

/// A Connect that is being decided.
pub struct Attempt {
    /// The command's identifier.
    pub command: u16,
    /// What was asked for.
    pub request: Request,
    until: Instant,
}

impl Attempt {
    /// A Connect that came now.
    pub fn new(command: u16, request: Request, now: Instant) -> Self {
        Self {
            command,
            request,
            until: now + TAKEOVER_WAIT,
        }
    }

    /// Decides, if it can be, for a host that came to `address`: none while commands of the association before
    /// are unsettled and there is time left.
    ///
    /// # Errors
    /// Why the host is refused.
    pub fn attempt(
        &self,
        directory: &dyn Directory,
        address: IpAddr,
        now: Instant,
    ) -> Result<Option<Arc<Controller>>, Refusal> {
        let request = &self.request;
        let subsystem = match directory.find(&request.subsystem) {
            Found::Live(subsystem) => subsystem,
            Found::Discovery(_) if request.queue != 0 => {
                let status = Status::CONNECT_INVALID_PARAMETERS;
                return Err(Refusal { status, result: 42 });
            }
            Found::Discovery(discovery) => discovery.subsystem(&request.host, address),
            // For good: the host's controller goes, and its I/O fails.
            Found::Closed => return Err(Status::CONNECT_INVALID_HOST.into()),
            // Not for good: the home may be about to restore it.
            Found::Unknown => return Err(Status::CONTROLLER_BUSY.into()),
        };
        if request.queue == 0 {
            if request.controller != ANY_CONTROLLER {
                let status = Status::CONNECT_INVALID_PARAMETERS;
                return Err(Refusal {
                    status,
                    result: IN_DATA | 16,
                });
            }
            let admitted = subsystem.admit(&request.host, request.keep_alive, now)?;
            if admitted.is_none() && now >= self.until {
                return Err(Status::CONTROLLER_BUSY.into());
            }
            return Ok(admitted);
        }
        let controller = subsystem.join(&request.host, request.controller)?;
        let claim = subsystem.secrets().is_none();
        match controller.connect_queue(request.queue, claim) {
            Ok(()) => Ok(Some(controller)),
            Err(status @ Status::CONNECT_INVALID_PARAMETERS) => Err(Refusal { status, result: 42 }),
            Err(status) => Err(status.into()),
        }
    }
}

/// The text of a field that is filled with zeroes.
fn name(field: &[u8]) -> Option<String> {
    let end = field.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&field[..end]).ok()?;
    (!text.is_empty()).then(|| text.to_owned())
}
