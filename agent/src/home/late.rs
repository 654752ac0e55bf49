//! Commands that came late for epochs that ended a while ago at most.
//!
//! A receipt says how many had come by its time. A session may outlive its
//! export for a moment, so the home goes on telling the number, and whoever
//! keeps the receipts adds to them. Nothing here outlives the process, nor need
//! it: after a restart an ended identity has no session left that could send.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::attach::ports::LateCommands;
use crate::ids::{Epoch, VolumeId};

/// For so long after its end an epoch's late commands are told: longer than a
/// session is let live, and than a controller is mostly away.
const TOLD: Duration = Duration::from_secs(600);

struct Ended {
    at: Instant,
    volume: VolumeId,
    epoch: Epoch,
    name: String,
}

/// The epochs that ended within [`TOLD`], the oldest first.
#[derive(Default)]
pub struct Late(Mutex<VecDeque<Ended>>);

impl Late {
    /// Takes note that an export has ended with `epoch`, and is known by `name`.
    pub fn ended(&self, volume: &VolumeId, epoch: Epoch, name: &str, at: Instant) {
        let mut ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.retain(|one| at.saturating_duration_since(one.at) < TOLD);
        ended.push_back(Ended {
            at,
            volume: volume.clone(),
            epoch,
            name: name.to_owned(),
        });
    }

    /// How many have come by `now` since the gates closed, of those epochs that
    /// had any; `count` tells it of an export's name.
    pub fn told(&self, now: Instant, count: impl Fn(&str) -> u64) -> Vec<LateCommands> {
        let mut ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.retain(|one| now.saturating_duration_since(one.at) < TOLD);
        let counted = ended.iter().map(|one| LateCommands {
            volume: one.volume.clone(),
            epoch: one.epoch,
            commands: count(&one.name),
        });
        counted.filter(|late| late.commands > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_told_for_a_while_if_anything_came() {
        let late = Late::default();
        let begin = Instant::now();
        let volume: VolumeId = "v".parse().unwrap();
        late.ended(&volume, Epoch(4), "one", begin);
        late.ended(&volume, Epoch(5), "two", begin + TOLD / 2);
        late.ended(&volume, Epoch(6), "none", begin + TOLD / 2);
        let count = |name: &str| match name {
            "one" => 1,
            "two" => 2,
            _ => 0,
        };
        let told = |now| -> Vec<_> {
            let told = late.told(now, count).into_iter();
            told.map(|late| (late.epoch.0, late.commands)).collect()
        };
        assert_eq!(told(begin + TOLD / 2), [(4, 1), (5, 2)]);
        assert_eq!(told(begin + TOLD), [(5, 2)]);
        assert_eq!(told(begin + TOLD * 2), []);
    }
}
