//! The connections of a listener that have not shown yet that they are a
//! host's: few, whoever knocks.
//!
//! Beyond the bound one has to go for the newest. It is of the source that has
//! most of them, and there the oldest: a host connects within milliseconds, so
//! who waits long is no host, and who comes from elsewhere is not touched by
//! what one source does.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::link::Waker;

/// How many there may be.
pub const HALF_OPEN: usize = 256;

/// The connections that have not passed their handshake.
#[derive(Default)]
pub struct HalfOpen {
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    next: u64,
    taken: BTreeMap<u64, Arc<Taken>>,
    /// The numbers of each source's.
    of: HashMap<IpAddr, BTreeSet<u64>>,
}

/// A place, as the one who may want it back sees it.
struct Taken {
    number: u64,
    source: IpAddr,
    wanted: AtomicBool,
    waker: OnceLock<Waker>,
}

/// A connection's place among those that have not passed their handshake. It
/// is given up when this is dropped: when the connection has passed, or ended.
pub struct Place {
    taken: Arc<Taken>,
    of: Arc<HalfOpen>,
}

/// Tells a place's connection when the place is wanted back.
pub struct Caller(Arc<Taken>);

impl HalfOpen {
    fn places(&self) -> MutexGuard<'_, Places> {
        // No code panics while it holds the lock.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more from `source`, and whether another has to go for it.
    pub fn enter(self: &Arc<Self>, source: IpAddr) -> (Place, Caller, bool) {
        let mut places = self.places();
        let number = places.next;
        places.next += 1;
        let taken = Arc::new(Taken {
            number,
            source,
            wanted: AtomicBool::new(false),
            waker: OnceLock::new(),
        });
        places.taken.insert(number, Arc::clone(&taken));
        places.of.entry(source).or_default().insert(number);
        let goes = (places.taken.len() > HALF_OPEN)
            .then(|| places.dispensable())
            .flatten();
        if let Some(goes) = &goes {
            places.leave(goes);
        }
        drop(places);
        if let Some(goes) = &goes {
            goes.want();
        }
        let of = Arc::clone(self);
        let caller = Caller(Arc::clone(&taken));
        (Place { taken, of }, caller, goes.is_some())
    }

    /// How many places are taken.
    pub fn taken(&self) -> usize {
        self.places().taken.len()
    }
}

impl Places {
    /// The oldest of the source that has most.
    fn dispensable(&self) -> Option<Arc<Taken>> {
        let most = self.of.values().max_by_key(|numbers| numbers.len())?;
        let oldest = most.first()?;
        self.taken.get(oldest).map(Arc::clone)
    }

    fn leave(&mut self, taken: &Taken) {
        self.taken.remove(&taken.number);
        if let Some(numbers) = self.of.get_mut(&taken.source) {
            numbers.remove(&taken.number);
            if numbers.is_empty() {
                self.of.remove(&taken.source);
            }
        }
    }
}

impl Taken {
    fn want(&self) {
        self.wanted.store(true, Ordering::Release);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }
}

impl Caller {
    /// Wakes the connection by `waker` when its place is wanted back, and now
    /// if that was so before.
    pub fn wakes(self, waker: Waker) {
        let waker = self.0.waker.get_or_init(|| waker);
        if self.0.wanted.load(Ordering::Acquire) {
            waker.wake();
        }
    }
}

impl Place {
    /// Whether it is wanted back: the connection is to end.
    pub fn wanted(&self) -> bool {
        self.taken.wanted.load(Ordering::Acquire)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.places().leave(&self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(last: u8) -> IpAddr {
        [127, 0, 0, last].into()
    }

    #[test]
    fn the_oldest_of_the_busiest_source_goes() {
        let half_open = Arc::new(HalfOpen::default());
        let (host, _, _) = half_open.enter(from(1));
        let mut flood = Vec::new();
        for number in 0..3 * HALF_OPEN {
            let source = from(2 + u8::try_from(number % 3).unwrap());
            let (place, _, evicts) = half_open.enter(source);
            assert_eq!(evicts, number + 1 >= HALF_OPEN, "{number}");
            flood.push(place);
        }
        assert!(!host.wanted(), "another source's flood is not its concern");
        assert_eq!(half_open.taken(), HALF_OPEN);
        let left = flood.iter().filter(|place| !place.wanted()).count();
        assert_eq!(left, HALF_OPEN - 1);
        assert!(
            flood[..3 * HALF_OPEN - HALF_OPEN - 2]
                .iter()
                .all(Place::wanted)
        );
        drop(flood);
        assert_eq!(half_open.taken(), 1);
        drop(host);
        assert_eq!(half_open.taken(), 0);
        assert!(half_open.places().of.is_empty());
    }

    #[test]
    fn who_is_wanted_is_woken_whenever_its_waker_comes() {
        let half_open = Arc::new(HalfOpen::default());
        let woken = Arc::new(AtomicBool::new(false));
        let waker = || {
            let woken = Arc::clone(&woken);
            Waker::new(Arc::new(move || woken.store(true, Ordering::SeqCst)))
        };
        let (_early, caller, _) = half_open.enter(from(1));
        caller.wakes(waker());
        let (_late, late, _) = half_open.enter(from(1));
        assert!(!woken.load(Ordering::SeqCst));
        let _rest: Vec<_> = (2..HALF_OPEN).map(|_| half_open.enter(from(1)).0).collect();
        let _first = half_open.enter(from(1));
        assert!(woken.swap(false, Ordering::SeqCst));
        let _second = half_open.enter(from(1));
        late.wakes(waker());
        assert!(woken.load(Ordering::SeqCst));
    }
}
