use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;

#[tokio::test]
async fn closing_counts_those_inside_and_keeps_others_out() {
    let gate = Gate::new();
    let first = gate.enter().unwrap();
    let second = gate.enter().unwrap();
    assert_eq!(gate.close(), 2);
    assert!(gate.enter().is_none());
    assert!(gate.enter().is_none());
    assert_eq!(gate.late(), 2);
    assert_eq!(gate.settled(Duration::ZERO).await, Err(2));
    drop(first);
    assert_eq!(gate.settled(Duration::ZERO).await, Err(1));
    assert_eq!(gate.close(), 1);
    drop(second);
    assert!(gate.settled(Duration::ZERO).await.is_ok());
    assert!(gate.enter().is_none());
}

#[tokio::test]
async fn an_open_gate_never_settles() {
    let gate = Gate::new();
    assert_eq!(gate.settled(Duration::from_millis(1)).await, Err(0));
    assert!(gate.enter().is_some());
}

#[tokio::test]
async fn a_waiter_is_woken_by_the_last_to_leave() {
    let gate = Gate::new();
    let pass = gate.enter().unwrap();
    gate.close();
    let waiter = {
        let gate = Arc::clone(&gate);
        tokio::spawn(async move { gate.settled(Duration::from_secs(30)).await })
    };
    tokio::task::yield_now().await;
    drop(pass);
    assert!(waiter.await.unwrap().is_ok());
}

/// What was entered before the closing is in its count or has left by itself;
/// nothing is entered after it.
#[test]
fn threads_that_race_with_the_closing_are_counted_exactly() {
    for round in 0..200 {
        let gate = Gate::new();
        let closed = AtomicBool::new(false);
        let held = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| {
                    let (gate, closed) = (&gate, &closed);
                    scope.spawn(move || {
                        let mut held = Vec::new();
                        loop {
                            let after = closed.load(Ordering::SeqCst);
                            match gate.enter() {
                                Some(pass) => {
                                    assert!(!after, "entered after the gate had closed");
                                    held.push(pass);
                                }
                                None => return held,
                            }
                        }
                    })
                })
                .collect();
            if round % 2 == 0 {
                std::thread::yield_now();
            }
            let inside = gate.close();
            closed.store(true, Ordering::SeqCst);
            let held: Vec<_> = workers
                .into_iter()
                .flat_map(|w| w.join().unwrap())
                .collect();
            assert_eq!(held.len(), inside as usize);
            held
        });
        assert_eq!(gate.late(), 4);
        drop(held);
        assert_eq!(gate.inside(), 0);
        assert!(gate.settled_at.get().is_some());
    }
}

proptest! {
    /// Any order of entering, leaving and closing gives what a plain counter gives.
    #[test]
    fn the_gate_is_a_counter_with_a_latch(steps in proptest::collection::vec(0u8..4, 0..60)) {
        let gate = Gate::new();
        let mut passes = Vec::new();
        let (mut closed, mut late) = (false, 0);
        for step in steps {
            match step {
                0 | 1 => match gate.enter() {
                    Some(pass) => {
                        prop_assert!(!closed);
                        passes.push(pass);
                    }
                    None => {
                        prop_assert!(closed);
                        late += 1;
                    }
                },
                2 => drop(passes.pop()),
                _ => {
                    prop_assert_eq!(gate.close() as usize, passes.len());
                    closed = true;
                }
            }
            prop_assert_eq!(gate.inside() as usize, passes.len());
            prop_assert_eq!(gate.late(), late);
            prop_assert_eq!(gate.is_closed(), closed);
        }
    }
}
