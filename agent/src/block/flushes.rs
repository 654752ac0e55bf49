//! Flushes that are asked for at once, made by one of those who ask.
//!
//! A flush makes durable what ended before it began. So whoever asks while one
//! is under way waits for the next, and all who wait then share that: however
//! many ask, two at most are made.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::device::DeviceError;

/// One device's flushes, one at a time.
#[derive(Default)]
pub struct Flushes {
    state: Mutex<State>,
    over: Condvar,
}

#[derive(Default)]
struct State {
    /// How many have begun.
    begun: u64,
    /// The last that has ended well.
    good: u64,
    running: bool,
}

impl Flushes {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when a flush that began after this call has ended: another's, or
    /// one that `flush` makes. When that fails, `usable` must fail from then on:
    /// of a failure the kernel tells once, and all who wait must hear of it.
    ///
    /// # Errors
    /// That of `flush`, or of `usable`.
    pub fn share(
        &self,
        usable: impl Fn() -> Result<(), DeviceError>,
        flush: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut state = self.state();
        let wanted = state.begun + 1;
        while state.good < wanted {
            usable()?;
            if !state.running {
                return self.make(state, flush);
            }
            state = self
                .over
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    fn make(
        &self,
        mut state: MutexGuard<'_, State>,
        flush: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        state.begun += 1;
        state.running = true;
        let number = state.begun;
        drop(state);
        let result = flush();
        let mut state = self.state();
        state.running = false;
        if result.is_ok() {
            state.good = number;
        }
        drop(state);
        self.over.notify_all();
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// One flush under way, and 100 more who ask meanwhile; how each ended, and
    /// how many were made. The flush with the number `bad` fails.
    fn at_once(bad: u32) -> (Vec<bool>, u32) {
        let (flushes, made) = (Flushes::default(), AtomicU32::new(0));
        let (asked, failed) = (AtomicU32::new(0), OnceLock::new());
        let broken = || DeviceError::FlushFailed("broken".to_owned());
        // Who calls this has asked: it knows which flush it waits for.
        let usable = || {
            asked.fetch_add(1, Ordering::SeqCst);
            failed.get().map_or(Ok(()), |()| Err(broken()))
        };
        let ask = || {
            let flush = || {
                let number = made.fetch_add(1, Ordering::SeqCst) + 1;
                while asked.load(Ordering::SeqCst) < 101 {
                    std::thread::yield_now();
                }
                if number == bad {
                    failed.get_or_init(|| ());
                    return Err(broken());
                }
                Ok(())
            };
            flushes.share(usable, flush).is_ok()
        };
        let ends = std::thread::scope(|scope| {
            let first = scope.spawn(ask);
            while made.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            let others: Vec<_> = (0..100).map(|_| scope.spawn(ask)).collect();
            let all = std::iter::once(first).chain(others);
            all.map(|one| one.join().unwrap()).collect()
        });
        (ends, made.into_inner())
    }

    #[test]
    fn those_who_wait_share_one() {
        let (ends, made) = at_once(0);
        assert!(ends.iter().all(|good| *good));
        assert_eq!(made, 2, "the one under way began before the others asked");
    }

    #[test]
    fn one_that_fails_fails_all_who_waited() {
        let (ends, made) = at_once(1);
        assert!(ends.iter().all(|good| !*good));
        assert_eq!(made, 1);
        let (ends, made) = at_once(2);
        assert!(ends[0], "it ended well before");
        assert!(ends[1..].iter().all(|good| !*good));
        assert_eq!(made, 2);
    }

    #[test]
    fn each_one_alone_is_made() {
        let (flushes, made) = (Flushes::default(), AtomicU32::new(0));
        for _ in 0..3 {
            let flush = || Ok(_ = made.fetch_add(1, Ordering::SeqCst));
            flushes.share(|| Ok(()), flush).unwrap();
        }
        assert_eq!(made.into_inner(), 3);
    }
}
