//! What a command is, whether it may be carried out, and how it is answered.

use super::scsi::command::Command;
use super::scsi::inquiry;
use super::scsi::opcodes::{self, Kind};
use super::scsi::reservation::Refused;
use super::scsi::sense::{LONGEST, Sense, Status};
use super::serving::Serving;
use super::session::Seat;
use super::task::{BLOCK_BYTES, Task};
use super::wire::ScsiCommand;
use super::wire::answer::{Answer, DataIn, Residual};
use crate::block::DeviceError;
use crate::reactor::{Failed, Link};

/// How a command ends.
#[derive(Debug, Clone)]
pub enum Ending {
    /// It did what it was to do.
    Good,
    /// It is refused.
    Refused(Refused),
    /// Data, at most so many bytes of it.
    Data(Vec<u8>, u32),
}

impl From<Sense> for Ending {
    fn from(sense: Sense) -> Self {
        Self::Refused(sense.into())
    }
}

/// A command that may be carried out.
pub struct Judged {
    /// What it is.
    pub kind: Kind,
    /// Its parameters, cut to what the initiator transfers.
    pub command: Command,
    /// Bytes that are transferred.
    pub wanted: u32,
    /// Bytes that the command itself would transfer.
    pub natural: u64,
}

/// What an answer needs of a task.
pub struct Answered {
    tag: u32,
    kind: Option<Kind>,
    reads: bool,
    expected: u32,
    natural: u64,
    moved: u32,
    sent: u32,
}

impl Answered {
    /// Of a command that was not taken in.
    pub fn unstarted(
        tag: u32,
        (kind, natural): (Option<Kind>, u64),
        request: &ScsiCommand,
    ) -> Self {
        Self {
            tag,
            kind,
            reads: request.reads,
            expected: request.length,
            natural,
            moved: 0,
            sent: 0,
        }
    }

    /// Of a task.
    pub fn of(task: &Task) -> Self {
        Self {
            tag: task.tag,
            kind: Some(task.kind),
            reads: task.reads,
            expected: task.expected,
            natural: task.natural,
            moved: task.wanted,
            sent: task.sent,
        }
    }
}

/// Whether a LUN field names LUN 0 (SAM-5, 4.7: peripheral or flat addressing).
pub fn is_the_unit(lun: u64) -> bool {
    lun == 0 || lun == 0x4000 << 48
}

/// Why a command may not be carried out: how it ends, what it is, if that is
/// known, and the bytes that it would transfer.
pub type Unjudged = (Ending, (Option<Kind>, u64));

/// Whether a command may be carried out, in the order that SAM-5 and SPC-4
/// say: a unit attention before a reservation, and before what the CDB says.
pub fn judge(session: &Seat, lun: u64, request: &ScsiCommand) -> Result<Judged, Unjudged> {
    let form = opcodes::form(&request.cdb);
    let kind = form.as_ref().ok().map(|form| form.kind);
    let ends = |ending: Ending| Err((ending, (kind, 0)));
    let unit = session.target().unit();
    let heedless = matches!(
        kind,
        Some(Kind::Inquiry | Kind::ReportLuns | Kind::RequestSense)
    );
    if session.target().gate().is_closed() && !heedless {
        // Entering counts it as late.
        drop(session.target().gate().enter());
        return ends(Ending::Refused(Refused::Conflict));
    }
    if !heedless && let Some(attention) = session.take_attention() {
        return ends(attention.into());
    }
    if request.attribute != ScsiCommand::UNTAGGED
        && request.attribute != ScsiCommand::SIMPLE
        && request.attribute != ScsiCommand::HEAD_OF_QUEUE
    {
        return ends(Sense::ATTRIBUTE.into());
    }
    let blocks = unit.blocks();
    let command =
        form.and_then(|form| Ok((form.kind, Command::decode(form, &request.cdb, blocks)?)));
    if !is_the_unit(lun) {
        return ends(elsewhere(command.map(|(_, command)| command)));
    }
    let (kind, mut command) = match command {
        Ok(decoded) => decoded,
        Err(sense) => return ends(sense.into()),
    };
    let natural = match command {
        Command::Read { range, .. } => range.bytes(),
        other => other.data_out(),
    };
    let ends = |ending: Ending| Err((ending, (Some(kind), natural)));
    if !unit.reservations.allow(session, &command) {
        return ends(Ending::Refused(Refused::Conflict));
    }
    if command.writes()
        && let Some(sense) = unit.write_protected()
    {
        return ends(sense.into());
    }
    // Data that goes the other way, or none, is not what the command takes.
    if command.data_out() > 0 && request.length > 0 && !request.writes {
        return ends(Sense::DATA_LENGTH.into());
    }
    let expected = match command {
        // GOOD and no data: libiscsi's suite asks for it.
        Command::Read { .. } if !request.reads => 0,
        _ => request.length,
    };
    let wanted = u32::try_from(natural).unwrap_or(u32::MAX).min(expected);
    match &mut command {
        // As many bytes as its count of blocks says, for each of its halves.
        Command::CompareAndWrite { .. } if u64::from(request.length) != natural => {
            return ends(Sense::cdb(13).into());
        }
        Command::WriteSame { .. } if u64::from(request.length) != natural => {
            return ends(Sense::DATA_LENGTH.into());
        }
        Command::Write { range, .. }
        | Command::OrWrite { range, .. }
        | Command::WriteAndVerify { range, .. }
        | Command::Verify {
            range,
            compare: true,
        } => range.blocks = wanted.div_ceil(BLOCK_BYTES),
        _ => {}
    }
    Ok(Judged {
        kind,
        command,
        wanted,
        natural,
    })
}

/// What LUNs answer that have nothing behind them (SPC-4, 6.6.1).
fn elsewhere(command: Result<Command, Sense>) -> Ending {
    match command {
        Ok(Command::Inquiry {
            page: None,
            allocation,
        }) => Ending::Data(inquiry::absent(), allocation),
        Ok(Command::ReportLuns { select, allocation }) => {
            Ending::Data(inquiry::luns(select), allocation)
        }
        Ok(Command::RequestSense {
            descriptor,
            allocation,
        }) => {
            let (bytes, length) = Sense::NO_UNIT.encode(descriptor);
            Ending::Data(bytes[..length].to_vec(), allocation)
        }
        _ => Sense::NO_UNIT.into(),
    }
}

/// The sense of a device call that failed.
pub fn sense_of(failed: &Failed, writes: bool) -> Sense {
    match failed {
        Failed::Miscompare { at } => Sense::miscompare(*at),
        Failed::Other(_) | Failed::Closed | Failed::Device(DeviceError::FlushFailed(_)) => {
            Sense::TARGET_FAILURE
        }
        Failed::Device(DeviceError::OutOfRange { .. }) => Sense::LBA_RANGE,
        Failed::Device(DeviceError::NoSpace) => Sense::SPACE_ALLOCATION,
        Failed::Device(DeviceError::Io { .. }) if writes => Sense::WRITE_ERROR,
        Failed::Device(DeviceError::Io { .. }) => Sense::READ_ERROR,
    }
}

/// The name of a device call's failure in the log's limits.
fn reason_of(failed: &Failed) -> &'static str {
    match failed {
        Failed::Miscompare { .. } => "miscompare",
        Failed::Closed => "gate-closed",
        Failed::Other(_) => "not-kept",
        Failed::Device(DeviceError::FlushFailed(_)) => "flush-failed",
        Failed::Device(DeviceError::OutOfRange { .. }) => "out-of-range",
        Failed::Device(DeviceError::NoSpace) => "no-space",
        Failed::Device(DeviceError::Io { .. }) => "io",
    }
}

impl Serving {
    /// Logs that a device call failed. Data that differs is no failure.
    pub(super) fn log_failure(&self, kind: Kind, failed: &Failed) {
        let Some(session) = &self.session else {
            return;
        };
        let (peer, unit) = (self.peer.ip(), session.target().unit().identity().uuid);
        let differs = matches!(failed, Failed::Miscompare { .. });
        if !differs && (self.shared.metrics).may_log(peer, reason_of(failed), Some(unit)) {
            tracing::warn!(
                %peer, target = session.target().name(), command = kind.name(), %failed,
                "a command failed"
            );
        }
    }

    /// Answers a command, whose room was given back before.
    pub(super) fn answer(&mut self, answered: &Answered, ending: Ending, link: &mut Link) {
        let (status, sense) = match ending {
            Ending::Data(data, allocation) => {
                return self.answer_data(answered, &data, allocation, link);
            }
            Ending::Good => (Status::Good, None),
            Ending::Refused(Refused::Conflict) => (Status::ReservationConflict, None),
            Ending::Refused(Refused::Sense(sense)) => (Status::CheckCondition, Some(sense)),
        };
        match (answered.kind, status) {
            (Some(Kind::Write), Status::Good) => self.hot.written(answered.moved),
            (kind, status) => self.shared.metrics.command(kind, status),
        }
        if status == Status::ReservationConflict {
            self.note_late();
        }
        // What is short or over is told where data counts; sense data says the rest.
        let residual = match sense {
            None if status == Status::Good => Residual::of(answered.expected, answered.natural),
            Some(Sense::DATA_LENGTH) => Residual::of(answered.expected, answered.natural),
            _ => Residual::None,
        };
        let numbers = self.voice.counted();
        let answer =
            Answer::scsi(answered.tag, status.code(), residual, numbers).data_count(answered.sent);
        match sense {
            Some(sense) => {
                let (bytes, length) = self.encode_sense(sense);
                self.voice.say(link, answer, &bytes[..length]);
            }
            None => self.voice.say(link, answer, &[]),
        }
    }

    /// Notes a conflict that a fence is the reason of.
    fn note_late(&self) {
        if let Some(session) = &self.session
            && session.target().gate().is_closed()
        {
            self.shared.metrics.late();
            if session.target().is_gone() {
                session.note_end_known();
            }
        }
    }

    /// Sense data as an answer carries it: its length, then itself (RFC 7143,
    /// 11.4.7.2).
    pub(super) fn encode_sense(&self, sense: Sense) -> ([u8; 2 + LONGEST], usize) {
        let unit = self.session.as_ref().map(|session| session.target().unit());
        let descriptor = unit.is_some_and(|unit| unit.settings().descriptor_sense);
        let (bytes, length) = sense.encode(descriptor);
        let mut data = [0; 2 + LONGEST];
        data[1] = u8::try_from(length).unwrap_or_default();
        data[2..].copy_from_slice(&bytes);
        (data, 2 + length)
    }

    fn answer_data(&mut self, answered: &Answered, data: &[u8], allocation: u32, link: &mut Link) {
        let length = u32::try_from(data.len())
            .unwrap_or(u32::MAX)
            .min(allocation);
        let sent = if answered.reads {
            length.min(answered.expected)
        } else {
            0
        };
        let residual = Residual::of(answered.expected, length.into());
        self.shared.metrics.command(answered.kind, Status::Good);
        if sent == 0 {
            let numbers = self.voice.counted();
            let answer = Answer::scsi(answered.tag, Status::Good.code(), residual, numbers);
            self.voice.say(link, answer, &[]);
            return;
        }
        let most = u32::try_from(self.voice.max_send).unwrap_or(u32::MAX);
        let (mut offset, mut number) = (0, 0);
        while offset < sent {
            let some = (sent - offset).min(most);
            let last = offset + some == sent;
            let numbers = if last {
                self.voice.counted()
            } else {
                self.voice.numbers()
            };
            let part = DataIn {
                is_final: last,
                good: last.then_some(residual),
                task: answered.tag,
                number,
                offset,
                length: some,
            };
            let bytes = &data[offset as usize..(offset + some) as usize];
            self.voice.say(link, Answer::data_in(&part, numbers), bytes);
            offset += some;
            number += 1;
        }
    }
}
