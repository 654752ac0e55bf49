//! What registered readers send over TCP, by ticket: the kernel counts the
//! processes that are watched, and what one of them had sent when it ended is
//! kept here.
//!
//! Who is watched follows the registrations at each look. Who was, the kernel
//! itself says, so a change that it did not take is made again. A process that
//! joins a registered cgroup and ends between two looks is not counted; nor is
//! what a kernel before 6.5 sends with sendfile or its own TLS.

use std::collections::{HashMap, HashSet};

use drover_ebpf::Sent;

use super::EvidenceError;
use super::loader::{Kernel, add_sent};
use crate::ids::TicketId;

/// Processes by the ticket that stands for them.
pub type ByTicket = HashMap<TicketId, HashSet<u32>>;

/// Who is watched, and what was counted of those that have ended.
#[derive(Debug, Default)]
pub struct Sends {
    watched: ByTicket,
    ended: HashMap<TicketId, Sent>,
}

/// What the kernel has to be told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Change {
    watch: HashSet<u32>,
    unwatch: HashSet<u32>,
}

impl Sends {
    /// Watches these processes and no others, and gives what was sent so far.
    pub fn follow(
        &mut self,
        kernel: &Kernel,
        wanted: ByTicket,
    ) -> Result<HashMap<TicketId, Sent>, EvidenceError> {
        let counts = kernel.sent()?;
        let (change, sums) = self.turn(wanted, &counts);
        for tgid in change.unwatch {
            kernel.unwatch(tgid)?;
        }
        for tgid in change.watch {
            kernel.watch(tgid)?;
        }
        Ok(sums)
    }

    fn turn(
        &mut self,
        wanted: ByTicket,
        counts: &HashMap<u32, Sent>,
    ) -> (Change, HashMap<TicketId, Sent>) {
        let of = |tgid: &u32| counts.get(tgid).copied().unwrap_or_default();
        self.ended.retain(|ticket, _| wanted.contains_key(ticket));
        for (ticket, now) in &wanted {
            let before = self.watched.get(ticket).into_iter().flatten();
            for gone in before.filter(|tgid| !now.contains(tgid)) {
                let sum = self.ended.entry(ticket.clone()).or_default();
                *sum = add_sent(*sum, of(gone));
            }
        }
        let before: HashSet<u32> = counts.keys().copied().collect();
        let after: HashSet<u32> = wanted.values().flatten().copied().collect();
        let sums = wanted.iter().map(|(ticket, tgids)| {
            let ended = self.ended.get(ticket).copied().unwrap_or_default();
            let sum = tgids.iter().map(of).fold(ended, add_sent);
            (ticket.clone(), sum)
        });
        let sums = sums.collect();
        self.watched = wanted;
        let change = Change {
            watch: &after - &before,
            unwatch: &before - &after,
        };
        (change, sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket() -> TicketId {
        "t".parse().unwrap()
    }

    fn of(tgids: &[u32]) -> ByTicket {
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
        let (change, sums) = sends.turn(ByTicket::new(), &counts(&[]));
        assert_eq!((change, sums.len()), (Change::default(), 0));
        let (_, sums) = sends.turn(of(&[7]), &counts(&[]));
        assert_eq!(sums[&ticket()], Sent::default());
    }
}
