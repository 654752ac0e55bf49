//! What a home holds in memory for one volume.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::frontend::{ClosedGate, Frontend};
use crate::attach::ports::Settlement;
use crate::ids::Epoch;
use crate::pool::device::FirstWrite;

/// What this process serves of a volume.
pub enum Serving {
    /// Nothing.
    Nothing,
    /// An export, to whose gate this is the way.
    Open {
        /// Its epoch.
        epoch: Epoch,
        /// Its name.
        name: String,
        /// Its device.
        device: Arc<FirstWrite>,
    },
    /// An export whose gate is closed. Without the gate: a fence has it in hand.
    Closing(Option<Box<dyn ClosedGate>>),
    /// What a closing came to, and the record does not say so yet.
    Ended(Settlement),
}

/// What a fence finds of an export that its volume's record holds as not ended.
pub enum InHand {
    /// This process never served it: it was a dead one's.
    Nothing,
    /// Its closed gate.
    Gate(Box<dyn ClosedGate>),
    /// What its closing came to, to be recorded.
    Ended(Settlement),
    /// Its gate is out of reach: taken by a fence that never came to an end,
    /// or unknown to the target. Nobody can tell what is inside.
    Lost,
}

/// The state that a fence must reach without waiting.
pub struct Now {
    /// The highest epoch that a fence has named: no export at or below it opens.
    pub floor: Epoch,
    /// What is served.
    pub serving: Serving,
    /// Whether a restore writes the volume's file.
    pub restoring: bool,
}

/// One volume's locks and state. Two locks, so that a long snapshot holds up
/// no fence.
pub struct Site {
    /// Exports and fences, one at a time.
    pub epochs: Arc<tokio::sync::Mutex<()>>,
    /// What changes or copies the bytes as a whole, one at a time. Taken before `epochs`.
    pub data: Arc<tokio::sync::Mutex<()>>,
    now: Mutex<Now>,
}

impl Site {
    /// Nothing served.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            epochs: Arc::default(),
            data: Arc::default(),
            now: Mutex::new(Now {
                floor: Epoch(0),
                serving: Serving::Nothing,
                restoring: false,
            }),
        })
    }

    /// The state. Held for a moment only, never over a wait.
    pub fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the gate of what is open at or below `epoch`, at once, and keeps
    /// any export at or below it from opening. When this returns, no command enters.
    pub fn close(&self, epoch: Epoch, frontend: &dyn Frontend) {
        let mut now = self.now();
        now.floor = now.floor.max(epoch);
        if let Serving::Open {
            epoch: open, name, ..
        } = &now.serving
            && *open <= epoch
        {
            let gate = frontend.close(name);
            if gate.is_none() {
                tracing::error!(name, "the target did not know an open export");
            }
            now.serving = Serving::Closing(gate);
        }
    }

    /// Takes the closed gate in hand; whoever does puts it back or ends it.
    pub fn take_closing(&self) -> InHand {
        match &mut self.now().serving {
            Serving::Nothing => InHand::Nothing,
            Serving::Ended(settlement) => InHand::Ended(settlement.clone()),
            Serving::Closing(gate) => gate.take().map_or(InHand::Lost, InHand::Gate),
            Serving::Open { .. } => InHand::Lost,
        }
    }
}
