//! Task management (RFC 7143, 11.5 and 11.6; SAM-5, 7).
//!
//! A function is answered when what it is about has settled: aborted commands
//! of this session are answered never, and those of others by their own
//! connections.

use std::sync::Arc;

use super::scsi::sense::Sense;
use super::serving::{LOOK, Refusal, Serving};
use super::session::Session;
use super::wire::answer::Answer;
use super::wire::{Flaw, TaskManagement};
use crate::reactor::{End, Link};

/// Functions that wait for something to settle, at most.
const PENDING: usize = 16;

/// What a function comes to (RFC 7143, 11.6.1).
const COMPLETE: u8 = 0;
const NO_TASK: u8 = 1;
const NO_LUN: u8 = 2;
const NO_REASSIGNMENT: u8 = 4;
const NOT_SUPPORTED: u8 = 5;
const REJECTED: u8 = 255;

/// A function whose aborted commands have not settled.
pub struct Pending {
    task: u32,
    others: Vec<(Arc<Session>, u64)>,
    /// Whether all sessions end with it.
    cold: bool,
}

impl Serving {
    /// Does what a task management request asks for.
    pub(super) fn manage(
        &mut self,
        task: u32,
        request: &TaskManagement,
        link: &mut Link,
    ) -> Result<(), Refusal> {
        let Some(session) = self.session.clone() else {
            return Err(Flaw::Phase.into());
        };
        let known = super::answers::is_the_unit(request.lun);
        if self.pending.len() >= PENDING {
            self.answer_management(task, REJECTED, link);
            return Ok(());
        }
        let response = match request.function {
            1 | 2 | 4 | 5 if !known => NO_LUN,
            1 => match self.tasks.find(request.referenced) {
                Some(slot) => {
                    self.abort(slot, link);
                    self.wait(task, Vec::new(), false);
                    COMPLETE
                }
                None => NO_TASK,
            },
            2 => {
                self.abort_all(link);
                self.wait(task, Vec::new(), false);
                COMPLETE
            }
            function @ (4..=7) => {
                let unit = Arc::clone(session.target().unit());
                let mut others = unit.sessions();
                others.retain(|other| !Arc::ptr_eq(other, session.session()));
                let asked = others.into_iter().map(|other| {
                    if function == 4 {
                        other.attention(Sense::COMMANDS_CLEARED);
                    }
                    let asked = other.ask_abort();
                    (other, asked)
                });
                let others = asked.collect();
                self.abort_all(link);
                if function != 4 {
                    unit.reset();
                }
                self.wait(task, others, function == 7);
                COMPLETE
            }
            8 => NO_REASSIGNMENT,
            _ => NOT_SUPPORTED,
        };
        if response == COMPLETE {
            self.settle_pending(link).map_err(Refusal::End)
        } else {
            self.answer_management(task, response, link);
            Ok(())
        }
    }

    fn wait(&mut self, task: u32, others: Vec<(Arc<Session>, u64)>, cold: bool) {
        self.pending.push(Pending { task, others, cold });
    }

    /// Answers the functions whose commands have settled, in their order.
    pub(super) fn settle_pending(&mut self, link: &mut Link) -> Result<(), End> {
        self.look = None;
        if self.pending.is_empty() && self.aborts == 0 {
            return Ok(());
        }
        if self.tasks.slots().any(|(_, task)| task.aborted) {
            return Ok(());
        }
        if let Some(session) = &self.session {
            session.aborted(self.aborts);
        }
        while let Some(first) = self.pending.first() {
            let mut others = first.others.iter();
            if !others.all(|(session, asked)| session.has_aborted(*asked)) {
                // Nothing of theirs comes here.
                self.look = Some(link.now() + LOOK);
                break;
            }
            let done = self.pending.remove(0);
            self.answer_management(done.task, COMPLETE, link);
            if done.cold {
                done.others.iter().for_each(|(session, _)| session.end());
                return Err(End::Protocol("the target was reset cold"));
            }
        }
        Ok(())
    }

    fn answer_management(&mut self, task: u32, response: u8, link: &mut Link) {
        let answer = Answer::management(task, response, self.voice.counted());
        self.voice.say(link, answer, &[]);
    }
}
