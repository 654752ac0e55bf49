//! The home's calls, as `home::epochs` and `home::site` of the product have
//! them, from one moment to the next at which the process can be killed; its
//! gate; and the hosts that write through it.

use crate::bounds::Planted;
use crate::product::Move;
use crate::protocol::Protocol;
use crate::records::OnDisk;
use crate::state::{Call, Fault, NO_WRITE, Serving, State, Waits, Write};
use crate::wire::{Number, Reply, Request};

impl Protocol {
    /// A request reaches the home.
    pub fn arrive(&self, state: &mut State, request: Request) {
        if let Request::Fence { epoch, .. } = request {
            self.close_gate(state, epoch);
        }
        if state.call != Call::None {
            return;
        }
        if request == Request::Restore {
            return self.claim(state);
        }
        match self.product.decide(state.disk, state.floor, request) {
            Move::Answer(reply) => {
                if reply == Reply::Behind {
                    state.faults.add(Fault::FalseOldCopy);
                }
                self.answer(state, Some(request), reply);
            }
            Move::FencedBefore => self.fenced(state, request),
            Move::Note { closed } => {
                self.put(state, closed);
                state.serving = Serving::Nothing;
                self.fenced(state, request);
            }
            Move::Close { of, closed, .. } => match state.serving {
                Serving::Closing(_) => {
                    let Request::Fence { epoch, recorded } = request else {
                        return;
                    };
                    state.call = Call::Closing {
                        to: epoch,
                        recorded,
                    };
                }
                // A dead process served it, and its lock came free after its
                // last command; or its end is known, and is recorded now.
                Serving::Nothing | Serving::Ended(_) => {
                    self.put(state, closed);
                    state.serving = Serving::Nothing;
                    self.fenced(state, request);
                }
                Serving::Open(_) if self.planted(Planted::GateClosesLast) => {
                    let Request::Fence { epoch, recorded } = request else {
                        return;
                    };
                    debug_assert!(of <= epoch);
                    state.call = Call::Closing {
                        to: epoch,
                        recorded,
                    };
                }
                Serving::Open(_) => state.faults.add(Fault::GateLost),
            },
            Move::Serve => {
                if !matches!(state.serving, Serving::Open(_)) && !self.let_in(state) {
                    let floor = state.floor;
                    return self.answer(state, Some(request), Reply::Stale(floor));
                }
                self.answer(state, Some(request), Reply::Done);
            }
            Move::Open { opened } => {
                if state.restoring {
                    return self.answer(state, Some(request), Reply::Failed);
                }
                self.opens(state, request);
                self.put(state, opened);
                state.call = Call::Opening;
            }
        }
    }

    /// `claim`: the file is the restore's, and the record says so before it
    /// begins; only of a volume that no epoch was ever opened or closed of.
    fn claim(&self, state: &mut State) {
        let disk = self.product.disk(state.disk);
        let fresh = disk.highest == 0 && disk.open == OnDisk::Closed;
        if fresh && !disk.restoring && !state.restoring {
            state.restoring = true;
            if !self.planted(Planted::RestoreUnrecorded) {
                self.put(state, self.product.restoring(state.disk, true));
            }
        }
    }

    /// Its last write has ended, and the agent that claimed the file is there to know.
    pub fn restore_ends(&self, state: &mut State) {
        self.put(state, self.product.restoring(state.disk, false));
        state.restoring = false;
    }

    /// `Site::close`: before anything that could wait.
    fn close_gate(&self, state: &mut State, epoch: Number) {
        state.floor = state.floor.max(epoch);
        if let Serving::Open(open) = state.serving
            && open <= epoch
            && !self.planted(Planted::GateClosesLast)
        {
            state.serving = Serving::Closing(open);
            state.connected = false;
        }
    }

    /// `let_in`: unless a fence was quicker.
    fn let_in(&self, state: &mut State) -> bool {
        let open = self.product.disk(state.disk).open;
        let OnDisk::Open(epoch, _) = open else {
            return false;
        };
        let quicker = state.floor >= epoch;
        if quicker || state.serving != Serving::Nothing {
            if state.serving == Serving::Nothing {
                state.serving = Serving::Ended(epoch);
            }
            return false;
        }
        state.serving = Serving::Open(epoch);
        true
    }

    /// The record says that an export is open: now its gate opens.
    pub fn open_gate(&self, state: &mut State) {
        let OnDisk::Open(epoch, node) = self.product.disk(state.disk).open else {
            return;
        };
        state.call = Call::None;
        let request = Request::Export { epoch, node };
        let reply = if self.let_in(state) {
            Reply::Done
        } else {
            Reply::Stale(state.floor)
        };
        self.answer(state, Some(request), reply);
    }

    fn closing(&self, state: &State) -> Option<(Request, Move)> {
        let Call::Closing { to, recorded } = state.call else {
            return None;
        };
        let request = Request::Fence {
            epoch: to,
            recorded,
        };
        Some((
            request,
            self.product.decide(state.disk, state.floor, request),
        ))
    }

    /// A fence notes on disk that the export is ending.
    pub fn record_closing(&self, state: &mut State) {
        if let Some((_, Move::Close { closing, .. })) = self.closing(state) {
            self.put(state, closing);
        }
    }

    /// The closing is on disk and no command is inside: hosts are told, the
    /// identity is dropped, and the record says so before the answer does.
    pub fn record_closed(&self, state: &mut State) {
        let Some((request, Move::Close { of, closed, .. })) = self.closing(state) else {
            return;
        };
        let noted = self.product.disk(state.disk).open == OnDisk::Closing(of);
        let inside = state
            .under_way()
            .any(|write| write.waits != Waits::Kernel && (write.epoch == of));
        if noted && (!inside || self.planted(Planted::FenceDoesNotWait)) {
            self.put(state, closed);
            state.call = Call::None;
            if !self.planted(Planted::GateClosesLast) {
                state.serving = Serving::Nothing;
            }
            self.fenced(state, request);
        }
    }

    /// A fence is answered with a settlement, of which a receipt is made.
    fn fenced(&self, state: &mut State, request: Request) {
        let Request::Fence { epoch, .. } = request else {
            return;
        };
        let open = self.product.disk(state.disk).open;
        let serves =
            matches!(state.serving, Serving::Open(of) | Serving::Closing(of) if of <= epoch);
        let under_way = state.under_way().any(|write| write.epoch <= epoch);
        if open != OnDisk::Closed || serves || under_way {
            state.faults.add(Fault::FalseReceipt);
        }
        self.answer(state, Some(request), Reply::Done);
    }

    fn opens(&self, state: &mut State, request: Request) {
        let Request::Export { epoch, .. } = request else {
            return;
        };
        let open = self.product.disk(state.disk).open;
        let serves = matches!(state.serving, Serving::Open(_) | Serving::Closing(_));
        if open != OnDisk::Closed || serves || state.under_way().count() > 0 {
            state.faults.add(Fault::OpenedOver);
        }
        if epoch > state.opened {
            (state.opened, state.acknowledged) = (epoch, 0);
        }
    }

    /// The record on disk.
    fn put(&self, state: &mut State, disk: u16) {
        let highest = |disk| self.product.disk(disk).highest;
        if highest(disk) < highest(state.disk) {
            state.faults.add(Fault::EpochBack);
        }
        state.disk = disk;
    }

    /// Its process is killed: what is in memory is gone, what the kernel has is not.
    pub fn home_dies(&self, state: &mut State) {
        state.home_up = false;
        state.floor = 0;
        state.serving = Serving::Nothing;
        state.call = Call::None;
        state.connected = false;
        state.orphan |= state.restoring;
        state.restoring = false;
        for write in &mut state.writes {
            if write.epoch != 0 {
                write.waits = Waits::Kernel;
            }
        }
        if self.planted(Planted::HomeForgets) {
            self.put(state, self.product.first_disk());
        }
    }

    /// A successor: it has the pool's lock, so what its predecessor began has
    /// landed; it serves what the record holds open before it listens.
    pub fn home_starts(&self, state: &mut State) {
        if state.under_way().count() > 0 && !self.planted(Planted::NoExitBarrier) {
            return;
        }
        state.home_up = true;
        self.let_in(state);
    }

    // Hosts. One that has an identity may use it at any time from the moment
    // its export is open, whatever the arbiter and its own node think, and
    // never lets go by itself. Past a closed gate nothing comes.

    /// A host sends its next write.
    pub fn write(&self, state: &mut State) {
        let Serving::Open(epoch) = state.serving else {
            return;
        };
        let acknowledged = if epoch == state.opened {
            state.acknowledged
        } else {
            0
        };
        let waits = state.under_way().any(|write| write.waits == Waits::Host);
        let free = state.writes.iter().position(|write| *write == NO_WRITE);
        if let Some(place) = free
            && !waits
            && acknowledged < self.bounds.writes
        {
            state.writes[place] = Write {
                epoch,
                number: acknowledged + 1,
                waits: Waits::Host,
            };
        }
    }

    /// A write reaches the data, and whoever waits for it is told.
    pub fn land(&self, state: &mut State, place: u8) {
        let write = std::mem::replace(&mut state.writes[usize::from(place)], NO_WRITE);
        if write.epoch < state.opened {
            state.faults.add(Fault::OlderWrite);
        } else if write.number < state.acknowledged {
            state.faults.add(Fault::Undone);
        } else if write.waits == Waits::Host {
            state.acknowledged = write.number;
        }
    }
}
