//! What can happen in a state, and what then happens: the arbiter's runner, as
//! the product does it between two moments at which it can be killed; the
//! home's side and the hosts are in [`crate::home`]. What is decided is the
//! product's own code ([`Product`]).

use drover::attach::state::Stage;

use crate::bounds::{Bounds, Planted};
use crate::product::Product;
use crate::state::{Action, Call, Fault, NO_WRITE, Serving, State, Waits};
use crate::wire::{Input, Replies, Reply, Request};

/// The system within its bounds.
pub struct Protocol {
    /// The product's code.
    pub product: Product,
    /// What is searched.
    pub bounds: Bounds,
}

impl Protocol {
    /// With nothing asked of the product yet.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            product: Product::new(bounds.nodes),
            bounds,
        }
    }

    /// Whether this fault is planted.
    pub fn planted(&self, fault: Planted) -> bool {
        self.bounds.planted == Some(fault)
    }

    /// What the arbiter's pending intent asks of the home.
    pub fn pending(&self, state: &State) -> Option<Request> {
        self.product.facts(state.record).request
    }

    /// The state in its one form.
    pub fn canonical(&self, mut state: State) -> State {
        // The pending one is under way anyhow.
        if state.up
            && let Some(pending) = self.pending(&state)
        {
            state.late.keep(|request| request != pending);
        }
        // A home that forgets can take up what it had ended.
        let prune = !self.planted(Planted::HomeForgets);
        state.canonical(&self.product, prune)
    }

    /// Everything that might happen; what changes nothing is sorted out by [`step`](Self::step).
    pub fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        self.progress(state, actions);
        let nodes = 0..self.bounds.nodes;
        if state.up {
            actions.push(Action::ArbiterDies);
            actions.push(Action::Unpublish);
            for node in nodes {
                actions.push(Action::Publish(node));
                if state.lost & (1 << node) != 0 {
                    actions.push(Action::ComeBack(node));
                    actions.push(Action::SweepLost(node));
                } else if state.lost.count_ones() < self.bounds.lost.into() {
                    actions.push(Action::DeclareLost(node));
                }
                if self.bounds.backups {
                    actions.push(Action::BackupBegins(node));
                }
            }
            if self.bounds.restores {
                actions.push(Action::RestoreBegins);
            }
            if self.product.facts(state.record).ticket.is_some() {
                actions.push(Action::TicketEnds);
            }
        } else if state.copy.is_some() {
            actions.push(Action::PutStoreBack);
        }
        if state.copy.is_none() && state.put_back < self.bounds.old_copies {
            actions.push(Action::CopyStore);
        }
        if state.home_up {
            actions.push(Action::HomeDies);
            actions.extend(state.late.iter().map(Action::Arrives));
            if state.up && self.pending(state).is_some() {
                actions.push(Action::CallFails);
            }
            if matches!(state.call, Call::Closing { .. }) {
                actions.push(Action::GivesUpWaiting);
            }
            if matches!(state.serving, Serving::Open(_)) {
                if state.connected {
                    actions.push(Action::Disconnects);
                    actions.push(Action::Writes);
                } else {
                    actions.push(Action::Connects);
                }
            }
        }
    }

    /// What brings things to their end by itself, with no new fault, wish or write.
    pub fn progress(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend(state.replies.iter().map(Action::Hears));
        if state.home_up {
            match state.call {
                Call::Opening => actions.push(Action::OpensGate),
                Call::Closing { .. } => {
                    actions.push(Action::RecordsClosing);
                    actions.push(Action::RecordsClosed);
                }
                Call::None => {}
            }
            if state.up {
                actions.extend(self.pending(state).map(Action::Arrives));
            }
        } else {
            actions.push(Action::HomeStarts);
        }
        if !state.up {
            actions.push(Action::ArbiterStarts);
        }
        for place in [0, 1] {
            if state.writes[usize::from(place)] != NO_WRITE {
                actions.push(Action::Lands(place));
            }
        }
        if state.restoring {
            actions.push(Action::RestoreEnds);
        }
        if state.orphan {
            actions.push(Action::OrphanEnds);
        }
    }

    /// What comes of an action. None: nothing.
    pub fn step(&self, before: &State, action: Action) -> Option<State> {
        let mut next = *before;
        self.perform(&mut next, action);
        let next = self.canonical(next);
        (next != *before).then_some(next)
    }

    fn perform(&self, state: &mut State, action: Action) {
        match action {
            Action::Publish(node) => {
                let lost = state.lost;
                self.decide(state, Input::Publish { node, lost });
            }
            Action::Unpublish => self.decide(state, Input::Unpublish),
            Action::DeclareLost(node) => state.lost |= 1 << node,
            Action::ComeBack(node) => state.lost &= !(1 << node),
            Action::SweepLost(node) => self.decide(state, Input::NodeLost(node)),
            Action::BackupBegins(node) => self.begin(state, Input::Backup(node)),
            Action::RestoreBegins => self.begin(state, Input::Restore),
            Action::TicketEnds => self.decide(state, Input::TicketEnds),
            Action::Hears(reply) => self.decide(state, Input::Result(reply)),
            Action::ArbiterDies => {
                state.late.extend(self.pending(state));
                state.up = false;
                state.replies = Replies::default();
            }
            Action::ArbiterStarts => {
                state.up = true;
                self.decide(state, Input::Resume);
            }
            Action::CopyStore => state.copy = Some((state.record, state.lost)),
            Action::PutStoreBack => {
                if let Some((record, lost)) = state.copy.take() {
                    (state.record, state.lost) = (record, lost);
                    state.put_back += 1;
                }
            }
            Action::Arrives(request) => self.arrive(state, request),
            Action::CallFails => {
                let asked = self.pending(state);
                let fence = matches!(asked, Some(Request::Fence { .. }));
                let reply = if fence && self.planted(Planted::GrantWithoutReceipt) {
                    Reply::Done
                } else {
                    Reply::Failed
                };
                self.answer(state, asked, reply);
            }
            Action::OpensGate => self.open_gate(state),
            Action::RecordsClosing => self.record_closing(state),
            Action::RecordsClosed => self.record_closed(state),
            Action::GivesUpWaiting => state.call = Call::None,
            Action::HomeDies => self.home_dies(state),
            Action::HomeStarts => self.home_starts(state),
            Action::Connects => {
                let busy = state.under_way().any(|write| write.waits == Waits::Gate);
                state.connected = !busy || self.planted(Planted::NoBusyAnswer);
            }
            Action::Disconnects => {
                state.connected = false;
                for write in &mut state.writes {
                    if write.epoch != 0 && write.waits == Waits::Host {
                        write.waits = Waits::Gate;
                    }
                }
            }
            Action::Writes => self.write(state),
            Action::Lands(place) => self.land(state, place),
            Action::RestoreEnds => self.restore_ends(state),
            Action::OrphanEnds => state.orphan = false,
        }
    }

    // The arbiter's runner: a step is durable before anything is done about it.
    // The request of an intent is under way from then on, which leaves open
    // whether it was ever sent, how often, and when it arrives.

    fn decide(&self, state: &mut State, input: Input) {
        let asked = self.pending(state);
        let Some(stepped) = self.product.step(state.record, input) else {
            return;
        };
        state.record = stepped.record;
        if stepped.superseded {
            state.late.extend(asked);
            if !self.planted(Planted::AnyResultCounts) {
                state.replies = Replies::default();
            }
        }
        if stepped.unguarded {
            state.faults.add(Fault::LateResultTaken);
        }
    }

    fn begin(&self, state: &mut State, input: Input) {
        let holds = |state: &State| self.product.facts(state.record).ticket;
        let before = holds(state);
        if before.is_none() {
            self.decide(state, input);
            if input == Input::Restore && holds(state).is_some() {
                state.late.extend([Request::Restore]);
            }
        }
    }

    /// An answer finds its way to whoever asks this very thing now.
    pub fn answer(&self, state: &mut State, asked: Option<Request>, reply: Reply) {
        let waited = state.up && asked.is_some() && self.pending(state) == asked;
        // One that changes nothing is as good as lost: the arbiter asks again.
        if waited
            && self
                .product
                .step(state.record, Input::Result(reply))
                .is_some()
        {
            state.replies.add(reply);
        }
    }

    /// Whether the arbiter says that a node has the volume, and the home serves it.
    pub fn granted(&self, state: &State) -> bool {
        let facts = self.product.facts(state.record);
        facts.stage == Stage::Attached
            && state.home_up
            && state.serving == Serving::Open(facts.epoch)
    }
}
