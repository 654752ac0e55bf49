//! What NodeUnstage was refused for, until it comes to pass.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ExportName;
use crate::attach::ports::{Judgement, Verdict};
use crate::ids::{Epoch, VolumeId};

struct Refusal {
    since: Instant,
    /// When the last one was, and who held the disk then.
    last: (Instant, Judgement),
}

/// The refusals, by attachment.
#[derive(Default)]
pub(super) struct Refusals(Mutex<HashMap<(VolumeId, Epoch), Refusal>>);

impl Refusals {
    fn all(&self) -> MutexGuard<'_, HashMap<(VolumeId, Epoch), Refusal>> {
        // Every change is one call on the map: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the attachment's end has been refused.
    pub fn waited(&self, name: &ExportName) -> Duration {
        let all = self.all();
        let refusal = all.get(&key(name));
        refusal.map_or(Duration::ZERO, |refusal| refusal.since.elapsed())
    }

    /// Notes one more; whether it is the first.
    pub fn note(&self, name: &ExportName, judgement: Judgement) -> bool {
        let now = Instant::now();
        let last = (now, judgement);
        match self.all().entry(key(name)) {
            Entry::Occupied(mut known) => {
                known.get_mut().last = last;
                false
            }
            Entry::Vacant(new) => {
                new.insert(Refusal { since: now, last });
                true
            }
        }
    }

    /// The volume is used again, or gone: whoever holds it at a later
    /// NodeUnstage has the whole time.
    pub fn forget(&self, volume: &VolumeId) {
        self.all().retain(|(refused, _), _| refused != volume);
    }

    /// Who held a disk that has gone: by the last refusal, if there was one.
    pub fn judge_gone(&self, name: &ExportName, found: Judgement) -> Judgement {
        let all = self.all();
        match all.get(&key(name)) {
            Some(Refusal {
                last: (at, then), ..
            }) if found.verdict == Verdict::Quiet => Judgement {
                reason: format!(
                    "{}: so it was {} ms before, when NodeUnstage was refused; {}",
                    then.reason,
                    at.elapsed().as_millis(),
                    found.reason
                ),
                ..then.clone()
            },
            _ => found,
        }
    }
}

fn key(name: &ExportName) -> (VolumeId, Epoch) {
    (name.volume.clone(), name.epoch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(verdict: Verdict, reason: &str) -> Judgement {
        Judgement {
            verdict,
            reason: reason.to_owned(),
            holders: Vec::new(),
        }
    }

    #[test]
    fn a_disk_that_has_gone_was_whose_the_last_refusal_says() {
        let refusals = Refusals::default();
        let name = |volume: &str, epoch: u64| -> ExportName {
            let text = format!("{}{volume}:{epoch}:0123", super::super::NQN_PREFIX);
            text.parse().unwrap()
        };
        let gone = judged(Verdict::Quiet, "it has gone");
        assert_eq!(refusals.judge_gone(&name("v", 1), gone.clone()), gone);
        assert!(refusals.note(&name("v", 1), judged(Verdict::Unknown, "a")));
        assert!(!refusals.note(&name("v", 1), judged(Verdict::Live, "b writes")));
        let told = refusals.judge_gone(&name("v", 1), gone.clone());
        assert_eq!(told.verdict, Verdict::Live);
        assert!(
            told.reason.starts_with("b writes: so it was "),
            "{}",
            told.reason
        );
        assert!(told.reason.ends_with("; it has gone"), "{}", told.reason);
        let seen = judged(Verdict::BackupStale, "c reads");
        assert_eq!(refusals.judge_gone(&name("v", 1), seen.clone()), seen);
        assert_eq!(refusals.judge_gone(&name("v", 2), gone.clone()), gone);
        refusals.forget(&"v".parse().unwrap());
        assert_eq!(refusals.judge_gone(&name("v", 1), gone.clone()), gone);
        assert!(refusals.waited(&name("v", 1)).is_zero());
    }
}
