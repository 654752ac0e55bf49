//! What follows from the result of an intent.

use super::{Outcome, Phase, Then, Turn, kind_name};
use crate::attach::ports::{Exported, HomeError, Recorded};
use crate::attach::proof::{Cleared, Receipt};
use crate::ids::{Bytes, Epoch};

impl Turn {
    /// The result of the pending intent.
    pub(super) fn result(&mut self, outcome: Outcome) {
        match (self.state.phase.clone(), outcome) {
            (Phase::Creating, Outcome::Created) => {
                let mut text =
                    format!("made on {}, {}", self.state.spec.home, self.state.spec.size);
                if let Some(claim) = self.state.claims.first() {
                    text += &format!(
                        ", for {} ticket {}",
                        kind_name(claim.ticket.kind),
                        claim.ticket.id
                    );
                }
                self.enter(Phase::Idle);
                self.note("created", None, text);
            }
            (Phase::Fencing { closing, then, .. }, Outcome::Fenced(receipt))
                if receipt.closed() == closing && *receipt.volume() == self.state.spec.id =>
            {
                self.fenced(receipt, then);
            }
            (Phase::Exporting { holder, .. }, Outcome::Exported(exported))
                if exported.epoch == self.state.epoch =>
            {
                self.exported(holder, exported);
            }
            (Phase::Deleting { unmade }, Outcome::Deleted) => {
                self.enter(Phase::Gone { unmade });
                self.note("deleted", None, "deleted at its home".to_owned());
            }
            (_, Outcome::Refused(error)) => self.refused(error),
            // A result of another kind, volume or epoch than the intent's proves nothing.
            _ => {}
        }
    }

    fn fenced(&mut self, receipt: Receipt, then: Then) {
        self.recorded(Recorded::end_of(receipt.closed()));
        self.state.last_receipt = Some(receipt.id().to_owned());
        match then {
            Then::Rest => self.enter(Phase::Idle),
            Then::Delete | Then::Discard => self.enter(Phase::Deleting { unmade: None }),
            // The fence was under way when the epoch was decided, and more than
            // one is between them.
            Then::Export(_) if receipt.closed() < self.all_before(&then) => {
                self.enter(Phase::Fencing {
                    closing: self.all_before(&then),
                    holder: None,
                    then,
                });
            }
            Then::Export(holder) => {
                self.state.offered = self.state.epoch;
                self.enter(Phase::Exporting {
                    holder,
                    cleared: Cleared::By(Box::new(receipt)),
                });
            }
        }
    }

    fn exported(&mut self, holder: super::Holder, exported: Exported) {
        let node = holder.node.clone();
        self.recorded(Recorded::begin_of(exported.epoch));
        self.enter(Phase::Attached { holder, exported });
        let text = format!("node {node} may use it from epoch {}", self.state.epoch);
        self.note("published", Some(&node), text);
    }

    fn refused(&mut self, error: HomeError) {
        match (self.state.phase.clone(), error) {
            // What cannot be made is cleared away; its creator is told why.
            (
                Phase::Creating,
                error @ (HomeError::NoSpace { .. }
                | HomeError::Unsupported(_)
                | HomeError::NoSnapshot(_)
                | HomeError::NoVolume(_)
                | HomeError::StillInside { .. }
                | HomeError::Failed(_)),
            ) => {
                let text = format!("could not be made: {error}");
                self.enter(Phase::Deleting {
                    unmade: Some(error),
                });
                self.note("create-failed", None, text);
            }
            // Nothing is there, so nothing can be open; and an old copy serves
            // nobody, ever. Deleting either is what was asked for.
            (
                Phase::Fencing {
                    then: Then::Delete, ..
                },
                HomeError::NoVolume(_) | HomeError::RecordBehind { .. },
            )
            | (
                Phase::Fencing {
                    then: Then::Discard,
                    ..
                },
                HomeError::NoVolume(_),
            ) => self.enter(Phase::Deleting { unmade: None }),
            (
                Phase::Fencing {
                    closing,
                    holder,
                    then,
                },
                HomeError::StaleEpoch { home },
            ) if home > closing => {
                self.recorded(Recorded::begin_of(home));
                self.learn(home, matches!(then, Then::Export(_)));
                let then = match then {
                    // Nodes had it after the restore was whole.
                    Then::Discard => Then::Rest,
                    then => then,
                };
                self.enter(Phase::Fencing {
                    closing: self.all_before(&then),
                    holder,
                    then,
                });
            }
            // Also where the home has this very epoch open for another: an old
            // copy of the store decided it twice. What it names may be a fence
            // that is not in its record yet.
            (Phase::Exporting { holder, .. }, HomeError::StaleEpoch { home })
                if home >= self.state.epoch =>
            {
                self.learn(home, true);
                let then = Then::Export(holder);
                self.enter(Phase::Fencing {
                    closing: self.all_before(&then),
                    holder: None,
                    then,
                });
            }
            // It was made, and used since: an old copy of the store asked again.
            (Phase::Deleting { unmade: Some(_) }, HomeError::StaleEpoch { home }) => {
                self.recorded(Recorded::begin_of(home));
                self.learn(home, false);
                self.enter(Phase::Fencing {
                    closing: self.all_before(&Then::Rest),
                    holder: None,
                    then: Then::Rest,
                });
            }
            (Phase::Deleting { .. }, HomeError::StaleEpoch { home })
                if home >= self.state.recorded.epoch =>
            {
                self.recorded(Recorded::begin_of(home));
                self.learn(home, false);
                self.enter(Phase::Fencing {
                    closing: home,
                    holder: None,
                    then: Then::Delete,
                });
            }
            // The intent stands; whoever performs it asks again.
            _ => {}
        }
    }

    /// The home is further than the store thought: go on from there.
    fn learn(&mut self, home: Epoch, wanted: bool) {
        let was = self.state.epoch;
        self.state.offered = self.state.offered.max(home);
        let least = if wanted { home.next() } else { home };
        self.state.epoch = was.max(least);
        let text =
            format!("its home is at epoch {home}, the store was at {was}: gone on from there");
        self.note("epoch-learned", None, text);
    }

    fn recorded(&mut self, recorded: Recorded) {
        self.state.recorded = self.state.recorded.max(recorded);
        self.state.offered = self.state.offered.max(recorded.epoch);
    }

    pub(super) fn resized(&mut self, size: Bytes) {
        if size > self.state.spec.size {
            let text = format!("grown from {} to {size}", self.state.spec.size);
            self.state.spec.size = size;
            self.note("expanded", None, text);
        }
    }
}
