//! Commands at the device: through the gates, to their outcome, and to an
//! early end.

use super::answers::{Answered, Ending, sense_of};
use super::perform::{self, Step};
use super::scsi::command::Command;
use super::scsi::reservation::Refused;
use super::serving::{ENDED, Serving};
use super::session::Seat;
use super::task::{BLOCK_BYTES, Slot, Stage, Task};
use super::wire::answer::{Answer, DataIn, Residual};
use crate::block::gate::Pass;
use crate::ids::Lba;
use crate::reactor::{Buffer, End, Failed, Link, Operation, Outcome, Tag};

impl Serving {
    /// Begins what a task is to do; its data is there.
    pub(super) fn start(&mut self, slot: Slot, link: &mut Link) -> Result<(), End> {
        let (Some(session), Some(task)) = (self.session.clone(), self.tasks.get(slot)) else {
            return Ok(());
        };
        let (target, unit) = (session.target(), session.target().unit());
        let command = task.command;
        task.stage = Stage::Working;
        if target.gate().is_closed() && !command.always_allowed() {
            drop(target.gate().enter());
            return self.finish(slot, Ending::Refused(Refused::Conflict), link);
        }
        // It may have come about while the data was on its way.
        if command.data_out() > 0 && !unit.reservations.allow(&session, &command) {
            return self.finish(slot, Ending::Refused(Refused::Conflict), link);
        }
        if command.writes() {
            unit.note_write();
        }
        let part = command.part(task.dealt, task.segment());
        let writing = match command {
            Command::Write { .. } if task.segment() % BLOCK_BYTES == 0 => {
                unit.begin_plain_write(&session)
            }
            _ => None,
        };
        let operation = match command {
            Command::Read { .. } | Command::Write { .. } if task.wanted == 0 => {
                return self.finish(slot, Ending::Good, link);
            }
            Command::Read { range, fua } => {
                let Some(buffer) = task.data.take() else {
                    return self.finish(slot, Ending::Good, link);
                };
                task.on_budget = false;
                let lba = Lba(range.lba.0 + u64::from(task.dealt / BLOCK_BYTES));
                if fua {
                    Operation::read_durable(lba, buffer)
                } else {
                    Operation::Read { lba, buffer }
                }
            }
            Command::Write { .. } if writing.is_some() => {
                let Command::Write { range, fua } = part else {
                    return self.finish(slot, Ending::Good, link);
                };
                let Some(buffer) = task.data.take() else {
                    return self.finish(slot, Ending::Good, link);
                };
                Operation::Write {
                    lba: range.lba,
                    buffer,
                    fua,
                }
            }
            _ => {
                let data = task.data.take();
                match perform::step(&session, &part, &task.cdb, data) {
                    Step::Data(data, most) => {
                        return self.finish(slot, Ending::Data(data, most), link);
                    }
                    Step::Good => return self.finish(slot, Ending::Good, link),
                    Step::Refused(why) => return self.finish(slot, Ending::Refused(why), link),
                    Step::Flush => Operation::Flush,
                    Step::Call(call, verdict) => {
                        task.verdict = verdict;
                        Operation::Call(call)
                    }
                }
            }
        };
        match enter(&session) {
            Ok(Some([mine, export])) => {
                let passes = [Some(mine), Some(export), writing];
                link.begin(slot.tag(), unit.device(), operation, passes);
                Ok(())
            }
            // A conflict would be final, and its initiator is to send it again.
            Ok(None) => Err(End::Protocol(ENDED)),
            Err(why) => self.finish(slot, Ending::Refused(why), link),
        }
    }

    /// What the device was to do for a task has ended.
    pub fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End> {
        let slot = Slot::of_tag(tag);
        let Some(task) = self.tasks.get(slot) else {
            outcome
                .buffer
                .into_iter()
                .for_each(|buffer| link.recycle(buffer));
            return Ok(());
        };
        if task.aborted || task.answered {
            outcome
                .buffer
                .into_iter()
                .for_each(|buffer| link.recycle(buffer));
            self.free(slot, link);
            return self.settle_pending(link);
        }
        if matches!(outcome.result, Err(Failed::Closed)) {
            outcome
                .buffer
                .into_iter()
                .for_each(|buffer| link.recycle(buffer));
            let ended = self.session.as_ref();
            if ended.is_some_and(|session| !session.target().gate().is_closed()) {
                return Err(End::Protocol(ENDED));
            }
            return self.finish(slot, Ending::Refused(Refused::Conflict), link);
        }
        if let Err(failed) = &outcome.result {
            let dealt = u64::from(task.dealt);
            let failed = match failed {
                Failed::Miscompare { at } => &Failed::Miscompare { at: at + dealt },
                other => other,
            };
            let (kind, sense) = (task.kind, sense_of(failed, task.command.writes()));
            self.log_failure(kind, failed);
            outcome
                .buffer
                .into_iter()
                .for_each(|buffer| link.recycle(buffer));
            return self.finish(slot, sense.into(), link);
        }
        let verdict = task
            .verdict
            .take()
            .and_then(|verdict| verdict.get().cloned());
        match (task.command, outcome.buffer) {
            (Command::Read { .. }, Some(buffer)) => self.send_segment(slot, buffer, link),
            (_, buffer) => {
                buffer.into_iter().for_each(|buffer| link.recycle(buffer));
                task.dealt += task.segment();
                if task.command.in_parts() && task.dealt < task.wanted {
                    task.on_budget = false;
                    return self.advance(slot, link);
                }
                let ending = verdict.unwrap_or(Ending::Good);
                self.finish(slot, ending, link)
            }
        }
    }

    /// Sends what was read, with the status when it is the last of it.
    fn send_segment(&mut self, slot: Slot, buffer: Buffer, link: &mut Link) -> Result<(), End> {
        let Some(task) = self.tasks.get(slot) else {
            link.recycle(buffer);
            return Ok(());
        };
        let (start, length) = (task.dealt, task.segment());
        let end = start + length;
        let (tag, wanted) = (task.tag, task.wanted);
        let residual = Residual::of(task.expected, task.natural);
        let first = task.sent;
        task.dealt = end;
        let most = u32::try_from(self.voice.max_send).unwrap_or(u32::MAX);
        let burst = self.parameters.max_burst;
        // Where each PDU ends: at the segment's end, the most that is taken, a burst's end.
        let piece_end = |at: u32| {
            end.min(at.saturating_add(most))
                .min(at - at % burst + burst)
        };
        let pieces = {
            let (mut at, mut count) = (start, 0);
            while at < end {
                at = piece_end(at);
                count += 1;
            }
            count
        };
        task.sent += pieces;
        if end == wanted {
            // The room it makes is told with its status.
            self.free(slot, link);
            self.hot.read(wanted);
        }
        let (mut at, mut number) = (start, first);
        let mut buffer = Some(buffer);
        while at < end {
            let next = piece_end(at);
            let last = next == wanted;
            let part = DataIn {
                is_final: last || next % burst == 0,
                good: last.then_some(residual),
                task: tag,
                number,
                offset: at,
                length: next - at,
            };
            let numbers = if last {
                self.voice.counted()
            } else {
                self.voice.numbers()
            };
            let answer = Answer::data_in(&part, numbers);
            let range = (at - start) as usize..(next - start) as usize;
            if next == end {
                if let Some(buffer) = buffer.take() {
                    self.voice.say_buffer(link, answer, buffer, range);
                }
            } else if let Some(buffer) = &buffer {
                self.voice.say(link, answer, &buffer[range]);
            }
            (at, number) = (next, number + 1);
        }
        if end < wanted {
            return self.advance(slot, link);
        }
        Ok(())
    }

    /// Ends a task and answers it.
    pub(super) fn finish(
        &mut self,
        slot: Slot,
        ending: Ending,
        link: &mut Link,
    ) -> Result<(), End> {
        if let Some(task) = self.free(slot, link) {
            self.answer(&Answered::of(&task), ending, link);
        }
        Ok(())
    }

    /// Takes a task out; what it had is free, and there is room for one more,
    /// unless its early answer has said so.
    fn free(&mut self, slot: Slot, link: &mut Link) -> Option<Task> {
        let mut task = self.tasks.remove(slot)?;
        for buffer in [task.data.take(), task.staged.take()].into_iter().flatten() {
            link.recycle(buffer);
        }
        if task.numbered && !task.answered {
            self.voice.room();
        }
        Some(task)
    }

    /// Ends a task without an answer: at once, or when the device has settled it.
    pub(super) fn abort(&mut self, slot: Slot, link: &mut Link) {
        match self.tasks.get(slot) {
            Some(task) if task.stage == Stage::Working => task.aborted = true,
            Some(_) => {
                self.free(slot, link);
            }
            None => {}
        }
    }

    /// Aborts all tasks.
    pub(super) fn abort_all(&mut self, link: &mut Link) {
        let slots: Vec<_> = self.tasks.slots().map(|(slot, _)| slot).collect();
        slots.into_iter().for_each(|slot| self.abort(slot, link));
    }

    /// The export has ended: answers all that is outstanding. What the device
    /// has is answered too; the gate counts it until it has settled.
    pub(super) fn answer_all_conflict(&mut self, link: &mut Link) {
        let slots: Vec<_> = self.tasks.slots().map(|(slot, _)| slot).collect();
        for slot in slots {
            let Some(task) = self.tasks.get(slot) else {
                continue;
            };
            if task.aborted || task.answered {
                continue;
            }
            let answered = Answered::of(task);
            if task.stage == Stage::Working {
                task.answered = true;
                if task.numbered {
                    self.voice.room();
                }
            } else {
                self.free(slot, link);
            }
            self.answer(&answered, Ending::Refused(Refused::Conflict), link);
        }
    }
}

/// Passes of the session's and the export's gates. None: only the session has
/// ended, by a takeover, a reset or the agent's stop, and its connection is
/// about to hear of it; what it has outstanding comes again in another session.
///
/// # Errors
/// The export has ended: for good, so this is asked first.
fn enter(session: &Seat) -> Result<Option<[Pass; 2]>, Refused> {
    let export = session.target().gate().enter().ok_or(Refused::Conflict)?;
    Ok(session.gate().enter().map(|mine| [mine, export]))
}
