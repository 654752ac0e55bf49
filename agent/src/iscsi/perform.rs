//! What a command has done to the unit, beyond plain reads and writes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::answers::Ending;
use super::reservations::Failure;
use super::scsi::command::{Command, Range};
use super::scsi::reservation::{Order, Refused};
use super::scsi::sense::Sense;
use super::scsi::{inquiry, lba_status, mode, opcodes, reservation_report, unmap};
use super::session::Seat;
use super::task::Verdict;
use super::unit::{Claim, Unit};
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::Lba;
use crate::reactor::protocol::Call;
use crate::reactor::{Buffer, Failed, Outcome};

/// How much is read or written at a time by what has no buffer of its own.
const STEP: u32 = 64;
/// PREEMPT AND ABORT waits so long for the commands that it aborts. Where one
/// thread is all that there is, as in fuzzing, nobody ends them meanwhile.
const ABORT_WAIT: Duration = Duration::from_millis(if cfg!(fuzzing) { 10 } else { 10_000 });
const LOOK: Duration = Duration::from_millis(1);

/// What comes of a command.
pub enum Step {
    /// Data for the initiator, at most so many bytes of it.
    Data(Vec<u8>, u32),
    /// It is done.
    Good,
    /// It is refused.
    Refused(Refused),
    /// The device is flushed.
    Flush,
    /// The device is called. Where something is in the second part then, it is
    /// how the command ends.
    Call(Call, Option<Verdict>),
}

impl From<Result<Vec<u8>, Sense>> for Step {
    fn from(data: Result<Vec<u8>, Sense>) -> Self {
        match data {
            Ok(data) => Self::Data(data, u32::MAX),
            Err(sense) => Self::Refused(sense.into()),
        }
    }
}

impl Step {
    fn at_most(self, allocation: u32) -> Self {
        match self {
            Self::Data(data, _) => Self::Data(data, allocation),
            other => other,
        }
    }

    /// The same call, which says in `verdict` how the command ends.
    fn judged(self, verdict: Verdict) -> Self {
        match self {
            Self::Call(call, _) => Self::Call(call, Some(verdict)),
            other => other,
        }
    }
}

/// What comes of a command with its data, all of which is there. Plain reads
/// and writes are the caller's.
pub fn step(session: &Seat, command: &Command, cdb: &[u8; 16], data: Option<Buffer>) -> Step {
    let unit = Arc::clone(session.target().unit());
    let list: &[u8] = data.as_deref().unwrap_or_default();
    match *command {
        Command::TestUnitReady | Command::StartUnit | Command::PreFetch { .. } => Step::Good,
        Command::RequestSense {
            descriptor,
            allocation,
        } => {
            let sense = session.take_attention().unwrap_or(Sense::NONE);
            let (bytes, length) = sense.encode(descriptor);
            Step::Data(bytes[..length].to_vec(), allocation)
        }
        Command::Inquiry { page, allocation } => {
            Step::from(inquiry::inquiry(unit.identity(), page)).at_most(allocation)
        }
        Command::ReadCapacity10 => Step::from(Ok(inquiry::capacity_10(unit.blocks()))),
        Command::ReadCapacity16 { allocation } => {
            Step::Data(inquiry::capacity_16(unit.blocks()), allocation)
        }
        Command::ReportLuns { select, allocation } => Step::Data(inquiry::luns(select), allocation),
        Command::ReportSupportedOpcodes { allocation } => {
            Step::from(opcodes::report(cdb)).at_most(allocation)
        }
        Command::ModeSense {
            ten,
            no_descriptor,
            long_lba,
            control,
            page,
            subpage,
            allocation,
        } => {
            let asked = mode::Asked {
                ten,
                no_descriptor,
                long_lba,
                control,
                page,
                subpage,
            };
            let (settings, read_only) = (unit.settings(), unit.read_only());
            let data = mode::sense(&asked, settings, read_only, unit.blocks());
            Step::from(data).at_most(allocation)
        }
        Command::ModeSelect { ten, .. } => match mode::select(list, ten, unit.settings()) {
            Err(sense) => Step::Refused(sense.into()),
            Ok(settings) => {
                unit.change(settings, session);
                Step::Good
            }
        },
        Command::Reserve if unit.reservations.reserve(session) => Step::Good,
        Command::Release if unit.reservations.release(session) => Step::Good,
        Command::Reserve | Command::Release => Step::Refused(Refused::Conflict),
        Command::PersistentReserveIn { action, allocation } => {
            let (state, kept) = (unit.reservations.state(), unit.reservations.persistent());
            Step::Data(reservation_report::report(&state, action, kept), allocation)
        }
        Command::PersistentReserveOut {
            action,
            scope,
            kind,
        } => {
            let kept = unit.reservations.persistent();
            match Order::decode(action, scope, kind, list, kept) {
                Ok(order) => carry_out(session, order, data),
                Err(sense) => Step::Refused(sense.into()),
            }
        }
        Command::Unmap { .. } => match unmap::ranges(list, unit.blocks()) {
            Ok(ranges) => call(data, move |device, _| {
                let mut all = ranges.iter();
                let mut unmap = |range: &Range| device.deallocate(range.lba, range.blocks.into());
                Ok(unit.beside(|| all.try_for_each(&mut unmap))?)
            }),
            Err(sense) => Step::Refused(sense.into()),
        },
        Command::WriteSame {
            range,
            unmap,
            no_data,
        } => call(data, move |device, data| {
            let block = if no_data { &[][..] } else { data };
            Ok(unit.beside(|| write_same(device, range, block, unmap))?)
        }),
        Command::GetLbaStatus { lba, allocation } => {
            let verdict = Verdict::default();
            let said = Arc::clone(&verdict);
            let step = call(data, move |device, _| {
                let look = |lba, most| device.mapping(lba, most);
                let list = lba_status::report(lba, unit.blocks(), allocation, look)?;
                said.get_or_init(|| Ending::Data(list, allocation));
                Ok(())
            });
            step.judged(verdict)
        }
        Command::OrWrite { range, fua } => {
            let claim = unit.claim();
            call(data, move |device, data| {
                Ok(claim.alone(|| or_write(device, range, data, fua))?)
            })
        }
        Command::CompareAndWrite { range, fua } => {
            let claim = unit.claim();
            call(data, move |device, data| {
                claim.alone(|| {
                    let (compare, write) = data.split_at(data.len() / 2);
                    differs(device, range.lba, compare)?;
                    device.write(range.lba, write, fua).map_err(Failed::from)
                })
            })
        }
        Command::Verify { range, compare } => call(data, move |device, data| {
            if compare {
                differs(device, range.lba, data)
            } else {
                readable(device, range)
            }
        }),
        Command::WriteAndVerify { range, compare } => {
            let claim = (!is_whole(list)).then(|| unit.claim());
            call(data, move |device, data| {
                write(device, &unit, claim, range.lba, data, true)?;
                if compare {
                    differs(device, range.lba, data)
                } else {
                    readable(device, range)
                }
            })
        }
        Command::SynchronizeCache => Step::Flush,
        Command::Read { range, .. } => call(data, move |device, _| readable(device, range)),
        Command::Write { range, fua } => {
            let claim = (!is_whole(list)).then(|| unit.claim());
            call(data, move |device, data| {
                Ok(write(device, &unit, claim, range.lba, data, fua)?)
            })
        }
    }
}

/// Whether data ends with a block.
fn is_whole(data: &[u8]) -> bool {
    (data.len() as u64).is_multiple_of(BLOCK)
}

/// Writes data, with a claim where it ends within a block.
fn write(
    device: &dyn BlockDevice,
    unit: &Unit,
    claim: Option<Claim>,
    lba: Lba,
    data: &[u8],
    fua: bool,
) -> Result<(), DeviceError> {
    match claim {
        Some(claim) => claim.alone(|| write_part(device, lba, data, fua)),
        None => unit.beside(|| device.write(lba, data, fua)),
    }
}

/// A call that is given the command's data, and gives its buffer back.
fn call(
    data: Option<Buffer>,
    act: impl FnOnce(&dyn BlockDevice, &[u8]) -> Result<(), Failed> + Send + 'static,
) -> Step {
    let call: Call = Box::new(move |device| {
        let result = act(device, data.as_deref().unwrap_or_default());
        Outcome {
            buffer: data,
            result,
        }
    });
    Step::Call(call, None)
}

fn carry_out(session: &Seat, order: Order, data: Option<Buffer>) -> Step {
    let verdict = Verdict::default();
    let (said, by) = (Arc::clone(&verdict), session.clone());
    let step = call(data, move |_, _| {
        let unit = by.target().unit();
        let effects = match unit.reservations.order(&by, &order) {
            Ok(effects) => effects,
            Err(Failure::NotKept(why)) => return Err(Failed::Other(why)),
            Err(Failure::Refused(refused)) => {
                said.get_or_init(|| Ending::Refused(refused));
                return Ok(());
            }
        };
        let sessions = unit.sessions();
        let of = |nexus| sessions.iter().filter(move |one| one.nexus() == nexus);
        for (nexus, sense) in &effects.attentions {
            of(nexus).for_each(|session| session.attention(*sense));
        }
        let mut waits = Vec::new();
        for session in effects.aborts.iter().flat_map(of) {
            session.attention(Sense::COMMANDS_CLEARED);
            waits.push((session, session.ask_abort()));
        }
        let deadline = Instant::now() + ABORT_WAIT;
        while !waits
            .iter()
            .all(|(session, asked)| session.has_aborted(*asked))
        {
            if Instant::now() > deadline {
                let why = "commands that were to be aborted have not settled";
                return Err(Failed::Other(why.to_owned()));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    });
    step.judged(verdict)
}

/// Sets the bits of `data` in what is stored. Of a block that it ends within
/// the rest stays as it is.
fn or_write(
    device: &dyn BlockDevice,
    range: Range,
    data: &[u8],
    fua: bool,
) -> Result<(), DeviceError> {
    let mut stored = Buffer::zeroed(length(range.blocks));
    device.read(range.lba, &mut stored)?;
    for (stored, set) in stored.iter_mut().zip(data) {
        *stored |= set;
    }
    device.write(range.lba, &stored, fua)
}

fn write_same(
    device: &dyn BlockDevice,
    range: Range,
    block: &[u8],
    unmap: bool,
) -> Result<(), DeviceError> {
    if block.iter().all(|byte| *byte == 0) {
        return device.write_zeroes(range.lba, range.blocks.into(), unmap);
    }
    let mut buffer = Buffer::zeroed(block.len() * range.blocks.min(STEP) as usize);
    for copy in buffer.chunks_mut(block.len()) {
        copy.copy_from_slice(block);
    }
    in_steps(range, |lba, blocks| {
        device.write(lba, &buffer[..length(blocks)], false)
    })
}

/// Writes data that ends within a block, whose rest stays as it is.
fn write_part(
    device: &dyn BlockDevice,
    lba: Lba,
    data: &[u8],
    fua: bool,
) -> Result<(), DeviceError> {
    let (whole, rest) = data.split_at(data.len() - data.len() % BLOCK as usize);
    if !whole.is_empty() {
        device.write(lba, whole, fua)?;
    }
    let last = Lba(lba.0 + whole.len() as u64 / BLOCK);
    let mut block = Buffer::zeroed(BLOCK as usize);
    device.read(last, &mut block)?;
    block[..rest.len()].copy_from_slice(rest);
    device.write(last, &block, fua)
}

fn readable(device: &dyn BlockDevice, range: Range) -> Result<(), Failed> {
    let mut buffer = Buffer::zeroed(length(range.blocks.min(STEP)));
    let read = in_steps(range, |lba, blocks| {
        device.read(lba, &mut buffer[..length(blocks)])
    });
    Ok(read?)
}

/// Whether what is stored from `lba` on is this; if not, where it differs.
fn differs(device: &dyn BlockDevice, lba: Lba, data: &[u8]) -> Result<(), Failed> {
    let mut stored = Buffer::zeroed(data.len().next_multiple_of(BLOCK as usize));
    if !data.is_empty() {
        device.read(lba, &mut stored)?;
    }
    let mut pairs = data.iter().zip(stored.iter());
    match pairs.position(|(wanted, stored)| wanted != stored) {
        None => Ok(()),
        Some(at) => Err(Failed::Miscompare { at: at as u64 }),
    }
}

fn in_steps(
    range: Range,
    mut act: impl FnMut(Lba, u32) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let mut done = 0;
    while done < range.blocks {
        let some = (range.blocks - done).min(STEP);
        act(Lba(range.lba.0 + u64::from(done)), some)?;
        done += some;
    }
    Ok(())
}

fn length(blocks: u32) -> usize {
    blocks as usize * BLOCK as usize
}
