//! Admin and fabrics commands of a connected admin queue.
//!
//! All of them answer at once from memory: none touches the device, except the
//! flush of a shutdown, which the caller performs.

use std::fmt;
use std::sync::Arc;

use super::command::{Entry, FABRICS, MAX_TRANSFER, NSID, Place};
use super::controller::{Controller, Event};
use super::discovery;
use super::identify::{self, CAPABILITIES, DISCOVERY_NOTICES, NAMESPACE_NOTICES, VERSION};
use super::log;
use super::status::Status;
use super::wire::{u32_at, u64_at};

const GET_LOG_PAGE: u8 = 0x02;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const ASYNC_EVENT_REQUEST: u8 = 0x0c;
const KEEP_ALIVE: u8 = 0x18;

/// The admin opcodes that are served.
pub const ADMIN_OPCODES: [u8; 7] = [
    GET_LOG_PAGE,
    IDENTIFY,
    ABORT,
    SET_FEATURES,
    GET_FEATURES,
    ASYNC_EVENT_REQUEST,
    KEEP_ALIVE,
];

const FEATURE_WRITE_CACHE: u8 = 0x06;
const FEATURE_QUEUES: u8 = 0x07;
const FEATURE_EVENTS: u8 = 0x0b;
const FEATURE_KEEP_ALIVE: u8 = 0x0f;
/// Host Behavior Support.
const FEATURE_BEHAVIOR: u8 = 0x16;
const FEATURE_HOST_ID: u8 = 0x81;
const FEATURE_RESERVATION_MASK: u8 = 0x82;
const FEATURE_RESERVATION_PERSISTENCE: u8 = 0x83;
/// Bytes of the host behavior data structure.
const BEHAVIOR: u32 = 512;

/// Fabrics type: set a property.
const PROPERTY_SET: u8 = 0x00;
/// Fabrics type: get a property.
const PROPERTY_GET: u8 = 0x04;

const PROPERTY_CAP: u32 = 0x00;
const PROPERTY_VS: u32 = 0x08;
const PROPERTY_CC: u32 = 0x14;
const PROPERTY_CSTS: u32 = 0x1c;

/// Work that may wait, and its end: the result, or the status for the host.
pub struct Job(Box<dyn FnOnce() -> Result<u64, Status> + Send>);

impl Job {
    /// Work that ends with a result for the host, or a status.
    pub fn new(work: impl FnOnce() -> Result<u64, Status> + Send + 'static) -> Self {
        Self(Box::new(work))
    }

    /// Does it.
    pub fn run(self) -> Result<u64, Status> {
        (self.0)()
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Job")
    }
}

impl PartialEq for Job {
    /// No two pieces of work are known to be the same.
    fn eq(&self, _: &Self) -> bool {
        false
    }
}

/// What is answered to an admin command.
#[derive(Debug, PartialEq)]
pub enum Reply {
    /// What this comes to, done on a thread that may wait.
    Job(Job),
    /// Success, with these command specific dwords.
    Done(u64),
    /// Success, with data for the host.
    Data(Vec<u8>),
    /// Nothing yet: the request waits for an event.
    Later,
    /// The command with this identifier on the admin queue is to be aborted.
    Abort(u16),
    /// Success, and the host has asked for a shutdown: flush, then
    /// [`Controller::shutdown_complete`].
    ShutDown,
}

/// Does an admin command.
///
/// # Errors
/// The status for the host.
pub fn handle(
    controller: &Controller,
    queue: u16,
    entry: &Entry,
    data: &[u8],
) -> Result<Reply, Status> {
    if entry.bytes()[1] & 3 != 0 {
        return Err(Status::INVALID_FIELD);
    }
    if entry.opcode() == FABRICS {
        return fabrics(controller, queue, entry);
    }
    if queue != 0 {
        return Err(Status::INVALID_OPCODE);
    }
    let discovers = controller.subsystem().discovery().is_some();
    match entry.opcode() {
        // Commands with which nothing can be discovered.
        ABORT | SET_FEATURES | GET_FEATURES if discovers && !of_discovery(entry) => {
            Err(Status::INVALID_FIELD)
        }
        IDENTIFY => {
            to_host(entry, 4096)?;
            identify_page(controller, entry).map(|page| Reply::Data(page.to_vec()))
        }
        GET_LOG_PAGE => get_log_page(controller, entry),
        GET_FEATURES => get_features(controller, entry),
        SET_FEATURES => set_features(controller, entry, data),
        ABORT => Ok(abort(controller, entry)),
        ASYNC_EVENT_REQUEST => controller
            .request_event(entry.command())
            .map(|()| Reply::Later),
        KEEP_ALIVE => Ok(Reply::Done(0)),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// That a command's data goes to the host's memory, which no capsule is, and is
/// `length` bytes.
pub(super) fn to_host(entry: &Entry, length: u32) -> Result<(), Status> {
    match entry.data(length)? {
        Place::Host => Ok(()),
        Place::Capsule => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
    }
}

fn abort(controller: &Controller, entry: &Entry) -> Reply {
    let (queue, command) = (entry.dword(10) & 0xffff, entry.dword(10) >> 16);
    match u16::try_from(command) {
        Ok(command) if queue == 0 && controller.cancel_event(command) => Reply::Abort(command),
        // "Not aborted" is always a correct answer: commands end soon by themselves.
        _ => Reply::Done(1),
    }
}

fn fabrics(controller: &Controller, queue: u16, entry: &Entry) -> Result<Reply, Status> {
    // Properties are the admin queue's; an I/O queue has Connect and
    // authentication, which went elsewhere.
    if queue != 0 && matches!(entry.fabrics_type(), PROPERTY_GET | PROPERTY_SET) {
        return Err(Status::INVALID_OPCODE);
    }
    let offset = u32_at(entry.bytes(), 44);
    let wide = match entry.bytes()[40] & 7 {
        0 => false,
        1 => true,
        _ => return Err(Status::INVALID_FIELD),
    };
    match (entry.fabrics_type(), offset, wide) {
        (PROPERTY_GET, PROPERTY_CAP, true) => Ok(Reply::Done(CAPABILITIES)),
        (PROPERTY_GET, PROPERTY_VS, false) => Ok(Reply::Done(VERSION.into())),
        (PROPERTY_GET, PROPERTY_CC, false) => Ok(Reply::Done(controller.configuration().into())),
        (PROPERTY_GET, PROPERTY_CSTS, false) => Ok(Reply::Done(controller.status().into())),
        (PROPERTY_SET, PROPERTY_CC, false) => {
            let value = u32_at(entry.bytes(), 48);
            let shut_down = controller.configure(value)?;
            Ok(if shut_down {
                Reply::ShutDown
            } else {
                Reply::Done(0)
            })
        }
        (PROPERTY_GET | PROPERTY_SET, ..) => Err(Status::INVALID_FIELD),
        // Connect on a connected queue, and what is not served at all.
        (0x01, ..) => Err(Status::COMMAND_SEQUENCE_ERROR),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Whether a discovery controller has what a command asks for.
fn of_discovery(entry: &Entry) -> bool {
    entry.opcode() == ABORT
        || matches!(
            entry.dword(10) as u8,
            FEATURE_EVENTS | FEATURE_KEEP_ALIVE | FEATURE_HOST_ID
        )
}

fn identify_page(controller: &Controller, entry: &Entry) -> Result<identify::Page, Status> {
    let subsystem = controller.subsystem();
    if subsystem.discovery().is_some() {
        return match entry.dword(10) & 0xff {
            0x01 => Ok(discovery::controller(controller)),
            _ => Err(Status::INVALID_FIELD),
        };
    }
    let (cns, csi) = (entry.dword(10) & 0xff, entry.dword(11) >> 24);
    let present = !subsystem.is_gone();
    match (cns, entry.namespace()) {
        (0x00, NSID) if present => {
            let size = subsystem.device().size();
            Ok(identify::namespace(
                size,
                subsystem.namespace(),
                subsystem.read_only(),
                subsystem.reservations().can_persist(),
            ))
        }
        // Inactive, but a valid id: zeroes say so.
        (0x00, NSID) => Ok([0; 4096]),
        (0x00, _) => Err(Status::INVALID_NAMESPACE),
        (0x01, _) => Ok(identify::controller(
            controller.id(),
            subsystem.nqn(),
            subsystem.namespace(),
        )),
        (0x02, above) if above < u32::MAX - 1 => {
            if !present {
                controller.saw_no_namespace();
            }
            Ok(identify::namespace_list(above, present))
        }
        (0x03, NSID) if present => Ok(identify::descriptors(subsystem.namespace())),
        (0x02 | 0x03, _) => Err(Status::INVALID_NAMESPACE),
        (0x06, _) if csi == 0 => Ok(identify::nvm_controller()),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn get_log_page(controller: &Controller, entry: &Entry) -> Result<Reply, Status> {
    let (ten, eleven) = (entry.dword(10), entry.dword(11));
    let dwords = u64::from(eleven & 0xffff) << 16 | u64::from(ten >> 16);
    let length = (dwords + 1) * 4;
    if length > u64::from(MAX_TRANSFER) {
        return Err(Status::INVALID_FIELD);
    }
    let length = u32::try_from(length).map_err(|_| Status::INVALID_FIELD)?;
    to_host(entry, length)?;
    let offset = u64_at(entry.bytes(), 48);
    let id = (ten & 0xff) as u8;
    let retain = ten & 1 << 15 != 0;
    let page = if let Some(discovery) = controller.subsystem().discovery() {
        if id != discovery::LOG {
            return Err(Status::INVALID_LOG_PAGE);
        }
        discovery.log(&controller.subsystem().host().nqn)
    } else if id == log::RESERVATIONS {
        let notice = controller.subsystem().reservation_notice(retain);
        log::reservations(notice)
    } else {
        let changed = id == log::CHANGED_NAMESPACES && controller.namespace_changed();
        log::page(id, changed).ok_or(Status::INVALID_LOG_PAGE)?
    };
    let part = log::part(&page, offset, length).ok_or(Status::INVALID_FIELD)?;
    match id {
        discovery::LOG if !retain => controller.has_read(Event::Discovery, false),
        log::CHANGED_NAMESPACES if !retain => controller.has_read(Event::Namespace, false),
        log::RESERVATIONS if !retain => {
            let more = controller.subsystem().reservation_notice(true).is_some();
            controller.has_read(Event::Reservation, more);
        }
        _ => {}
    }
    Ok(Reply::Data(part))
}

fn get_features(controller: &Controller, entry: &Entry) -> Result<Reply, Status> {
    let select = entry.dword(10) >> 8 & 7;
    if select == 3 {
        // Supported capabilities: none can be saved, all can be changed but the host's id.
        return match entry.dword(10) as u8 {
            FEATURE_WRITE_CACHE | FEATURE_QUEUES | FEATURE_EVENTS | FEATURE_KEEP_ALIVE
            | FEATURE_BEHAVIOR => Ok(Reply::Done(1 << 2)),
            // These are of a namespace.
            FEATURE_RESERVATION_MASK | FEATURE_RESERVATION_PERSISTENCE => {
                Ok(Reply::Done(1 << 2 | 1 << 1))
            }
            FEATURE_HOST_ID => Ok(Reply::Done(0)),
            _ => Err(Status::INVALID_FIELD),
        };
    }
    let value = match entry.dword(10) as u8 {
        FEATURE_WRITE_CACHE => controller.write_cache().into(),
        FEATURE_QUEUES => queues(controller.io_queues()),
        FEATURE_EVENTS => controller.events_enabled(),
        FEATURE_KEEP_ALIVE => controller.keep_alive_timeout(),
        FEATURE_BEHAVIOR => {
            to_host(entry, BEHAVIOR)?;
            let mut page = vec![0; BEHAVIOR as usize];
            page[0] = controller.retry_delays().into();
            return Ok(Reply::Data(page));
        }
        FEATURE_HOST_ID => {
            // The extended, 128-bit form is the only one on fabrics.
            if entry.dword(11) & 1 == 0 {
                return Err(Status::INVALID_FIELD);
            }
            to_host(entry, 16)?;
            return Ok(Reply::Data(
                controller.subsystem().host().id.as_bytes().to_vec(),
            ));
        }
        FEATURE_RESERVATION_MASK => {
            of_namespace(entry)?;
            controller.subsystem().reservation_mask()
        }
        FEATURE_RESERVATION_PERSISTENCE => {
            of_namespace(entry)?;
            let record = controller.subsystem().reservations().record();
            record.persistent().into()
        }
        _ => return Err(Status::INVALID_FIELD),
    };
    Ok(Reply::Done(value.into()))
}

fn set_features(controller: &Controller, entry: &Entry, data: &[u8]) -> Result<Reply, Status> {
    if entry.dword(10) & 1 << 31 != 0 {
        return Err(Status::FEATURE_NOT_SAVEABLE);
    }
    let value = entry.dword(11);
    match entry.dword(10) as u8 {
        FEATURE_WRITE_CACHE => controller.set_write_cache(value & 1 != 0),
        FEATURE_QUEUES => {
            let (submission, completion) = (value & 0xffff, value >> 16);
            if submission == 0xffff || completion == 0xffff {
                return Err(Status::INVALID_FIELD);
            }
            let granted = controller.grant_io_queues(submission.min(completion) + 1)?;
            return Ok(Reply::Done(queues(granted).into()));
        }
        FEATURE_EVENTS => controller.enable_events(value & (NAMESPACE_NOTICES | DISCOVERY_NOTICES)),
        FEATURE_KEEP_ALIVE => controller.set_keep_alive_timeout(value),
        FEATURE_RESERVATION_MASK => {
            of_namespace(entry)?;
            controller.subsystem().set_reservation_mask(value & 0b1110);
        }
        FEATURE_RESERVATION_PERSISTENCE => {
            of_namespace(entry)?;
            let reservations = Arc::clone(controller.subsystem().reservations());
            return Ok(Reply::Job(Job::new(move || {
                reservations.set_persistence(value & 1 != 0).map(|()| 0)
            })));
        }
        FEATURE_BEHAVIOR => {
            // Command retry delays: understood, though none is ever asked for.
            entry.data(BEHAVIOR)?;
            let enabled = data.first().ok_or(Status::DATA_SGL_LENGTH_INVALID)?;
            controller.set_retry_delays(enabled & 1 != 0);
        }
        // Connect has said it; Linux's own target answers so.
        FEATURE_HOST_ID => return Err(Status::COMMAND_SEQUENCE_ERROR),
        _ => return Err(Status::INVALID_FIELD),
    }
    Ok(Reply::Done(0))
}

/// Refuses a namespace's feature for any but the one there is.
fn of_namespace(entry: &Entry) -> Result<(), Status> {
    match entry.namespace() {
        NSID | u32::MAX => Ok(()),
        _ => Err(Status::INVALID_NAMESPACE),
    }
}

/// The Number of Queues feature: both counts 0's based.
fn queues(granted: u16) -> u32 {
    let zero_based = u32::from(granted.saturating_sub(1));
    zero_based << 16 | zero_based
}

#[cfg(test)]
#[path = "admin_tests.rs"]
mod tests;
