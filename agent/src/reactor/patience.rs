//! Whether a thread looks out for what comes next before it sleeps.
//!
//! To be woken costs more than a small command does: an interrupt to another
//! processor, and in a virtual machine two exits. So a thread looks out for a
//! moment first, as long as that pays: what it looked for came in time, and
//! nobody else wanted the processor. Where it did not pay, the thread sleeps
//! through its next waits, and through ever more of them (KVM's `halt_poll_ns`
//! does the same, Documentation/virt/kvm/halt-polling.rst).

use std::time::Duration;

/// Waits that a thread sleeps through, at most, before it looks out again.
const MOST: u32 = 255;

/// A look-out that took so long without an end was not the thread's own: others
/// had the processor.
const OTHERS: Duration = Duration::from_micros(50);

/// How far looking out has paid.
#[derive(Debug)]
pub struct Patience {
    limit: Duration,
    /// Waits to sleep through from now on.
    asleep: u32,
    /// Waits that were slept through last time.
    penalty: u32,
}

/// How looking out has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sight {
    /// Something came.
    Came,
    /// Nothing came in time.
    Nothing,
    /// Somebody else had the processor meanwhile.
    Others,
}

impl Patience {
    /// That of a thread which looks out for at most `limit`; with none, never.
    pub fn new(limit: Duration) -> Self {
        Self {
            limit,
            asleep: 0,
            penalty: 0,
        }
    }

    /// Looks out, if that has paid and the wait is not shorter, until something
    /// came. `came` is asked again and again, and others may run in between.
    pub fn look_out(&mut self, wait: Option<Duration>, came: impl FnMut() -> bool) {
        if wait.is_none_or(|wait| wait > self.limit) && self.pays() {
            let sight = look(self.limit, came);
            self.saw(sight);
        }
    }

    /// Whether to look out before this wait.
    fn pays(&mut self) -> bool {
        let awake = self.asleep == 0;
        self.asleep = self.asleep.saturating_sub(1);
        awake && !self.limit.is_zero()
    }

    fn saw(&mut self, sight: Sight) {
        self.penalty = match sight {
            Sight::Came => self.penalty / 2,
            Sight::Nothing => (2 * self.penalty + 1).min(MOST),
            // Whom it keeps from the processor may be whom it waits for.
            Sight::Others => MOST,
        };
        self.asleep = self.penalty;
    }
}

fn look(limit: Duration, mut came: impl FnMut() -> bool) -> Sight {
    /// Asked so often between two looks at the clock.
    const TIMES: u32 = 32;
    let begun = std::time::Instant::now();
    let mut last = Duration::ZERO;
    loop {
        for _ in 0..TIMES {
            if came() {
                return Sight::Came;
            }
            std::hint::spin_loop();
        }
        std::thread::yield_now();
        let now = begun.elapsed();
        if now > last + OTHERS {
            return Sight::Others;
        }
        if now > limit {
            return Sight::Nothing;
        }
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_micros(100);

    /// How many of the next waits are slept through.
    fn slept(patience: &mut Patience) -> u32 {
        (0..).take_while(|_| !patience.pays()).count() as u32
    }

    #[test]
    fn one_that_pays_is_done_before_every_wait() {
        let mut patience = Patience::new(LIMIT);
        for _ in 0..3 {
            assert!(patience.pays());
            patience.saw(Sight::Came);
        }
    }

    #[test]
    fn one_that_is_in_vain_is_done_ever_more_rarely_and_again_as_it_pays() {
        let mut patience = Patience::new(LIMIT);
        for expected in [0, 1, 3, 7, 15, 31, 63, 127, 255, 255] {
            assert_eq!(slept(&mut patience), expected);
            patience.saw(Sight::Nothing);
        }
        slept(&mut patience);
        for expected in [127, 63, 31, 15, 7, 3, 1, 0, 0] {
            patience.saw(Sight::Came);
            assert_eq!(slept(&mut patience), expected);
        }
        patience.saw(Sight::Others);
        assert_eq!(slept(&mut patience), MOST);
    }

    #[test]
    fn without_a_limit_nobody_looks_out() {
        let mut patience = Patience::new(Duration::ZERO);
        assert!((0..1000).all(|_| !patience.pays()));
        patience.look_out(None, || panic!("nobody asks"));
    }

    #[test]
    fn a_look_out_ends_when_it_came_and_at_the_limit() {
        let mut asked = 0;
        let came = || {
            asked += 1;
            asked == 3
        };
        assert_eq!(look(Duration::from_secs(60), came), Sight::Came);
        assert_eq!(asked, 3);
        assert_ne!(look(LIMIT, || false), Sight::Came);
    }
}
