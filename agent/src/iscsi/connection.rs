//! One TCP connection: from its first byte to its end.
//!
//! ```text
//!   accepted ── login steps ──► admitting ──► serving ──► ended
//!       └───────────── 10 s ────────┬──┘
//!                                   └──► refused (closed behind the response)
//! ```
//!
//! It takes PDUs out of the stream: a header when all of it has come, data
//! straight into the memory of the command that it is for. What is done with
//! them is [`login`](super::login)'s and `serving`'s.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::login::{self, Agreed, Login, Purpose, Random, Status};
use super::metrics::{Counting, Metrics};
use super::serving::{Into, Refusal, Serving};
use super::target::{self, Directory};
use super::task::{PLACES, Slot, WINDOW};
use super::voice::Voice;
use super::wire::answer::Answer;
use super::wire::{
    BHS, DEFAULT_MAX_DATA, DIGEST, Digests, Flaw, Frame, Header, LoginRequest, Opcode,
};
use crate::reactor::{Buffer, End, Link, Outcome, Place, Protocol, Tag};

/// From accept to the end of the login.
pub const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long a login waits for the commands of the session before it, ahead of
/// being answered that the service is unavailable.
const TAKEOVER_WAIT: Duration = Duration::from_secs(1);
/// How often it is looked whether they have settled.
const LOOK: Duration = Duration::from_millis(2);

/// What all connections have in common.
pub struct Shared {
    /// What is served.
    pub directory: Arc<dyn Directory>,
    /// Where it is counted.
    pub metrics: Metrics,
    /// How long a connection may take until it has logged in.
    pub handshake: Duration,
    /// Makes what CHAP challenges with.
    pub random: Random,
}

impl Shared {
    /// What connections to these targets have in common.
    pub fn new(directory: Arc<dyn Directory>, metrics: Metrics) -> Arc<Self> {
        Self::with_handshake(directory, metrics, HANDSHAKE)
    }

    /// The same, with so much time until a connection has logged in.
    pub fn with_handshake(
        directory: Arc<dyn Directory>,
        metrics: Metrics,
        handshake: Duration,
    ) -> Arc<Self> {
        Arc::new(Self {
            directory,
            metrics,
            handshake,
            random: challenge,
        })
    }
}

fn challenge() -> Option<(u8, [u8; super::chap::CHALLENGE])> {
    let (mut identifier, mut challenge) = ([0], [0; super::chap::CHALLENGE]);
    getrandom::fill(&mut identifier).ok()?;
    getrandom::fill(&mut challenge).ok()?;
    Some((identifier[0], challenge))
}

/// One connection, as the reactor sees it.
pub struct Iscsi {
    shared: Arc<Shared>,
    peer: SocketAddr,
    portal: SocketAddr,
    phase: Phase,
    incoming: Option<Incoming>,
    /// Its place among those that have not logged in to a target.
    place: Option<Place>,
    /// Until when the login must have ended.
    until: Instant,
    _counted: Counting,
}

enum Phase {
    /// In its login; none before the first request.
    Login(Box<Login>, Option<Voice>),
    /// Agreed on everything; the session before has not settled.
    Admitting(Box<Admitting>),
    Serving(Box<Serving>),
    Ended,
}

/// A login whose last response waits.
struct Admitting {
    request: LoginRequest,
    reply: login::Reply,
    agreed: Agreed,
    voice: Voice,
    until: Instant,
    /// When to look again.
    look: Instant,
}

/// A PDU whose data is being received.
struct Incoming {
    header: Header,
    frame: Frame,
    goes: Goes,
    at: Range<usize>,
    /// The data, when only what is behind it is missing.
    buffer: Option<Buffer>,
}

enum Goes {
    Task(Slot),
    Beside(Slot, Range<usize>),
    Whole,
    Nowhere,
}

impl Iscsi {
    /// A connection that `peer` made to `portal` now.
    pub fn new(
        shared: Arc<Shared>,
        peer: SocketAddr,
        portal: SocketAddr,
        place: Option<Place>,
        now: Instant,
    ) -> Self {
        let login = Box::new(Login::new(shared.random));
        Self {
            until: now + shared.handshake,
            _counted: shared.metrics.connection(),
            shared,
            peer,
            portal,
            phase: Phase::Login(login, None),
            incoming: None,
            place,
        }
    }

    /// Says what is wrong with a PDU. Returns the connection's end, unless it goes on.
    fn reject(&mut self, flaw: Flaw, header: &Header, link: &mut Link) -> Result<(), End> {
        self.say_reject(flaw, header, link);
        if flaw.survivable() && matches!(self.phase, Phase::Serving(_)) {
            return Ok(());
        }
        Err(End::Protocol("malformed PDU"))
    }

    fn say_reject(&mut self, flaw: Flaw, header: &Header, link: &mut Link) {
        if self.shared.metrics.malformed(self.peer.ip(), flaw) {
            tracing::warn!(peer = %self.peer, reason = %flaw, "a PDU was rejected");
        }
        match &mut self.phase {
            // Nothing in a header that was damaged says what to answer to (RFC 7143, 7.8).
            Phase::Serving(_) if flaw == Flaw::HeaderDigest => {}
            Phase::Serving(serving) => serving.say_reject(flaw, header, link),
            _ => {
                let status = match flaw {
                    Flaw::Phase => Status::INVALID_DURING_LOGIN,
                    _ => Status::INITIATOR_ERROR,
                };
                self.refuse_login(&LoginRequest::decode(header), status, link);
            }
        }
    }

    fn refused(&mut self, refusal: Refusal, header: &Header, link: &mut Link) -> Result<(), End> {
        match refusal {
            Refusal::Flaw(flaw) => self.reject(flaw, header, link),
            Refusal::End(end) => Err(end),
            Refusal::Task(flaw, slot) => {
                self.say_reject(flaw, header, link);
                match &mut self.phase {
                    Phase::Serving(serving) => serving.give_up(header, slot, flaw, link),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Takes a header, when all of it has come.
    fn take_header(&mut self, link: &mut Link) -> Result<(), End> {
        let Some(bytes) = link.input().first_chunk::<BHS>() else {
            return Ok(());
        };
        let header = Header::new(*bytes);
        let (digests, most) = match &self.phase {
            Phase::Serving(serving) => serving.limits(),
            _ => (Digests::default(), DEFAULT_MAX_DATA),
        };
        let frame = match header.frame(digests, most) {
            Ok(frame) => frame,
            Err(flaw) => return self.reject(flaw, &header, link),
        };
        let Some(head) = link.input().get(..frame.head()) else {
            return Ok(());
        };
        let (signed, digest) = head.split_at(BHS + frame.ahs);
        let sound = !frame.header_digest || digest == crc32c::crc32c(signed).to_le_bytes();
        link.consume(frame.head());
        if !sound {
            return self.reject(Flaw::HeaderDigest, &header, link);
        }
        let goes = match &mut self.phase {
            Phase::Serving(serving) => serving.header(&header, &frame, link),
            _ if header.opcode() == Ok(Opcode::Login) => Ok(Into::Whole),
            _ => Err(Refusal::Flaw(Flaw::Phase)),
        };
        let goes = match goes {
            Ok(goes) => goes,
            Err(refusal) => {
                self.refused(refusal, &header, link)?;
                Into::Nowhere
            }
        };
        self.expect(header, frame, goes, link)
    }

    fn expect(
        &mut self,
        header: Header,
        frame: Frame,
        goes: Into,
        link: &mut Link,
    ) -> Result<(), End> {
        let length = frame.data;
        let (goes, buffer, at) = match goes {
            Into::Task(slot, buffer, at) => (Goes::Task(slot), buffer, at),
            Into::Beside(slot, buffer, at) => (Goes::Beside(slot, at), buffer, 0..length),
            Into::Whole => (Goes::Whole, link.unsolicited(length), 0..length),
            Into::Nowhere if length == 0 => return Ok(()),
            Into::Nowhere => (Goes::Nowhere, link.unsolicited(length), 0..length),
        };
        let mut incoming = Incoming {
            header,
            frame,
            goes,
            at: at.clone(),
            buffer: None,
        };
        if length == 0 {
            incoming.buffer = Some(buffer);
            self.incoming = Some(incoming);
            return self.take_trailer(link);
        }
        self.incoming = Some(incoming);
        link.fill(buffer, at);
        Ok(())
    }

    /// Takes what follows a PDU's data, when all of it has come.
    fn take_trailer(&mut self, link: &mut Link) -> Result<(), End> {
        let Some(incoming) = &self.incoming else {
            return Ok(());
        };
        let frame = incoming.frame;
        let Some(trailer) = link.input().get(..frame.trailer()) else {
            return Ok(());
        };
        let (padding, digest) = trailer.split_at(frame.padding());
        let data = incoming
            .buffer
            .as_ref()
            .map_or(&[][..], |buffer| &buffer[incoming.at.clone()]);
        let sound = digest.len() != DIGEST
            || digest == crc32c::crc32c_append(crc32c::crc32c(data), padding).to_le_bytes();
        link.consume(frame.trailer());
        let Some(Incoming {
            header,
            goes,
            at,
            buffer: Some(buffer),
            ..
        }) = self.incoming.take()
        else {
            return Ok(());
        };
        if !sound {
            return self.reject(Flaw::DataDigest, &header, link);
        }
        match (goes, &mut self.phase) {
            (Goes::Task(slot), Phase::Serving(serving)) => {
                serving.arrived(&header, slot, buffer, at, false, link)
            }
            (Goes::Beside(slot, at), Phase::Serving(serving)) => {
                serving.arrived(&header, slot, buffer, at, true, link)
            }
            (Goes::Whole, Phase::Serving(serving)) => {
                let taken = serving.whole(&header, &buffer[at], link);
                link.recycle(buffer);
                match taken {
                    Ok(()) => Ok(()),
                    Err(refusal) => self.refused(refusal, &header, link),
                }
            }
            (Goes::Whole, Phase::Login(..)) => {
                let taken = self.login(&header, &buffer[at], link);
                link.recycle(buffer);
                taken
            }
            _ => {
                link.recycle(buffer);
                Ok(())
            }
        }
    }

    fn login(&mut self, header: &Header, data: &[u8], link: &mut Link) -> Result<(), End> {
        let request = LoginRequest::decode(header);
        let Phase::Login(login, voice) = &mut self.phase else {
            return Err(End::Protocol("a login request out of place"));
        };
        let voice = voice
            .get_or_insert_with(|| Voice::new(request.command_number, WINDOW, DEFAULT_MAX_DATA));
        let mut reply = match login.step(&request, data, &*self.shared.directory) {
            Ok(reply) => reply,
            Err(status) => {
                self.refuse_login(&request, status, link);
                return Err(End::Protocol("the login was refused"));
            }
        };
        let Some(agreed) = reply.agreed.take() else {
            let answer = Answer::login(&reply.answer, voice.counted());
            voice.say(link, answer, &reply.text);
            return Ok(());
        };
        let admitting = Admitting {
            request,
            reply,
            agreed,
            voice: *voice,
            until: link.now() + TAKEOVER_WAIT,
            look: link.now(),
        };
        self.phase = Phase::Admitting(Box::new(admitting));
        self.admit(link)
    }

    /// Admits the session that was agreed on, if that can be by now.
    fn admit(&mut self, link: &mut Link) -> Result<(), End> {
        let Phase::Admitting(admitting) = &mut self.phase else {
            return Ok(());
        };
        let nexus = admitting.agreed.nexus.clone();
        let admitted = match &admitting.agreed.purpose {
            Purpose::Discovery => Ok(None),
            Purpose::Normal(target) => target.admit(nexus, link.waker()).map(Some),
        };
        let session = match admitted {
            Ok(session) => session,
            Err(target::Refusal::Busy) if link.now() < admitting.until => {
                admitting.look = link.now() + LOOK;
                return Ok(());
            }
            Err(refusal) => {
                let status = match refusal {
                    target::Refusal::Busy => Status::UNAVAILABLE,
                    target::Refusal::Full => Status::OUT_OF_RESOURCES,
                    target::Refusal::Closed => Status::REMOVED,
                };
                let request = admitting.request;
                self.refuse_login(&request, status, link);
                return Err(End::Protocol("the login was refused"));
            }
        };
        let phase = std::mem::replace(&mut self.phase, Phase::Ended);
        let Phase::Admitting(admitting) = phase else {
            return Ok(());
        };
        let Admitting {
            mut reply,
            agreed,
            mut voice,
            ..
        } = *admitting;
        // A discovery session has a handle too, which nobody asks for.
        reply.answer.tsih = session.as_ref().map_or(1, |session| session.tsih());
        let answer = Answer::login(&reply.answer, voice.counted());
        voice.say(link, answer, &reply.text);
        if let Some(session) = &session {
            let unit = session.target().unit().identity().uuid;
            let metrics = &self.shared.metrics;
            if metrics.may_log(self.peer.ip(), "session", Some(unit)) {
                tracing::info!(
                    peer = %self.peer, target = session.target().name(),
                    initiator = agreed.nexus.initiator, tsih = session.tsih(), "session"
                );
            }
        }
        if session.is_some() {
            // Anybody may discover.
            self.place = None;
        }
        let shared = Arc::clone(&self.shared);
        let place = (self.peer, self.portal);
        link.make_room(PLACES);
        let serving = Serving::new(shared, voice, &agreed, session, place, link.now());
        self.phase = Phase::Serving(Box::new(serving));
        Ok(())
    }

    fn refuse_login(&mut self, request: &LoginRequest, status: Status, link: &mut Link) {
        let reason = status.name();
        if self.shared.metrics.refused(self.peer.ip(), reason) {
            tracing::warn!(peer = %self.peer, reason, "a login was refused");
        }
        let mut voice = match &self.phase {
            Phase::Login(_, Some(voice)) => *voice,
            Phase::Admitting(admitting) => admitting.voice,
            _ => Voice::new(request.command_number, WINDOW, DEFAULT_MAX_DATA),
        };
        let answer = login::refusal(request, status);
        let answer = Answer::login(&answer, voice.counted());
        voice.say(link, answer, &[]);
    }

    /// What may have happened without the peer.
    fn look(&mut self, link: &mut Link) -> Result<(), End> {
        if self.place.as_ref().is_some_and(Place::wanted) {
            return Err(End::Protocol("closed to make room for newer connections"));
        }
        match &mut self.phase {
            Phase::Serving(serving) => serving.woken(link),
            _ if link.now() >= self.until => Err(End::Late("the login")),
            Phase::Admitting(_) => self.admit(link),
            _ => Ok(()),
        }
    }
}

impl Protocol for Iscsi {
    fn received(&mut self, link: &mut Link) -> Result<(), End> {
        if self.incoming.is_some() {
            return self.take_trailer(link);
        }
        match &self.phase {
            // What comes behind the last request is of the full feature phase.
            Phase::Admitting(_) | Phase::Ended => Ok(()),
            Phase::Login(..) | Phase::Serving(_) => self.take_header(link),
        }
    }

    fn filled(&mut self, buffer: Buffer, link: &mut Link) -> Result<(), End> {
        if let Some(incoming) = &mut self.incoming {
            incoming.buffer = Some(buffer);
        }
        self.take_trailer(link)
    }

    fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        match &mut self.phase {
            Phase::Serving(serving) => serving.done(tag, outcome, link),
            _ => Ok(()),
        }
    }

    fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        self.look(link)
    }

    fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Login(..) => Some(self.until),
            Phase::Admitting(admitting) => Some(self.until.min(admitting.look)),
            Phase::Serving(serving) => serving.deadline(),
            Phase::Ended => None,
        }
    }

    fn ended(&mut self, end: &End) {
        tracing::debug!(peer = %self.peer, reason = %end, "connection ended");
        if let Phase::Serving(serving) = &mut self.phase {
            serving.ended();
        }
        self.place = None;
        self.phase = Phase::Ended;
    }
}
