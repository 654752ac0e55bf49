//! Commands and their data: from the header of a command to its status.
//!
//! No command keeps the stream from being read on: one whose data has no room
//! in the budget waits by itself, and what of it comes unasked is put aside.

use std::ops::Range;

use super::answers::Answered;
use super::scsi::sense::Sense;
use super::serving::{DATA_STALLED, Into, Refusal, Serving};
use super::task::{Sequence, Slot, Stage, Task};
use super::wire::answer::{Answer, ReadyToTransfer};
use super::wire::{DataOut, Flaw, Frame, Header, NO_TAG, ScsiCommand};
use crate::reactor::{Buffer, End, Link};

impl Serving {
    /// A command has come, and its immediate data is about to.
    pub(super) fn command(
        &mut self,
        header: &Header,
        frame: &Frame,
        link: &mut Link,
    ) -> Result<Into, Refusal> {
        let Some(session) = self.session.clone() else {
            return Err(Flaw::Phase.into());
        };
        let request = ScsiCommand::decode(header);
        let numbered = !header.immediate();
        if !numbered && !self.tasks.has_room(false) {
            return Err(Flaw::Immediate.into());
        }
        if !self.number(header)? {
            return Ok(Into::Nowhere);
        }
        if self.tasks.find(header.task()).is_some() || header.task() == NO_TAG {
            return Err(Flaw::TagInUse.into());
        }
        let brought = u32::try_from(frame.data).unwrap_or(u32::MAX);
        let unasked = self.parameters.first_burst.min(request.length);
        let brings = brought > 0
            && !(request.writes && self.parameters.immediate_data && brought <= unasked);
        let announces = request.writes && !request.is_final && self.parameters.initial_r2t;
        if brings || announces {
            return Err(Flaw::UnexpectedData.into());
        }
        let judged = super::answers::judge(&session, header.lun(), &request);
        let judged = match judged {
            Ok(judged) => judged,
            Err((ending, command)) => {
                if numbered {
                    self.voice.room();
                }
                let answered = Answered::unstarted(header.task(), command, &request);
                self.answer(&answered, ending, link);
                return Ok(Into::Nowhere);
            }
        };
        let (command, wanted) = (judged.command, judged.wanted);
        let takes = command.data_out() > 0 && wanted > 0;
        let gathers = takes && !request.is_final;
        let task = Task {
            tag: header.task(),
            lun: header.lun(),
            numbered,
            kind: judged.kind,
            command,
            cdb: request.cdb,
            expected: request.length,
            reads: request.reads,
            natural: judged.natural,
            wanted,
            stage: if gathers {
                Stage::Gathering
            } else {
                Stage::Hungry
            },
            data: None,
            on_budget: false,
            staged: None,
            came: 0,
            dealt: 0,
            sequence: Sequence {
                next: brought,
                end: unasked,
                number: 0,
            },
            sent: 0,
            asked: link.now(),
            given_up: None,
            aborted: false,
            answered: false,
            verdict: None,
        };
        let Some(slot) = self.tasks.insert(task) else {
            // More than the window says: it is not taken from an initiator
            // that keeps to it.
            return Err(Flaw::Order.into());
        };
        if gathers {
            self.data_due.get_or_insert(link.now() + DATA_STALLED);
        }
        if takes && (gathers || brought > 0) {
            self.make_room(slot, link);
        }
        if takes && brought > 0 {
            return Ok(self.place(slot, 0, brought, link));
        }
        if !gathers {
            self.advance(slot, link).map_err(Refusal::End)?;
        }
        Ok(Into::Nowhere)
    }

    /// A place for unsolicited data: on the budget if that has room, and
    /// otherwise beside it, as much as may come unasked.
    fn make_room(&mut self, slot: Slot, link: &mut Link) {
        let Some(task) = self.tasks.get(slot) else {
            return;
        };
        if self.hungry.is_empty() {
            task.data = link.buffer(task.buffer_length());
        }
        task.on_budget = task.data.is_some();
        if !task.on_budget {
            let most = self.parameters.first_burst.min(task.wanted);
            task.staged = Some(link.unsolicited(most as usize));
        }
    }

    /// Where so many bytes of a task's data go.
    fn place(&mut self, slot: Slot, offset: u32, length: u32, link: &mut Link) -> Into {
        let mut at = offset as usize..offset as usize + length as usize;
        if let Some(task) = self.tasks.get(slot) {
            // Only what was asked for comes behind the first part.
            let before = task.dealt as usize;
            at = at.start - before..at.end - before;
            let place = task.place();
            if let Some(buffer) = place.take_if(|buffer| at.end <= buffer.len()) {
                return Into::Task(slot, buffer, at);
            }
        }
        // It reaches beyond what the command takes.
        Into::Beside(slot, link.unsolicited(length as usize), at)
    }

    /// A data PDU has come, and its data is about to.
    pub(super) fn data_out(
        &mut self,
        header: &Header,
        frame: &Frame,
        link: &mut Link,
    ) -> Result<Into, Refusal> {
        let data = DataOut::decode(header);
        let length = u32::try_from(frame.data).unwrap_or(u32::MAX);
        let (slot, stage) = if data.transfer == NO_TAG {
            (self.tasks.find(data.task), Stage::Gathering)
        } else {
            (
                self.tasks.of_transfer(data.transfer, data.task),
                Stage::Asking,
            )
        };
        // Of a command that was answered or aborted meanwhile: it is in order
        // that the initiator goes on for a while.
        let Some((slot, task)) = slot.and_then(|slot| Some((slot, self.tasks.get(slot)?))) else {
            return Ok(Into::Nowhere);
        };
        if task.wanted == 0 || task.command.data_out() == 0 {
            // Whether it is answered by now must make no difference.
            return Ok(Into::Nowhere);
        }
        let wrong = |flaw| Err(Refusal::Task(flaw, slot));
        if task.stage != stage {
            // What the device has cannot be taken back, nor what is answered.
            return if task.stage == Stage::Working {
                Err(Flaw::UnexpectedData.into())
            } else {
                wrong(Flaw::UnexpectedData)
            };
        }
        if let Some(sense) = task.given_up {
            if data.is_final {
                self.finish(slot, sense.into(), link)
                    .map_err(Refusal::End)?;
            }
            return Ok(Into::Nowhere);
        }
        let sequence = &mut task.sequence;
        if data.number != sequence.number || data.offset != sequence.next {
            return wrong(Flaw::Order);
        }
        let end = data
            .offset
            .checked_add(length)
            .filter(|end| *end <= sequence.end);
        let Some(end) = end else {
            return wrong(Flaw::UnexpectedData);
        };
        if stage == Stage::Asking && data.is_final != (end == sequence.end) {
            return wrong(Flaw::Order);
        }
        sequence.next = end;
        sequence.number = sequence.number.wrapping_add(1);
        Ok(self.place(slot, data.offset, length, link))
    }

    /// A command whose data broke the rules ends: the Reject says which, and
    /// behind the last PDU of the sequence this ends the task (RFC 7143, 11.17.1
    /// and 11.4.7.2).
    pub fn give_up(
        &mut self,
        header: &Header,
        slot: Slot,
        flaw: Flaw,
        link: &mut Link,
    ) -> Result<(), End> {
        let sense = match flaw {
            Flaw::UnexpectedData => Sense::UNEXPECTED_DATA,
            _ => Sense::INCORRECT_DATA,
        };
        if header.is_final() {
            return self.finish(slot, sense.into(), link);
        }
        if let Some(task) = self.tasks.get(slot) {
            task.given_up = Some(sense);
        }
        Ok(())
    }

    /// A part of a task's data is there. `beside`: it is not in its place yet.
    pub fn arrived(
        &mut self,
        header: &Header,
        slot: Slot,
        buffer: Buffer,
        at: Range<usize>,
        beside: bool,
        link: &mut Link,
    ) -> Result<(), End> {
        let Some(task) = self.tasks.get(slot) else {
            link.recycle(buffer);
            return Ok(());
        };
        if beside {
            if let Some(place) = task.place() {
                let end = at.end.min(place.len());
                let start = at.start.min(end);
                place[start..end].copy_from_slice(&buffer[..end - start]);
            }
            link.recycle(buffer);
        } else {
            *task.place() = Some(buffer);
        }
        task.came = task.dealt + u32::try_from(at.end).unwrap_or(u32::MAX - task.dealt);
        if header.is_final() {
            self.advance(slot, link)?;
        }
        Ok(())
    }

    /// A task goes on: it gets a buffer, asks for data, or goes to the device.
    pub(super) fn advance(&mut self, slot: Slot, link: &mut Link) -> Result<(), End> {
        let Some(task) = self.tasks.get(slot) else {
            return Ok(());
        };
        let needs = task.buffer_length();
        if needs > 0 && !task.on_budget {
            // Those that were aborted meanwhile wait for nothing.
            while let Some(first) = self.hungry.front()
                && self.tasks.get(*first).is_none()
            {
                self.hungry.pop_front();
            }
            let alone = self.hungry.is_empty();
            let Some(task) = self.tasks.get(slot) else {
                return Ok(());
            };
            task.data = if alone { link.buffer(needs) } else { None };
            if task.data.is_none() {
                task.stage = Stage::Hungry;
                self.hungry.push_back(slot);
                return Ok(());
            }
        }
        self.fed(slot, link)
    }

    /// Gives buffers to those that wait for one, in their order.
    pub(super) fn feed(&mut self, link: &mut Link) -> Result<(), End> {
        while let Some(slot) = self.hungry.front().copied() {
            if let Some(task) = self.tasks.get(slot) {
                let Some(buffer) = link.buffer(task.buffer_length()) else {
                    return Ok(());
                };
                task.data = Some(buffer);
            }
            self.hungry.pop_front();
            self.fed(slot, link)?;
        }
        Ok(())
    }

    /// A task has the buffer that it needs.
    fn fed(&mut self, slot: Slot, link: &mut Link) -> Result<(), End> {
        let Some(task) = self.tasks.get(slot) else {
            return Ok(());
        };
        task.on_budget = task.data.is_some();
        if let (Some(staged), Some(data)) = (task.staged.take(), &mut task.data) {
            let length = (task.came as usize).min(staged.len()).min(data.len());
            data[..length].copy_from_slice(&staged[..length]);
            link.recycle(staged);
        }
        let segment_end = task.dealt + task.segment();
        if task.command.data_out() == 0 || task.came >= segment_end {
            return self.start(slot, link);
        }
        let end = segment_end.min(task.came.saturating_add(self.parameters.max_burst));
        let asked = ReadyToTransfer {
            lun: task.lun,
            task: task.tag,
            transfer: slot.transfer(),
            number: task.sent,
            offset: task.came,
            length: end - task.came,
        };
        task.stage = Stage::Asking;
        task.asked = link.now();
        task.sent += 1;
        task.sequence = Sequence {
            next: task.came,
            end,
            number: 0,
        };
        self.data_due.get_or_insert(link.now() + DATA_STALLED);
        let answer = Answer::ready_to_transfer(&asked, self.voice.numbers());
        self.voice.say(link, answer, &[]);
        Ok(())
    }

    /// Ends the connection when data is overdue that was asked for, or announced.
    pub(super) fn look_for_stalled(&mut self, now: std::time::Instant) -> Result<(), End> {
        let asking = self.tasks.slots().filter(|(_, task)| {
            matches!(task.stage, Stage::Asking | Stage::Gathering) && !task.aborted
        });
        let oldest = asking.map(|(_, task)| task.asked + DATA_STALLED).min();
        if oldest.is_some_and(|due| due <= now) {
            return Err(End::Late("the data of a command"));
        }
        self.data_due = oldest;
        Ok(())
    }
}
