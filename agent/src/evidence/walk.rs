//! Walks of the kernel's over all descriptors or all mappings, read to their end.
//!
//! A walk may hang: that over mappings takes each process's mmap lock, which a
//! process keeps others from while one of its threads is in a fault on a disk
//! whose home is away. So nothing else of the agent may wait for a walk. Walks
//! take turns, since they share one target, and a turn is waited for until a
//! deadline; nothing but the turn is held while one is read.

use std::io::{ErrorKind, Read};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whose turn it is.
#[derive(Debug, Default)]
pub struct Turns {
    under_way: Mutex<Option<Walk>>,
    ended: Condvar,
}

#[derive(Debug)]
struct Walk {
    program: &'static str,
    since: Instant,
    deadline: Instant,
}

/// A turn; it ends when this is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Turns);

/// Why a walk gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The one before has not ended.
    #[error("a walk over {program} has not ended for {lasted:?}; see processes in D state")]
    Hangs {
        /// Over what.
        program: &'static str,
        /// For how long.
        lasted: Duration,
    },
    /// There was more than could be seen in the time.
    #[error("it did not come to its end in time")]
    Late,
    /// The kernel would not go on.
    #[error("read: {0}")]
    Read(#[from] std::io::Error),
}

impl Turns {
    fn under_way(&self) -> MutexGuard<'_, Option<Walk>> {
        // Each change is one assignment.
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A turn for a walk that is to end by the deadline, waited for until then.
    /// One that is past its own deadline is not waited for.
    pub fn take(&self, program: &'static str, deadline: Instant) -> Result<Turn<'_>, WalkError> {
        let mut under_way = self.under_way();
        while let Some(walk) = &*under_way {
            let now = Instant::now();
            let end = deadline.min(walk.deadline);
            if now >= end {
                return Err(walk.hangs(now));
            }
            let waited = self.ended.wait_timeout(under_way, end - now);
            (under_way, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        *under_way = Some(Walk {
            program,
            since: Instant::now(),
            deadline,
        });
        Ok(Turn(self))
    }

    /// What the walk that is under way, if one is, gives as the reason of who waits for it.
    pub fn waits_for(&self) -> Option<WalkError> {
        let walk = self.under_way();
        walk.as_ref().map(|walk| walk.hangs(Instant::now()))
    }
}

impl Walk {
    fn hangs(&self, now: Instant) -> WalkError {
        WalkError::Hangs {
            program: self.program,
            lasted: Duration::from_secs(now.duration_since(self.since).as_secs()),
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.under_way() = None;
        self.0.ended.notify_one();
    }
}

/// Reads a walk to its end. One that has shown nothing among a million objects
/// pauses with EAGAIN, and goes on at the next read (bpf_seq_read in
/// kernel/bpf/bpf_iter.c).
pub fn read(walk: &mut impl Read, deadline: Instant) -> Result<Vec<u8>, WalkError> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match walk.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend(&buffer[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Err(WalkError::Late);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    fn soon() -> Instant {
        Instant::now() + SOON
    }

    #[test]
    fn a_walk_that_hangs_keeps_others_only_until_their_deadline() {
        let turns = Turns::default();
        assert!(turns.waits_for().is_none());
        let late = Instant::now() + Duration::from_secs(60);
        let turn = turns.take("mappings", late).unwrap();
        let error = turns.take("descriptors", soon()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a walk over mappings has not ended for 0ns; see processes in D state"
        );
        assert!(matches!(turns.waits_for(), Some(WalkError::Hangs { .. })));
        drop(turn);
        let turn = turns.take("descriptors", Instant::now()).unwrap();
        // This one is late already.
        assert!(turns.take("mappings", late).is_err());
        drop(turn);
        drop(turns.take("mappings", soon()).unwrap());
    }

    #[test]
    fn turns_follow_each_other() {
        let turns = Turns::default();
        let late = Instant::now() + Duration::from_secs(60);
        let inside = Mutex::new(());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let _turn = turns.take("mappings", late).unwrap();
                        drop(inside.try_lock().expect("alone in a turn"));
                    }
                });
            }
        });
    }

    /// Answers what it was given, then its end.
    struct Answers(Vec<io::Result<usize>>);

    impl Read for Answers {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.0.pop().unwrap_or(Ok(0))?;
            buffer[..n].fill(7);
            Ok(n)
        }
    }

    #[test]
    fn a_pause_is_not_the_end() {
        let pause = || Err(ErrorKind::WouldBlock.into());
        let mut walk = Answers(vec![pause(), Ok(3), pause(), pause(), Ok(2), pause()]);
        assert_eq!(read(&mut walk, soon()).unwrap(), [7; 5]);
        let mut broken = Answers(vec![Err(ErrorKind::OutOfMemory.into())]);
        assert!(matches!(read(&mut broken, soon()), Err(WalkError::Read(_))));
    }

    #[test]
    fn a_walk_without_end_is_given_up_at_its_deadline() {
        let mut walk = io::repeat(1);
        assert!(matches!(read(&mut walk, soon()), Err(WalkError::Late)));
    }
}
