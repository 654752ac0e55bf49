//! Work that goes on to its end, whoever has stopped waiting for it, and once
//! for all who ask for it meanwhile.
//!
//! For what is asked for again and again until it is done, by callers that give
//! up after a while, and that must neither be cut in the middle nor pile up.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Work by its key. What has ended with nobody to hear of it is kept for the
/// next who asks.
pub struct Joined<K, T> {
    works: Mutex<HashMap<K, watch::Receiver<Option<T>>>>,
}

impl<K, T> Default for Joined<K, T> {
    fn default() -> Self {
        Self {
            works: Mutex::default(),
        }
    }
}

impl<K, T> fmt::Debug for Joined<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joined").finish_non_exhaustive()
    }
}

impl<K: Eq + Hash, T: Clone + Send + Sync + 'static> Joined<K, T> {
    /// What the work with this key comes to; `begin` gives it where there is
    /// none. None: it panicked.
    pub async fn join<F>(&self, key: K, begin: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let start = || {
            let (tell, told) = watch::channel(None);
            let work = begin();
            tokio::spawn(async move {
                tell.send_replace(Some(work.await));
            });
            told
        };
        let mut told = self.works().entry(key).or_insert_with(start).clone();
        let ended = told.wait_for(Option::is_some).await;
        let result = ended.ok().and_then(|result| result.clone());
        self.works().retain(|_, work| !work.same_channel(&told));
        result
    }

    fn works(&self) -> MutexGuard<'_, HashMap<K, watch::Receiver<Option<T>>>> {
        // No step of a change to it can panic.
        self.works.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use tokio::sync::Notify;

    use super::*;

    struct Scene {
        joined: Joined<&'static str, u32>,
        begun: Arc<AtomicU32>,
        go: Arc<Notify>,
    }

    impl Scene {
        fn new() -> Self {
            Self {
                joined: Joined::default(),
                begun: Arc::default(),
                go: Arc::default(),
            }
        }

        async fn ask(&self, key: &'static str) -> Option<u32> {
            let (begun, go) = (Arc::clone(&self.begun), Arc::clone(&self.go));
            let work = || async move {
                let number = begun.fetch_add(1, Ordering::Relaxed) + 1;
                go.notified().await;
                number
            };
            self.joined.join(key, work).await
        }

        /// One who asks and gives up.
        async fn in_vain(&self, key: &'static str) {
            let asked = tokio::time::timeout(Duration::from_millis(20), self.ask(key));
            assert!(asked.await.is_err());
        }
    }

    #[tokio::test]
    async fn who_asks_again_joins_what_is_under_way() {
        let scene = Scene::new();
        scene.in_vain("a").await;
        scene.in_vain("a").await;
        scene.go.notify_one();
        let both = tokio::join!(scene.ask("a"), scene.ask("a"));
        assert_eq!(both, (Some(1), Some(1)));
        scene.go.notify_one();
        assert_eq!(scene.ask("a").await, Some(2), "that one had been told");
    }

    #[tokio::test]
    async fn what_ended_unheard_is_told_once() {
        let scene = Scene::new();
        scene.in_vain("a").await;
        scene.go.notify_one();
        tokio::task::yield_now().await;
        scene.in_vain("b").await;
        assert_eq!(scene.ask("a").await, Some(1));
        scene.in_vain("a").await;
        assert_eq!(scene.begun.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn work_that_panics_is_no_ones_for_ever() {
        let joined = Joined::default();
        let lost: Option<u32> = joined.join("a", || async { panic!("planted") }).await;
        assert_eq!(lost, None);
        assert_eq!(joined.join("a", || async { 7 }).await, Some(7));
    }
}
