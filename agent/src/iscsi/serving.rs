//! A session in its full feature phase: what it is sent, and what it answers.
//!
//! Commands and their data are [`transfer`](super::transfer)'s, task management
//! [`management`](super::management)'s. Here is the rest: numbers, pings,
//! texts, logout, and what the export and other sessions leave for this one.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::Shared;
use super::exchange::{Asker, Exchange, Request};
use super::login::Agreed;
use super::management::Pending;
use super::metrics::{Counting, Hot};
use super::negotiate::Parameters;
use super::scsi::sense::Sense;
use super::session::Seat;
use super::target::Counted;
use super::task::{PLACES, Slot, Tasks};
use super::voice::Voice;
use super::wire::answer::Answer;
use super::wire::{Flaw, Frame, Header, NO_TAG, Opcode, TaskManagement};
use crate::reactor::{Buffer, End, Link};

/// An initiator that says nothing for this long is asked whether it is there.
const PING: Duration = Duration::from_secs(30);
/// It is given this long for its answer, …
const PONG: Duration = Duration::from_secs(30);
/// … and for data that it was asked for.
pub const DATA_STALLED: Duration = Duration::from_secs(60);
/// Why a connection ends whose session did.
pub const ENDED: &str = "the session has ended";
/// How often it is looked whether aborted commands have settled.
pub const LOOK: Duration = Duration::from_millis(2);

/// Where a PDU's data goes.
pub enum Into {
    /// To a part of this task's data, which was taken out for it.
    Task(Slot, Buffer, Range<usize>),
    /// To a buffer of its own, and from there as much as fits to that part of
    /// the task's data.
    Beside(Slot, Buffer, Range<usize>),
    /// To a buffer of its own.
    Whole,
    /// Nowhere: it is only read.
    Nowhere,
}

/// Why a PDU ends the connection, or is only answered.
pub enum Refusal {
    /// It is rejected.
    Flaw(Flaw),
    /// It is rejected, and the command that it is for ends with it.
    Task(Flaw, Slot),
    /// The connection ends.
    End(End),
}

impl From<Flaw> for Refusal {
    fn from(flaw: Flaw) -> Self {
        Self::Flaw(flaw)
    }
}

/// One session's connection.
pub struct Serving {
    pub(super) shared: Arc<Shared>,
    pub(super) voice: Voice,
    pub(super) parameters: Parameters,
    /// None in a discovery session.
    pub(super) session: Option<Seat>,
    pub(super) tasks: Tasks,
    /// Tasks that wait for a buffer, the longest waiting first.
    pub(super) hungry: VecDeque<Slot>,
    pub(super) hot: Hot,
    pub(super) pending: Vec<Pending>,
    /// Aborts that other sessions asked for and that have come about.
    pub(super) aborts: u64,
    /// When the longest wait for asked data ends the connection.
    pub(super) data_due: Option<Instant>,
    /// When to look again whether aborted commands have settled.
    pub(super) look: Option<Instant>,
    initiator: String,
    /// Its id in the session, which has no other.
    connection: u16,
    /// Where the initiator is.
    pub(super) peer: SocketAddr,
    /// Where it connected to.
    portal: SocketAddr,
    exchange: Exchange,
    heard: Instant,
    pinged: bool,
    said_gone: bool,
    _counted: Option<(Counted, Counting)>,
}

impl Serving {
    /// A session that was agreed on and, if it is a normal one, admitted. The
    /// initiator, at the first address, connected to the second.
    pub fn new(
        shared: Arc<Shared>,
        mut voice: Voice,
        agreed: &Agreed,
        session: Option<Seat>,
        (peer, portal): (SocketAddr, SocketAddr),
        now: Instant,
    ) -> Self {
        voice.digests = agreed.parameters.digests;
        voice.max_send = agreed.parameters.max_send;
        let counted = session
            .as_ref()
            .map(|session| (session.target().count(), shared.metrics.session()));
        Self {
            hot: shared.metrics.hot(),
            shared,
            voice,
            parameters: agreed.parameters,
            session,
            tasks: Tasks::new(),
            hungry: VecDeque::with_capacity(PLACES),
            pending: Vec::new(),
            aborts: 0,
            data_due: None,
            look: None,
            initiator: agreed.nexus.initiator.clone(),
            connection: agreed.connection,
            peer,
            portal,
            exchange: Exchange::default(),
            heard: now,
            pinged: false,
            said_gone: false,
            _counted: counted,
        }
    }

    /// The digests and the most data of what is received.
    pub fn limits(&self) -> (super::wire::Digests, usize) {
        (self.voice.digests, self.parameters.max_receive)
    }

    /// A PDU's header has come; says where its data is to go. A command is
    /// begun here, so that its data can go straight to its place.
    pub fn header(
        &mut self,
        header: &Header,
        frame: &Frame,
        link: &mut Link,
    ) -> Result<Into, Refusal> {
        self.heard = link.now();
        self.pinged = false;
        let opcode = header.opcode()?;
        match opcode {
            Opcode::ScsiCommand => self.command(header, frame, link),
            Opcode::DataOut => self.data_out(header, frame, link),
            Opcode::NopOut | Opcode::TaskManagement | Opcode::Text | Opcode::Logout => {
                Ok(Into::Whole)
            }
            Opcode::Snack => Err(Flaw::Snack.into()),
            Opcode::Login => Err(Flaw::Phase.into()),
        }
    }

    /// Takes a PDU's number: false, when it is to be ignored.
    ///
    /// # Errors
    /// A number that leaves some out: on one connection they never come.
    pub(super) fn number(&mut self, header: &Header) -> Result<bool, Flaw> {
        if header.immediate() {
            return Ok(true);
        }
        match self.voice.ahead(header.command_number()) {
            None => Ok(false),
            Some(0) => {
                self.voice.took();
                Ok(true)
            }
            Some(_) => Err(Flaw::Order),
        }
    }

    /// A PDU that has no place for its data has come whole.
    pub fn whole(&mut self, header: &Header, data: &[u8], link: &mut Link) -> Result<(), Refusal> {
        if !matches!(header.opcode()?, Opcode::ScsiCommand | Opcode::DataOut) {
            // A ping's answer has no task, and no number either.
            let numbered = !header.immediate();
            let is_answer = header.opcode() == Ok(Opcode::NopOut) && header.task() == NO_TAG;
            if is_answer {
                return Ok(());
            }
            if !self.number(header)? {
                return Ok(());
            }
            if numbered {
                self.voice.room();
            }
        }
        match header.opcode()? {
            Opcode::NopOut => {
                let numbers = self.voice.counted();
                let answer = Answer::nop_in(header.task(), NO_TAG, header.lun(), numbers);
                let most = data.len().min(self.voice.max_send);
                self.voice.say(link, answer, &data[..most]);
                Ok(())
            }
            Opcode::Text => self.text(header, data, link),
            Opcode::Logout => self.logout(header, link),
            Opcode::TaskManagement => {
                self.manage(header.task(), &TaskManagement::decode(header), link)
            }
            _ => Ok(()),
        }
    }

    fn text(&mut self, header: &Header, data: &[u8], link: &mut Link) -> Result<(), Refusal> {
        let asker = Asker {
            directory: &*self.shared.directory,
            initiator: &self.initiator,
            target: self.session.as_ref().map(|session| session.target().name()),
            portal: self.portal,
        };
        let request = Request {
            tag: header.word(20),
            goes_on: header.flags() & 0x40 != 0,
            is_final: header.is_final(),
            data,
        };
        let part = self.exchange.take(&request, &asker, &mut self.parameters)?;
        self.voice.max_send = self.parameters.max_send;
        let numbers = self.voice.counted();
        let answer = Answer::text(header.task(), part.tag, part.goes_on, header.lun(), numbers);
        self.voice.say(link, answer, &part.text);
        Ok(())
    }

    fn logout(&mut self, header: &Header, link: &mut Link) -> Result<(), Refusal> {
        let [high, low, ..] = header.word(20).to_be_bytes();
        let mine = u16::from_be_bytes([high, low]) == self.connection;
        // 2 would be to recover the connection, which level 0 does not.
        let (response, ends) = match header.flags() & 0x7f {
            0 => (0, true),
            1 if mine => (0, true),
            1 => (1, false),
            2 => (2, false),
            _ => return Err(Flaw::Field.into()),
        };
        let numbers = self.voice.counted();
        let answer = Answer::logout(header.task(), response, numbers);
        self.voice.say(link, answer, &[]);
        if ends {
            return Err(Refusal::End(End::Protocol("the initiator logged out")));
        }
        Ok(())
    }

    /// Looks at everything that may have happened elsewhere.
    pub fn woken(&mut self, link: &mut Link) -> Result<(), End> {
        let now = link.now();
        if let Some(session) = self.session.clone() {
            if session.has_ended() {
                return Err(End::Protocol(ENDED));
            }
            if session.target().is_gone() && !self.said_gone {
                self.said_gone = true;
                self.answer_all_conflict(link);
            }
            let asked = session.aborts_asked();
            if asked > self.aborts {
                self.aborts = asked;
                self.abort_all(link);
            }
            if session.take_resized() {
                self.say_event(Sense::CAPACITY_CHANGED, link);
            }
        }
        self.settle_pending(link)?;
        self.feed(link)?;
        if self.data_due.is_some_and(|due| due <= now) {
            self.look_for_stalled(now)?;
        }
        if now >= self.heard + PING + PONG {
            return Err(End::Late("the answer to a ping"));
        }
        if now >= self.heard + PING && !self.pinged {
            self.pinged = true;
            let answer = Answer::nop_in(NO_TAG, 1, 0, self.voice.numbers());
            self.voice.say(link, answer, &[]);
        }
        Ok(())
    }

    /// Refuses a PDU: its header goes back (RFC 7143, 11.17).
    pub fn say_reject(&mut self, flaw: Flaw, header: &Header, link: &mut Link) {
        let answer = Answer::reject(flaw.reject(), self.voice.counted());
        self.voice.say(link, answer, header.bytes());
    }

    /// An event for who sends no commands (RFC 7143, 11.9).
    fn say_event(&mut self, sense: Sense, link: &mut Link) {
        let (bytes, length) = self.encode_sense(sense);
        let answer = Answer::scsi_event(0, self.voice.counted());
        self.voice.say(link, answer, &bytes[..length]);
    }

    /// When it wants to be woken.
    pub fn deadline(&self) -> Option<Instant> {
        let ping = self.heard + if self.pinged { PING + PONG } else { PING };
        [Some(ping), self.data_due, self.look]
            .into_iter()
            .flatten()
            .min()
    }

    /// The connection has ended.
    pub fn ended(&mut self) {
        if let Some(session) = &self.session {
            session.target().unit().leave(session);
        }
    }
}
