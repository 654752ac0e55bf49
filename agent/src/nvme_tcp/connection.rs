//! One TCP connection: from its first byte to its end.
//!
//! ```text
//!   accepted ── ICReq ──► agreed ── Connect ──► admitting ──► serving ──► ended
//!       └───────────────── 10 s ────────┬──────────┘
//!                                       └──► refused (until the host closes)
//! ```
//!
//! It takes PDUs out of the stream: a header when all of it has come, data
//! straight into the memory of the command that it is for. What the commands
//! do is [`serving`](super::serving)'s.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::command::Entry;
use super::connect::{self, Attempt, Request};
use super::metrics::{Counting, Metrics, Peer};
use super::queue::Index;
use super::serving::Serving;
use super::status::Status;
use super::subsystem::{Directory, LOOK, Refusal};
use super::wire::{
    self, COMMON, Completion, DIGEST, Data, Digests, FLAG_LAST, Flaw, Frame, IcReq, Kind,
    LONGEST_HEADER, Malformed,
};
use crate::reactor::{Buffer, End, Link, Outcome, Place, Protocol, Tag};

/// From accept to an admitted Connect.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// What all connections of a target have in common.
pub struct Target {
    /// What is served.
    pub directory: Arc<dyn Directory>,
    /// Where it is counted.
    pub metrics: Metrics,
    /// How long a connection may take until it has passed Connect.
    pub handshake: Duration,
}

/// One connection, as the reactor sees it.
pub struct NvmeTcp {
    target: Arc<Target>,
    peer: Peer,
    /// The address of ours that it came to.
    address: IpAddr,
    digests: Digests,
    phase: Phase,
    incoming: Option<Incoming>,
    /// Its place among those that have not shown yet to be an export's host's.
    place: Option<Place>,
    /// Until when Connect must have passed.
    until: Instant,
    counted: Option<Counting>,
}

enum Phase {
    Accepted,
    Agreed,
    Admitting(Box<Attempt>, Instant),
    Refused,
    Serving(Box<Serving>),
    Ended,
}

/// Data that is being received.
struct Incoming {
    what: What,
    /// Whether a digest follows.
    digest: bool,
    at: Range<usize>,
    /// The data, when only its digest is missing.
    buffer: Option<Buffer>,
}

#[derive(Clone, Copy)]
enum What {
    Capsule(Entry),
    Transfer(Index),
}

/// A command's data, when it came in its capsule.
pub struct Capsule {
    /// The data.
    pub buffer: Buffer,
    /// Whether its digest matched.
    pub sound: bool,
}

impl NvmeTcp {
    /// A connection that was accepted now, from `peer` at `address` of ours.
    pub fn new(
        target: Arc<Target>,
        peer: SocketAddr,
        address: IpAddr,
        place: Option<Place>,
        now: Instant,
    ) -> Self {
        let counted = Some(target.metrics.connection());
        let until = now + target.handshake;
        Self {
            peer: target.metrics.peer(peer),
            target,
            address,
            digests: Digests::default(),
            phase: Phase::Accepted,
            incoming: None,
            place,
            until,
            counted,
        }
    }

    /// Ends the connection over something that the host must not send.
    fn malformed(&self, malformed: Malformed, header: &[u8], link: &mut Link) -> End {
        self.target.metrics.malformed(malformed.flaw);
        if self.peer.may_log(malformed.flaw.name()) {
            tracing::warn!(peer = %self.peer.address, reason = %malformed, "connection ended");
        }
        link.send(&wire::c2h_term(malformed, header));
        End::Protocol("malformed PDU")
    }

    /// Takes a header and what follows it, when all of the header has come.
    fn take_header(&mut self, link: &mut Link) -> Result<(), End> {
        let Some(common) = link.input().first_chunk::<COMMON>().copied() else {
            return Ok(());
        };
        let frame = Frame::check(&common, self.digests)
            .map_err(|malformed| self.malformed(malformed, &common, link))?;
        let digest = if frame.header_digest { DIGEST } else { 0 };
        let whole = frame.header + digest + frame.pad;
        let Some(bytes) = link.input().get(..whole) else {
            return Ok(());
        };
        let mut header = [0; LONGEST_HEADER];
        header[..frame.header].copy_from_slice(&bytes[..frame.header]);
        let sound = !frame.header_digest
            || bytes[frame.header..frame.header + DIGEST]
                == crc32c::crc32c(&bytes[..frame.header]).to_le_bytes();
        link.consume(whole);
        let shown = &header[..frame.header];
        if !sound {
            return Err(self.malformed(Flaw::HeaderDigest.at(0), shown, link));
        }
        let taken = match (frame.kind, &mut self.phase) {
            (Kind::H2CTermReq, _) => {
                let fes = wire::u16_at(&header, 8);
                self.target.metrics.terminated_by_host();
                if self.peer.may_log("terminated-by-host") {
                    tracing::warn!(
                        peer = %self.peer.address, fes = format!("{fes:#06x}"),
                        "the host ended the connection over something that it was sent"
                    );
                }
                return Err(End::Protocol("the host found an error"));
            }
            (Kind::IcReq, Phase::Accepted) => self.agree(&header, link),
            (Kind::CapsuleCmd, Phase::Agreed | Phase::Serving(_)) => {
                let entry = Entry::new(header[COMMON..].first_chunk().copied().unwrap_or([0; 64]));
                if frame.data == 0 {
                    return self.command(entry, None, link);
                }
                self.expect(What::Capsule(entry), &frame, None, link)
            }
            (Kind::H2CData, Phase::Serving(serving)) => {
                let data = Data::decode(header.first_chunk().unwrap_or(&[0; 24]));
                let last = frame.flags & FLAG_LAST != 0;
                match serving.transfer(data, frame.data, last) {
                    Ok(into) => self.expect(What::Transfer(data.tag), &frame, Some(into), link),
                    Err(malformed) => Err(malformed),
                }
            }
            _ => Err(Flaw::Sequence.at(0)),
        };
        taken.map_err(|malformed| self.malformed(malformed, shown, link))
    }

    fn expect(
        &mut self,
        what: What,
        frame: &Frame,
        into: Option<(Buffer, Range<usize>)>,
        link: &mut Link,
    ) -> Result<(), Malformed> {
        // Commands in capsules are bounded by the queue's depth.
        let (buffer, at) = into.unwrap_or_else(|| (link.unsolicited(frame.data), 0..frame.data));
        self.incoming = Some(Incoming {
            what,
            digest: frame.data_digest,
            at: at.clone(),
            buffer: None,
        });
        link.fill(buffer, at);
        Ok(())
    }

    /// Data has come, and its digest where one is used.
    fn complete(
        &mut self,
        incoming: Incoming,
        buffer: Buffer,
        sound: bool,
        link: &mut Link,
    ) -> Result<(), End> {
        match (incoming.what, &mut self.phase) {
            (What::Capsule(entry), _) => self.command(entry, Some(Capsule { buffer, sound }), link),
            (What::Transfer(index), Phase::Serving(serving)) => {
                serving.received(index, buffer, incoming.at.len(), sound, link)
            }
            (What::Transfer(_), _) => Ok(()),
        }
    }

    fn agree(&mut self, header: &[u8; 128], link: &mut Link) -> Result<(), Malformed> {
        let request = IcReq::decode(header)?;
        link.send(&wire::ic_resp(request.digests));
        self.digests = request.digests;
        self.phase = Phase::Agreed;
        Ok(())
    }

    fn command(
        &mut self,
        entry: Entry,
        capsule: Option<Capsule>,
        link: &mut Link,
    ) -> Result<(), End> {
        if let Phase::Serving(serving) = &mut self.phase {
            let taken = serving.command(entry, capsule, link)?;
            self.look_whose();
            return match taken {
                Ok(()) => Ok(()),
                Err(malformed) => {
                    let header = entry_header(&entry, self.digests);
                    Err(self.malformed(malformed, &header, link))
                }
            };
        }
        let request = match &capsule {
            Some(capsule) if !capsule.sound => Err(Status::TRANSIENT_TRANSPORT_ERROR.into()),
            Some(Capsule { buffer, .. }) => Request::decode(&entry, buffer),
            None => Err(Status::DATA_SGL_LENGTH_INVALID.into()),
        };
        if let Some(capsule) = capsule {
            link.recycle(capsule.buffer);
        }
        match request {
            Ok(request) => {
                let attempt = Box::new(Attempt::new(entry.command(), request, link.now()));
                self.admit(attempt, link)
            }
            Err(refusal) => {
                self.refuse(entry.command(), "", refusal, link);
                Ok(())
            }
        }
    }

    /// Admits a host, refuses it, or looks again a little later.
    fn admit(&mut self, attempt: Box<Attempt>, link: &mut Link) -> Result<(), End> {
        let (now, digests) = (link.now(), self.digests);
        match attempt.attempt(&*self.target.directory, self.address, now) {
            Ok(None) => {
                self.phase = Phase::Admitting(attempt, now + LOOK);
                Ok(())
            }
            Ok(Some(controller)) => {
                let request = &attempt.request;
                let completion = Completion {
                    result: controller.connect_result(),
                    sq_head: if request.no_flow_control { 0xffff } else { 1 },
                    command: attempt.command,
                    status: Status::SUCCESS.0,
                };
                self.target
                    .metrics
                    .command(true, super::command::FABRICS, Status::SUCCESS);
                link.send(&completion.encode(digests));
                if request.queue == 0 && self.peer.may_log("connected") {
                    tracing::info!(
                        peer = %self.peer.address, subsystem = %request.subsystem,
                        controller = controller.id(), "connected"
                    );
                }
                let shape = request.shape(digests);
                let metrics = self.target.metrics.clone();
                let peer = self.peer.clone();
                let serving = Serving::new(controller, shape, metrics, peer, self.until, link);
                self.phase = Phase::Serving(Box::new(serving));
                self.look_whose();
                Ok(())
            }
            Err(refusal) => {
                self.refuse(attempt.command, &attempt.request.subsystem, refusal, link);
                Ok(())
            }
        }
    }

    /// Gives the place up once the connection is a host's for sure.
    fn look_whose(&mut self) {
        if self.place.is_some()
            && let Phase::Serving(serving) = &self.phase
            && serving.is_a_hosts()
        {
            self.place = None;
        }
    }

    fn refuse(&mut self, command: u16, subsystem: &str, refusal: Refusal, link: &mut Link) {
        let completion = Completion {
            result: refusal.result.into(),
            sq_head: 1,
            command,
            status: refusal.status.0,
        };
        link.send(&completion.encode(self.digests));
        let metrics = &self.target.metrics;
        metrics.command(true, super::command::FABRICS, refusal.status);
        let reason = connect::refusal_name(refusal.status);
        metrics.refused(reason);
        if self.peer.may_log(reason) {
            let status = format!("{:#06x}", refusal.status.0);
            tracing::warn!(peer = %self.peer.address, subsystem, status, "Connect refused");
        }
        // The host closes: were it done here, it might come before the answer is read.
        self.phase = Phase::Refused;
    }
}

/// A command's header as it came, for the host to recognise.
fn entry_header(entry: &Entry, digests: Digests) -> [u8; 72] {
    let mut header = [0; 72];
    header[..COMMON].copy_from_slice(&wire::common(Kind::CapsuleCmd, 0, digests, 0));
    header[COMMON..].copy_from_slice(entry.bytes());
    header
}

impl Protocol for NvmeTcp {
    fn received(&mut self, link: &mut Link) -> Result<(), End> {
        match self.phase {
            // What follows a Connect waits until that is decided.
            Phase::Admitting(..) => return Ok(()),
            Phase::Refused | Phase::Ended => {
                link.consume(link.input().len());
                return Ok(());
            }
            Phase::Accepted | Phase::Agreed | Phase::Serving(_) => {}
        }
        let Some(mut incoming) = self.incoming.take() else {
            return self.take_header(link);
        };
        match (incoming.buffer.take(), link.input().first_chunk::<DIGEST>()) {
            (Some(buffer), Some(digest)) => {
                let sound = crc32c::crc32c(&buffer[incoming.at.clone()]).to_le_bytes() == *digest;
                link.consume(DIGEST);
                self.complete(incoming, buffer, sound, link)
            }
            (buffer, _) => {
                incoming.buffer = buffer;
                self.incoming = Some(incoming);
                Ok(())
            }
        }
    }

    fn filled(&mut self, buffer: Buffer, link: &mut Link) -> Result<(), End> {
        match self.incoming.take() {
            Some(mut incoming) if incoming.digest => {
                incoming.buffer = Some(buffer);
                self.incoming = Some(incoming);
                Ok(())
            }
            Some(incoming) => self.complete(incoming, buffer, true, link),
            None => Ok(()),
        }
    }

    fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        let Phase::Serving(serving) = &mut self.phase else {
            return Ok(());
        };
        let done = serving.done(tag, outcome, link);
        self.look_whose();
        done
    }

    fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        if self.place.as_ref().is_some_and(Place::wanted) {
            return Err(End::Protocol("closed to make room for newer connections"));
        }
        if let Phase::Serving(serving) = &mut self.phase {
            return serving.woken(link);
        }
        if link.now() >= self.until {
            return Err(End::Late("Connect"));
        }
        if let Phase::Admitting(_, look) = &self.phase
            && *look <= link.now()
            && let Phase::Admitting(attempt, _) = std::mem::replace(&mut self.phase, Phase::Ended)
        {
            return self.admit(attempt, link);
        }
        Ok(())
    }

    fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Accepted | Phase::Agreed | Phase::Refused => Some(self.until),
            Phase::Admitting(_, look) => Some(self.until.min(*look)),
            Phase::Serving(serving) => serving.deadline(),
            Phase::Ended => None,
        }
    }

    fn ended(&mut self, end: &End) {
        match end {
            End::Late(_) if self.peer.may_log("late") => {
                tracing::warn!(peer = %self.peer.address, reason = %end, "connection ended");
            }
            _ => tracing::debug!(peer = %self.peer.address, reason = %end, "connection ended"),
        }
        if let Phase::Serving(serving) = &self.phase {
            serving.ended();
        }
        self.phase = Phase::Ended;
        (self.place, self.counted) = (None, None);
    }
}
