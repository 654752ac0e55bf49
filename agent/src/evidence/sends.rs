//! What backup streams send over TCP, by their owners: the kernel counts the
//! processes that are watched, and what one of them had sent when it ended is
//! kept here.
//!
//! Who is watched follows the streams at each look, so each is counted from the
//! first look at it on. Who was, the kernel itself says, so a change that it did
//! not take is made again. A process that joins a registered cgroup and ends
//! between two looks is not counted; nor is what a kernel before 6.5 sends with
//! sendfile or its own TLS.

use std::collections::{HashMap, HashSet};

use drover_ebpf::Sent;

use super::EvidenceError;
use super::loader::{Kernel, add_sent};
use super::streams::Owner;

/// Processes by the owner of their streams.
pub type ByOwner = HashMap<Owner, HashSet<u32>>;

/// Who is watched, and what was counted of those that have ended.
#[derive(Debug, Default)]
pub struct Sends {
    watched: ByOwner,
    ended: HashMap<Owner, Sent>,
}

/// What the kernel has to be told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    watch: HashSet<u32>,
    unwatch: HashSet<u32>,
}

impl Sends {
    /// Watches these processes and no others, and gives what was sent so far; of
    /// who has a process that cannot be watched, nothing.
    pub fn follow(
        &mut self,
        kernel: &Kernel,
        wanted: ByOwner,
    ) -> Result<HashMap<Owner, Sent>, EvidenceError> {
        let counts = kernel.sent()?;
        let (change, mut sums) = self.turn(wanted, &counts);
        for tgid in change.unwatch {
            kernel.unwatch(tgid)?;
        }
        // What fails is tried again at the next look.
        let watch = change.watch.into_iter();
        let failed = watch.filter_map(|tgid| Some((tgid, kernel.watch(tgid).err()?)));
        let failed: HashMap<_, _> = failed.collect();
        if let Some(error) = failed.values().next() {
            tracing::warn!(processes = failed.len(), %error, "evidence: what some processes send is not counted");
            sums.retain(|owner, _| {
                let mut tgids = self.watched[owner].iter();
                !tgids.any(|tgid| failed.contains_key(tgid))
            });
        }
        Ok(sums)
    }

    fn turn(
        &mut self,
        wanted: ByOwner,
        counts: &HashMap<u32, Sent>,
    ) -> (Change, HashMap<Owner, Sent>) {
        let of = |tgid: &u32| counts.get(tgid).copied().unwrap_or_default();
        self.ended.retain(|owner, _| wanted.contains_key(owner));
        let mut kept = HashSet::new();
        for (owner, now) in &wanted {
            let before = self.watched.get(owner).into_iter().flatten();
            let (stays, gone): (Vec<u32>, Vec<u32>) = before.partition(|tgid| now.contains(tgid));
            kept.extend(stays);
            for gone in gone {
                let sum = self.ended.entry(owner.clone()).or_default();
                *sum = add_sent(*sum, of(&gone));
            }
        }
        // Under an id that no owner keeps there is another process now.
        let counted: HashSet<u32> = counts.keys().copied().collect();
        let kept = &kept & &counted;
        let after: HashSet<u32> = wanted.values().flatten().copied().collect();
        let sums = wanted.iter().map(|(owner, tgids)| {
            let ended = self.ended.get(owner).copied().unwrap_or_default();
            let sum = (tgids & &kept).iter().map(of).fold(ended, add_sent);
            (owner.clone(), sum)
        });
        let sums = sums.collect();
        self.watched = wanted;
        let change = Change {
            watch: &after - &kept,
            unwatch: &counted - &after,
        };
        (change, sums)
    }
}

#[cfg(test)]
mod tests {
    use super::super::process::Process;
    use super::*;

    fn ticket() -> Owner {
        Owner::Ticket("t".parse().unwrap())
    }

    fn of(tgids: &[u32]) -> ByOwner {
        HashMap::from([(ticket(), tgids.iter().copied().collect())])
    }

    fn counts(counts: &[(u32, u64)]) -> HashMap<u32, Sent> {
        let sent = |&(tgid, bytes)| {
            (
                tgid,
                Sent {
                    bytes,
                    last_ns: bytes,
                },
            )
        };
        counts.iter().map(sent).collect()
    }

    #[test]
    fn what_an_ended_process_had_sent_stays_with_its_ticket() {
        let mut sends = Sends::default();
        let (change, sums) = sends.turn(of(&[7, 8]), &counts(&[]));
        assert_eq!(change.watch, HashSet::from([7, 8]));
        assert_eq!(sums[&ticket()], Sent::default());

        let (change, sums) = sends.turn(of(&[8, 9]), &counts(&[(7, 100), (8, 5)]));
        assert_eq!(change.watch, HashSet::from([9]));
        assert_eq!(change.unwatch, HashSet::from([7]));
        let sent = Sent {
            bytes: 105,
            last_ns: 100,
        };
        assert_eq!(sums[&ticket()], sent);

        // 7 again is another process, whose count begins at nothing.
        let (_, sums) = sends.turn(of(&[7, 8, 9]), &counts(&[(8, 6), (9, 1)]));
        assert_eq!(sums[&ticket()].bytes, 107);
    }

    #[test]
    fn what_the_kernel_did_not_take_is_told_again() {
        let mut sends = Sends::default();
        sends.turn(of(&[7, 8]), &counts(&[]));
        let (change, _) = sends.turn(of(&[7, 8]), &counts(&[(8, 1), (9, 1)]));
        assert_eq!(change.watch, HashSet::from([7]));
        assert_eq!(change.unwatch, HashSet::from([9]));
    }

    #[test]
    fn a_ticket_that_ended_is_forgotten() {
        let mut sends = Sends::default();
        sends.turn(of(&[7]), &counts(&[]));
        sends.turn(of(&[]), &counts(&[(7, 100)]));
        let (change, sums) = sends.turn(ByOwner::new(), &counts(&[]));
        assert_eq!((change, sums.len()), (Change::default(), 0));
        let (_, sums) = sends.turn(of(&[7]), &counts(&[]));
        assert_eq!(sums[&ticket()], Sent::default());
    }

    #[test]
    fn an_id_used_again_by_another_owner_begins_at_nothing() {
        let tool = |began| Owner::Tool {
            name: "restic".to_owned(),
            process: Process { pid: 7, began },
        };
        let of = |began| ByOwner::from([(tool(began), HashSet::from([7]))]);
        let mut sends = Sends::default();
        sends.turn(of(1), &counts(&[]));
        let (change, sums) = sends.turn(of(1), &counts(&[(7, 100)]));
        assert_eq!((change, sums[&tool(1)].bytes), (Change::default(), 100));
        let (change, sums) = sends.turn(of(2), &counts(&[(7, 100)]));
        assert_eq!(change.watch, HashSet::from([7]));
        assert_eq!(sums, HashMap::from([(tool(2), Sent::default())]));
        // Registered beside its name: what it goes on with is counted on.
        let mut both = of(2);
        both.insert(ticket(), HashSet::from([7]));
        let (change, sums) = sends.turn(both, &counts(&[(7, 5)]));
        assert_eq!((change, sums[&tool(2)].bytes), (Change::default(), 5));
    }
}
