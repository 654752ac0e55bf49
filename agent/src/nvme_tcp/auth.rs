//! Authentication of one queue: DH-HMAC-CHAP's messages and their order
//! (NVM Express Base Specification 2.0, 8.13.5).
//!
//! ```text
//!   idle ─ negotiate ─► busy ─(job)───► challenge ─ sent ─► challenged
//!    ▲                                                         │ reply, busy (job)
//!    │          ┌─────────────────── wrong ────────────────────┤
//!    │          ▼                                            right
//!    ├──── failure1 to be sent                          success1 to be sent
//!    │                                                         │
//!    └── authenticated ◄── sent; with a challenge of the host, its success2
//! ```
//!
//! What takes arithmetic is a [`Job`], done on a thread that may wait; its
//! outcome is left where the next command finds it. Until it is authenticated
//! the queue answers nothing but authentication.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::admin::{Job, Reply};
use super::command::Entry;
use super::controller::Controller;
use super::dhchap::{self, Exchange, Exchanged, Group, Hash, Secret};
use super::metrics::Peer;
use super::status::Status;
use super::wire::{u16_at, u32_at};

/// Fabrics type of Authentication Send.
pub const SEND: u8 = 0x05;
/// Fabrics type of Authentication Receive.
pub const RECEIVE: u8 = 0x06;
/// Security protocol and its specific bytes.
const PROTOCOL: [u8; 3] = [0x01, 0x01, 0xe9];
/// The longest message of a host: a reply with the largest hash and group.
const LONGEST: usize = 16 + 2 * 64 + 1024;

const NEGOTIATE: (u8, u8) = (0x00, 0x00);
const CHALLENGE: (u8, u8) = (0x01, 0x01);
const REPLY: (u8, u8) = (0x01, 0x02);
const SUCCESS1: (u8, u8) = (0x01, 0x03);
const SUCCESS2: (u8, u8) = (0x01, 0x04);
const FAILURE1: (u8, u8) = (0x00, 0xf0);
const FAILURE2: (u8, u8) = (0x00, 0xf1);

/// Why authentication failed: the explanation in a failure message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Failed = 0x01,
    Protocol = 0x02,
    Channel = 0x03,
    Hash = 0x04,
    Group = 0x05,
    Payload = 0x06,
    Message = 0x07,
}

/// Who must prove what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secrets {
    /// The host's secret, which it must know.
    pub host: Secret,
    /// The controller's, for hosts that want it to prove itself.
    pub controller: Option<Secret>,
    /// The hash that is used if the host has it.
    pub hash: Hash,
    /// The group that is used if the host has it; a stronger one never is.
    pub group: Group,
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    /// A job is under way; a queue has one at a time, since they are not cheap.
    Busy,
    Challenge(Box<Open>),
    Challenged(Box<Open>),
    /// To be sent; with the host's challenge answered in it, success2 follows.
    Success1 {
        message: Vec<u8>,
        mutual: bool,
    },
    Success2,
    Failure1(Why),
}

/// An authentication under way.
struct Open {
    transaction: u16,
    channel: u8,
    hash: Hash,
    group: Group,
    exchange: Option<Exchange>,
    challenge: Vec<u8>,
    sequence: u32,
}

/// One queue's authentication.
#[derive(Clone)]
pub struct Auth {
    controller: Arc<Controller>,
    peer: Peer,
    inner: Arc<Mutex<Inner>>,
    /// Whether it is the admin queue's, which makes the association.
    admin: bool,
}

#[derive(Default)]
struct Inner {
    state: State,
    transaction: u16,
    authenticated: bool,
}

impl Auth {
    /// The authentication of a queue of `controller`.
    pub fn new(controller: Arc<Controller>, peer: Peer, admin: bool) -> Self {
        Self {
            controller,
            peer,
            inner: Arc::default(),
            admin,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds the lock.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the host has proved itself.
    pub fn done(&self) -> bool {
        self.inner().authenticated
    }

    /// Whether the last attempt has failed.
    pub fn failed(&self) -> bool {
        matches!(self.inner().state, State::Failure1(_))
    }

    /// Does Authentication Send or Receive.
    ///
    /// # Errors
    /// The status for the host.
    pub fn handle(&self, entry: &Entry, data: &[u8]) -> Result<Reply, Status> {
        if entry.bytes()[41..44] != PROTOCOL {
            return Err(Status::INVALID_FIELD);
        }
        let length = u32_at(entry.bytes(), 44);
        if length == 0 || length as usize > LONGEST.max(4096) {
            return Err(Status::INVALID_FIELD);
        }
        entry.data(length)?;
        if entry.fabrics_type() == RECEIVE {
            return self.receive(length as usize);
        }
        if data.len() != length as usize {
            return Err(Status::DATA_SGL_LENGTH_INVALID);
        }
        self.send(data)
    }

    fn secrets(&self) -> Option<&Secrets> {
        self.controller.subsystem().secrets()
    }

    fn send(&self, data: &[u8]) -> Result<Reply, Status> {
        let mut inner = self.inner();
        if matches!(inner.state, State::Busy) {
            return Err(Status::COMMAND_SEQUENCE_ERROR);
        }
        let kind = (
            data.first().copied().unwrap_or(0xff),
            data.get(1).copied().unwrap_or(0xff),
        );
        let outcome = match (kind, std::mem::take(&mut inner.state)) {
            (NEGOTIATE, _) => self.negotiate(&mut inner, data),
            (REPLY, State::Challenged(open)) => self.reply(open, data),
            (SUCCESS2, State::Success2) => {
                inner.authenticated = true;
                Ok(Reply::Done(0))
            }
            (FAILURE2, _) => {
                inner.authenticated = false;
                if self.peer.may_log("unproved-target") {
                    tracing::warn!(
                        peer = %self.peer.address, subsystem = self.controller.subsystem().nqn(),
                        "the host does not believe that this is its target"
                    );
                }
                Ok(Reply::Done(0))
            }
            _ => Err(Why::Message),
        };
        if matches!(outcome, Ok(Reply::Job(_))) {
            inner.state = State::Busy;
        }
        Ok(outcome.unwrap_or_else(|why| {
            inner.fail(why);
            Reply::Done(0)
        }))
    }

    /// Chooses a hash and a group; the challenge is made by a job.
    fn negotiate(&self, inner: &mut Inner, data: &[u8]) -> Result<Reply, Why> {
        let (transaction, channel, descriptors) = match data {
            [_, _, _, _, low, high, channel, count, rest @ ..] => (
                u16::from_le_bytes([*low, *high]),
                *channel,
                rest.get(..usize::from(*count) * 64).ok_or(Why::Payload)?,
            ),
            _ => return Err(Why::Payload),
        };
        inner.transaction = transaction;
        if channel != 0 {
            // A secure channel was asked for, and there is none.
            return Err(Why::Channel);
        }
        let offered = descriptors.as_chunks::<64>().0;
        let offered = offered.iter().find(|offer| offer[0] == 0x01);
        let offered = offered.ok_or(Why::Protocol)?;
        let (hashes, groups) = (usize::from(offered[2]), usize::from(offered[3]));
        let hashes = offered.get(4..4 + hashes).ok_or(Why::Payload)?;
        let groups = offered.get(34..34 + groups).ok_or(Why::Payload)?;
        let secrets = self.secrets().ok_or(Why::Protocol)?;
        let preferred = |wanted: u8, all: &[u8]| all.contains(&wanted).then_some(wanted);
        let hash = preferred(secrets.hash as u8, hashes)
            .and_then(Hash::of)
            .or_else(|| hashes.iter().find_map(|number| Hash::of(*number)));
        // None that is stronger: its arithmetic would be a stranger's to ask for.
        let most = secrets.group as u8;
        let mut weaker = groups.iter().filter(|number| **number <= most);
        let group = preferred(most, groups)
            .and_then(Group::of)
            .or_else(|| weaker.find_map(|number| Group::of(*number)));
        let (hash, group) = (hash.ok_or(Why::Hash)?, group.ok_or(Why::Group)?);
        let inner = Arc::clone(&self.inner);
        Ok(Reply::Job(Job::new(move || {
            let exchange = (group != Group::Null).then(|| Exchange::new(group));
            let mut challenge = vec![0; hash.length()];
            let mut sequence = [0; 4];
            let random = getrandom::fill(&mut challenge).and(getrandom::fill(&mut sequence));
            let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
            if random.is_err() || matches!(exchange, Some(None)) {
                inner.state = State::Idle;
                return Err(Status::INTERNAL_ERROR);
            }
            let open = Open {
                transaction,
                channel,
                hash,
                group,
                exchange: exchange.flatten(),
                challenge,
                // Zero says "no challenge".
                sequence: u32::from_le_bytes(sequence).max(1),
            };
            inner.state = State::Challenge(Box::new(open));
            Ok(0)
        })))
    }

    /// Judges the host's reply by a job, which also answers its challenge.
    fn reply(&self, open: Box<Open>, data: &[u8]) -> Result<Reply, Why> {
        let length = open.hash.length();
        let fields = data.get(..16).ok_or(Why::Payload)?;
        let (mutual, value) = (fields[8] & 1 != 0, usize::from(u16_at(fields, 10)));
        let whole = data.len() >= 16 + 2 * length + value;
        if u16_at(fields, 4) != open.transaction
            || usize::from(fields[6]) != length
            || !whole
            || value != open.group.length()
        {
            return Err(Why::Payload);
        }
        let sequence = u32_at(fields, 12);
        let response = data[16..16 + length].to_vec();
        let counter = data[16 + length..16 + 2 * length].to_vec();
        let value = data[16 + 2 * length..16 + 2 * length + value].to_vec();
        let (inner, controller) = (Arc::clone(&self.inner), Arc::clone(&self.controller));
        let (peer, admin) = (self.peer.clone(), self.admin);
        Ok(Reply::Job(Job::new(move || {
            let judged = judge(&controller, &open, &value, &response);
            let subsystem = controller.subsystem();
            let next = match judged {
                Err(why) => Err(why),
                Ok(shared) => {
                    let exchanged = Exchanged {
                        challenge: &counter,
                        sequence,
                        ..open.exchanged(subsystem.nqn(), &subsystem.host().nqn, shared.as_deref())
                    };
                    let secret = subsystem.secrets().and_then(|one| one.controller.as_ref());
                    match (mutual, secret) {
                        (false, _) => Ok(open.success1(None)),
                        (true, Some(secret)) => {
                            Ok(open.success1(Some(exchanged.of_controller(secret))))
                        }
                        // It wants proof of who has nothing to prove it with.
                        (true, None) => Err(Why::Failed),
                    }
                }
            };
            // Only now: who cannot prove itself ends nobody's association.
            let installed = if next.is_ok() && admin {
                subsystem.install(&controller)
            } else {
                Ok(())
            };
            let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(status) = installed {
                inner.state = State::Idle;
                return Err(status);
            }
            match next {
                Ok(message) => inner.state = State::Success1 { message, mutual },
                Err(why) => {
                    if peer.may_log("unproved-host") {
                        tracing::warn!(
                            peer = %peer.address, subsystem = subsystem.nqn(),
                            "a host did not prove itself"
                        );
                    }
                    inner.fail(why);
                }
            }
            Ok(0)
        })))
    }

    /// The message that is next, in a transfer of `length` bytes.
    fn receive(&self, length: usize) -> Result<Reply, Status> {
        let mut inner = self.inner();
        let (message, next) = match std::mem::take(&mut inner.state) {
            State::Challenge(open) => (open.message(), State::Challenged(open)),
            State::Success1 { message, mutual } => {
                // With a challenge of its own the host has the last word.
                inner.authenticated |= !mutual;
                let next = if mutual { State::Success2 } else { State::Idle };
                (message, next)
            }
            State::Failure1(why) => (failure(inner.transaction, why), State::Idle),
            other @ (State::Idle | State::Busy | State::Challenged(_) | State::Success2) => {
                inner.state = other;
                return Err(Status::COMMAND_SEQUENCE_ERROR);
            }
        };
        if message.len() > length {
            return Err(Status::INVALID_FIELD);
        }
        inner.state = next;
        let mut data = message;
        data.resize(length, 0);
        Ok(Reply::Data(data))
    }
}

impl Inner {
    fn fail(&mut self, why: Why) {
        self.authenticated = false;
        self.state = State::Failure1(why);
    }
}

/// The secret of the exchange, if there was one, when the host's response is right.
fn judge(
    controller: &Controller,
    open: &Open,
    value: &[u8],
    response: &[u8],
) -> Result<Option<Vec<u8>>, Why> {
    let subsystem = controller.subsystem();
    let secrets = subsystem.secrets().ok_or(Why::Protocol)?;
    let shared = match &open.exchange {
        Some(exchange) => Some(exchange.shared(value).ok_or(Why::Payload)?),
        None => None,
    };
    let exchanged = open.exchanged(subsystem.nqn(), &subsystem.host().nqn, shared.as_deref());
    if dhchap::same(&exchanged.of_host(&secrets.host), response) {
        Ok(shared)
    } else {
        Err(Why::Failed)
    }
}

impl Open {
    fn exchanged<'a>(
        &'a self,
        subsystem: &'a str,
        host: &'a str,
        shared: Option<&'a [u8]>,
    ) -> Exchanged<'a> {
        Exchanged {
            hash: self.hash,
            shared,
            challenge: &self.challenge,
            sequence: self.sequence,
            transaction: self.transaction,
            channel: self.channel,
            host,
            subsystem,
        }
    }

    /// The challenge message.
    fn message(&self) -> Vec<u8> {
        let value = self.exchange.as_ref().map(|exchange| &exchange.public[..]);
        let value = value.unwrap_or_default();
        let mut message = header(CHALLENGE, self.transaction);
        message.push(self.hash.length() as u8);
        message.extend_from_slice(&[0, self.hash as u8, self.group as u8]);
        let length = u16::try_from(value.len()).expect("at most 1024");
        message.extend_from_slice(&length.to_le_bytes());
        message.extend_from_slice(&self.sequence.to_le_bytes());
        message.extend_from_slice(&self.challenge);
        message.extend_from_slice(value);
        message
    }

    /// The success message, with the controller's response if the host wants it.
    fn success1(&self, response: Option<Vec<u8>>) -> Vec<u8> {
        let mut message = header(SUCCESS1, self.transaction);
        message.push(self.hash.length() as u8);
        message.extend_from_slice(&[0, response.is_some().into()]);
        message.resize(16, 0);
        message.extend(response.unwrap_or_else(|| vec![0; self.hash.length()]));
        message
    }
}

fn header((kind, id): (u8, u8), transaction: u16) -> Vec<u8> {
    let mut message = vec![kind, id, 0, 0];
    message.extend_from_slice(&transaction.to_le_bytes());
    message
}

fn failure(transaction: u16, why: Why) -> Vec<u8> {
    let mut message = header(FAILURE1, transaction);
    // The reason is always that authentication failed.
    message.extend_from_slice(&[0x01, why as u8]);
    message
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
