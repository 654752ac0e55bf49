//! Jobs in lanes: each lane first come first served and with a bound of its own,
//! the lanes in turn. So a lane whose jobs hang holds so many threads and no more,
//! and nobody else's wait behind it.
//!
//! All jobs are in one table, so that nothing is allocated for one unless there
//! are more than ever before.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use slab::Slab;

/// Jobs of one lane that are under way at once.
pub const AT_ONCE: usize = 32;

struct Waiting<T> {
    job: T,
    next: Option<usize>,
}

#[derive(Default)]
struct Lane {
    /// The first and the last that wait.
    ends: Option<(usize, usize)>,
    waiting: usize,
    running: usize,
}

impl Lane {
    /// Jobs that may begin now.
    fn ready(&self) -> usize {
        self.waiting.min(AT_ONCE - self.running)
    }
}

/// Jobs that wait, and how many are under way.
pub struct Lanes<K, T> {
    lanes: HashMap<K, Lane>,
    jobs: Slab<Waiting<T>>,
    /// The lanes of which a job may begin, each once.
    turns: VecDeque<K>,
    ready: usize,
}

impl<K: Copy + Eq + Hash, T> Lanes<K, T> {
    /// None, with room for so many jobs.
    pub fn new(jobs: usize) -> Self {
        Self {
            lanes: HashMap::with_capacity(jobs),
            jobs: Slab::with_capacity(jobs),
            turns: VecDeque::with_capacity(jobs),
            ready: 0,
        }
    }

    /// Jobs that may begin now.
    pub fn ready(&self) -> usize {
        self.ready
    }

    /// Adds a job to a lane.
    pub fn push(&mut self, key: K, job: T) {
        let number = self.jobs.insert(Waiting { job, next: None });
        self.change(key, |lane, jobs| {
            let first = match lane.ends {
                Some((first, last)) => {
                    jobs[last].next = Some(number);
                    first
                }
                None => number,
            };
            lane.ends = Some((first, number));
            lane.waiting += 1;
        });
    }

    /// The next job, which begins now; [`Self::ended`] must be called with its lane.
    pub fn take(&mut self) -> Option<(K, T)> {
        let key = self.turns.pop_front()?;
        let lane = self.lanes.get_mut(&key)?;
        let (first, last) = lane.ends?;
        let Waiting { job, next } = self.jobs.remove(first);
        lane.ends = next.map(|next| (next, last));
        lane.waiting -= 1;
        lane.running += 1;
        self.ready -= 1;
        if lane.ready() > 0 {
            self.turns.push_back(key);
        }
        Some((key, job))
    }

    /// A job of this lane has ended.
    pub fn ended(&mut self, key: K) {
        self.change(key, |lane, _| lane.running -= 1);
    }

    fn change(&mut self, key: K, act: impl FnOnce(&mut Lane, &mut Slab<Waiting<T>>)) {
        let lane = self.lanes.entry(key).or_default();
        let before = lane.ready();
        act(lane, &mut self.jobs);
        let after = lane.ready();
        self.ready = self.ready + after - before;
        if before == 0 && after > 0 {
            self.turns.push_back(key);
        }
        if lane.running == 0 && lane.waiting == 0 {
            self.lanes.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_has_its_turn_its_order_and_its_bound() {
        let mut lanes = Lanes::new(4);
        for job in 0..100 {
            lanes.push('a', job);
        }
        for job in 100..102 {
            lanes.push('b', job);
        }
        assert_eq!(lanes.ready(), AT_ONCE + 2);
        let taken: Vec<_> = std::iter::from_fn(|| lanes.take()).collect();
        assert_eq!(taken[..4], [('a', 0), ('b', 100), ('a', 1), ('b', 101)]);
        assert_eq!(taken.len(), AT_ONCE + 2);
        assert_eq!(taken.last(), Some(&('a', 31)));
        assert_eq!((lanes.ready(), lanes.take()), (0, None));
        lanes.push('b', 102);
        lanes.ended('a');
        assert_eq!(lanes.ready(), 2);
        assert_eq!(lanes.take(), Some(('b', 102)));
        assert_eq!(lanes.take(), Some(('a', 32)));
        assert_eq!(lanes.take(), None);
        let mut running = vec!['a'; AT_ONCE];
        running.extend(['b'; 3]);
        while let Some(key) = running.pop() {
            lanes.ended(key);
            running.extend(lanes.take().map(|(key, _)| key));
        }
        assert!(lanes.lanes.is_empty() && lanes.jobs.is_empty() && lanes.turns.is_empty());
        assert_eq!(lanes.ready(), 0);
    }
}
