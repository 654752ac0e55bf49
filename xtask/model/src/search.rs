//! The protocol as a [`Model`], what must hold of it, and one search of it.
//!
//! Two kinds of property. What must never happen is checked in each state that
//! can come up, or noted by the step in which it happens. What must come in the
//! end ("a grant", "the end of a fence") is not left to the checker's own
//! `eventually`, which follows no cycle and so cannot tell one that goes on for
//! ever from one that ends. It is checked thus: from *every* state that can
//! come up and in which a node waits for its grant, the grant can be reached by
//! steps that are nobody's wish and no fault ([`Protocol::progress`]): messages
//! arrive, calls go on, writes land, dead processes start. The states so reached
//! are themselves among those checked, so no set of states without a grant is
//! closed under these steps: there is no deadlock and no livelock, and a fair
//! run (what is possible again and again happens) comes to its grant once
//! faults and contrary wishes stop.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use drover::attach::state::Stage;
use serde::Serialize;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::bounds::Bounds;
use crate::protocol::Protocol;
use crate::records::OnDisk;
use crate::state::{Action, Fault, Serving, State};

/// A search, to be checked.
pub struct Search {
    /// What can happen.
    pub protocol: Protocol,
    granted: Reachable,
    fenced: Reachable,
    looked_at: AtomicU64,
}

impl Search {
    /// Of these bounds.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            protocol: Protocol::new(bounds),
            granted: Reachable::default(),
            fenced: Reachable::default(),
            looked_at: AtomicU64::new(0),
        }
    }

    fn stage(&self, state: &State) -> Stage {
        self.protocol.product.facts(state.record).stage
    }

    /// Whether the arbiter and the home agree. Only an old copy of the store
    /// may speak of a grant that has ended.
    fn one_grant(&self, state: &State) -> bool {
        let product = &self.protocol.product;
        let open = product.disk(state.disk).open;
        let facts = product.facts(state.record);
        let of_record = match state.serving {
            Serving::Open(serves) => matches!(open, OnDisk::Open(epoch, _) if epoch == serves),
            _ => true,
        };
        let of_store = match facts.holder {
            Some(node) if facts.stage == Stage::Attached => open == OnDisk::Open(facts.epoch, node),
            _ => true,
        };
        of_record && (of_store || state.put_back > 0)
    }

    /// Whether what the arbiter clears the way for has a receipt that is true:
    /// while an epoch is to be opened, none before it is on. A running process
    /// of an old copy fences anew before it asks for an export.
    fn cleared(&self, state: &State) -> bool {
        let product = &self.protocol.product;
        let facts = product.facts(state.record);
        if facts.stage != Stage::Exporting || state.put_back > 0 {
            return true;
        }
        let ended = match product.disk(state.disk).open {
            OnDisk::Closed => true,
            OnDisk::Closing(of) | OnDisk::Open(of, _) => of >= facts.epoch,
        };
        ended && state.under_way().all(|write| write.epoch >= facts.epoch)
    }

    fn grant_comes(&self, state: &State) -> bool {
        let waits = match self.stage(state) {
            Stage::Handing | Stage::Exporting => true,
            Stage::Attached => state.put_back == 0,
            _ => false,
        };
        // What a killed agent left half restored is nobody's, until it is deleted.
        let half = self.protocol.product.disk(state.disk).restoring && !state.restoring;
        let waits = waits && !half;
        !waits
            || self
                .granted
                .from(&self.protocol, state, |state| self.protocol.granted(state))
    }

    fn fence_ends(&self, state: &State) -> bool {
        self.stage(state) != Stage::Closing
            || self.fenced.from(&self.protocol, state, |state| {
                self.stage(state) == Stage::Idle
            })
    }
}

/// The states from which a goal is known to be reached by progress alone.
#[derive(Default)]
struct Reachable {
    known: [Mutex<HashSet<u64>>; 32],
}

impl Reachable {
    fn shelf(&self, print: u64) -> &Mutex<HashSet<u64>> {
        &self.known[(print >> 59) as usize]
    }

    fn knows(&self, print: u64) -> bool {
        self.shelf(print)
            .lock()
            .expect("no thread panicked")
            .contains(&print)
    }

    fn learn(&self, print: u64) {
        self.shelf(print)
            .lock()
            .expect("no thread panicked")
            .insert(print);
    }

    /// Walks depth first, and remembers the way when it comes to the goal.
    fn from(&self, protocol: &Protocol, from: &State, goal: impl Fn(&State) -> bool) -> bool {
        if self.knows(print(from)) {
            return true;
        }
        let mut seen = HashSet::from([print(from)]);
        let mut way = vec![(*from, self.next(protocol, from))];
        while let Some((state, left)) = way.last_mut() {
            if goal(state) || self.knows(print(state)) {
                way.iter().for_each(|(state, _)| self.learn(print(state)));
                return true;
            }
            match left.pop() {
                Some(next) if seen.insert(print(&next)) => {
                    let left = self.next(protocol, &next);
                    way.push((next, left));
                }
                Some(_) => {}
                None => {
                    way.pop();
                }
            }
        }
        false
    }

    fn next(&self, protocol: &Protocol, state: &State) -> Vec<State> {
        let mut actions = Vec::new();
        protocol.progress(state, &mut actions);
        let next = actions.into_iter();
        next.filter_map(|action| protocol.step(state, action))
            .collect()
    }
}

fn print(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// The properties' names.
pub mod named {
    pub const OLDER_WRITE: &str = "no write of an older epoch lands once a newer one is open";
    pub const UNDONE: &str = "an acknowledged write is never undone";
    pub const ONE_GRANT: &str = "at most one grant is live, and store and home agree on it";
    pub const CLEARED: &str = "no grant without a true receipt for all that came before";
    pub const OPENED_OVER: &str = "no export is opened over one that has not ended";
    pub const TRUE_RECEIPT: &str = "when a fence is answered, all that it ended has ended";
    pub const EPOCH: &str = "the home's epoch never goes back";
    pub const LATE_RESULT: &str = "a superseded intent's result changes nothing";
    pub const GATE: &str = "no gate is ever out of a fence's reach";
    pub const OLD_COPY: &str = "a home that lost nothing is never called an old copy";
    pub const RESTORE: &str = "no restore writes beside an open export";
    pub const RECORDS: &str = "the store's record is sound";
    pub const GRANT_COMES: &str = "a grant comes in the end";
    pub const FENCE_ENDS: &str = "a fence comes to its end";
    pub const ALL_OPENED: &str = "(reached: every epoch was open once)";
    pub const OUTLIVED: &str =
        "(reached: a write outlives its process while the next epoch is wanted)";
    pub const INSIDE: &str = "(reached: a fence waits for a command inside)";
    pub const OVERTAKEN: &str = "(reached: a fence overtakes an export's opening)";
}

impl Model for Search {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let first = State::first(&self.protocol.product);
        vec![self.protocol.canonical(first)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.protocol.actions(state, actions);
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        self.protocol.step(state, action)
    }

    fn within_boundary(&self, state: &State) -> bool {
        let epoch = self.protocol.product.facts(state.record).epoch;
        epoch <= self.protocol.bounds.epochs
    }

    fn properties(&self) -> Vec<Property<Self>> {
        macro_rules! never {
            ($name:expr, $fault:ident) => {
                Property::always($name, |_: &Self, state: &State| {
                    !state.faults.has(Fault::$fault)
                })
            };
        }
        vec![
            never!(named::OLDER_WRITE, OlderWrite),
            never!(named::UNDONE, Undone),
            Property::always(named::ONE_GRANT, |search: &Self, state: &State| {
                search.looked_at.fetch_add(1, Ordering::Relaxed);
                search.one_grant(state)
            }),
            Property::always(named::CLEARED, Self::cleared),
            never!(named::OPENED_OVER, OpenedOver),
            never!(named::TRUE_RECEIPT, FalseReceipt),
            never!(named::EPOCH, EpochBack),
            never!(named::LATE_RESULT, LateResultTaken),
            never!(named::GATE, GateLost),
            never!(named::OLD_COPY, FalseOldCopy),
            Property::always(named::RESTORE, |_: &Self, state: &State| {
                !(state.restoring || state.orphan) || !matches!(state.serving, Serving::Open(_))
            }),
            Property::always(named::RECORDS, |search: &Self, state: &State| {
                search.protocol.product.facts(state.record).sound
            }),
            Property::always(named::GRANT_COMES, Self::grant_comes),
            Property::always(named::FENCE_ENDS, Self::fence_ends),
            Property::sometimes(named::ALL_OPENED, |search: &Self, state: &State| {
                state.opened == search.protocol.bounds.epochs
            }),
            Property::sometimes(named::OUTLIVED, |search: &Self, state: &State| {
                !state.home_up
                    && state.under_way().count() > 0
                    && search.stage(state) == Stage::Handing
            }),
            Property::sometimes(named::INSIDE, |_: &Self, state: &State| {
                matches!(state.serving, Serving::Closing(_)) && state.under_way().count() > 0
            }),
            Property::sometimes(named::OVERTAKEN, |_: &Self, state: &State| {
                matches!(state.serving, Serving::Ended(_))
            }),
        ]
    }
}

/// What a search came to.
#[derive(Debug, Serialize)]
pub struct Found {
    /// The search.
    pub search: &'static str,
    /// States that differ.
    pub states: usize,
    /// Steps that were taken between them.
    pub steps: usize,
    /// Of the longest of the shortest ways to a state.
    pub depth: usize,
    /// Whether every state within the bounds was looked at.
    pub complete: bool,
    /// How long it took.
    #[serde(skip)]
    pub took: Duration,
    /// Each property, and how it was broken where it was: the steps to it. For
    /// one that says "reached": the steps that reach it.
    pub properties: Vec<(&'static str, Verdict)>,
}

/// What was found of a property.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It holds in every state that was looked at.
    Holds,
    /// It does not: the steps that break it.
    Broken(Vec<String>),
    /// A state of the kind was reached.
    Reached,
    /// No state of the kind was.
    NotReached,
}

impl Found {
    /// Whether everything holds, everything that should be reached was, and
    /// nothing was left out.
    pub fn good(&self) -> bool {
        let good = |verdict: &Verdict| matches!(verdict, Verdict::Holds | Verdict::Reached);
        self.complete && self.properties.iter().all(|(_, verdict)| good(verdict))
    }
}

/// Searches until all has been looked at, or `until` was found or the time is over.
pub fn run(bounds: Bounds, until: HasDiscoveries, threads: usize, limit: Duration) -> Found {
    let begun = Instant::now();
    let checker = Search::new(bounds)
        .checker()
        .threads(threads)
        .finish_when(until)
        .timeout(limit)
        .spawn_bfs()
        .join();
    let search = checker.model();
    let discoveries = checker.discoveries();
    let properties = search.properties().into_iter().map(|property| {
        let way = discoveries.get(property.name).map(|path| {
            let actions = path.clone().into_actions().into_iter();
            actions.map(|action| format!("{action:?}")).collect()
        });
        let reached = property.name.starts_with("(reached");
        let verdict = match way {
            Some(_) if reached => Verdict::Reached,
            Some(way) => Verdict::Broken(way),
            None if reached => Verdict::NotReached,
            None => Verdict::Holds,
        };
        (property.name, verdict)
    });
    let looked_at = search.looked_at.load(Ordering::Relaxed);
    Found {
        search: bounds.name,
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        complete: looked_at == checker.unique_state_count() as u64,
        took: begun.elapsed(),
        properties: properties.collect(),
    }
}
