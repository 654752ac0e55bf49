//! What a home's record allows: pure decisions, acted on elsewhere.
//!
//! | Record | Export of a lower epoch | of the same | of the next | of one beyond |
//! |---|---|---|---|---|
//! | closed | stale | stale | open it | behind |
//! | closed, restoring | stale | stale | refused | behind |
//! | open | stale | repeat for the same holder, else stale | behind | behind |
//! | closing | stale | stale | behind | behind |
//! | behind | behind | behind | behind | behind |
//!
//! An export is asked for with the receipt of the epoch before it, so a record
//! without the end of that one has lost it.
//!
//! | Record | Fence of a lower epoch | of the same | of a higher | that knows of more recorded |
//! |---|---|---|---|---|
//! | closed | stale | the same answer again | moves there, nothing open | behind |
//! | open, closing | stale | close | close, moves there | behind |
//! | behind | behind | behind | behind | behind |
//!
//! An epoch that a fence named and whose closing is not on disk yet counts as
//! closed for exports: that is the floor.

use crate::attach::ports::{ExportRequest, FenceRequest, HomeError, Recorded, Settlement};
use crate::ids::Epoch;
use crate::pool::record::{ExportState, OpenExport, Record};

/// What to do with an Export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExportMove {
    /// Make an identity, record it, open.
    Open,
    /// It is open already under this identity.
    Repeat(Box<OpenExport>),
    /// The record has lost an epoch, or its end: mark it, serve nothing, refuse.
    Behind {
        /// The epoch that it had recorded.
        recorded: Epoch,
    },
    /// Refuse.
    Refuse(HomeError),
}

/// What to do with a Fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceMove {
    /// End what is open, and record that with `highest`.
    Close {
        /// What is open or closing.
        export: OpenExport,
        /// Commands inside when the gate closed, where the record knows.
        inside: u32,
        /// The epoch that the record stands at afterwards.
        highest: Epoch,
    },
    /// Nothing is open: record `highest` as closed.
    Note {
        /// The epoch that the record stands at afterwards.
        highest: Epoch,
    },
    /// It is closed already; this came of it.
    Repeat(Settlement),
    /// The record has lost an epoch, or its end: mark it, serve nothing, refuse.
    Behind {
        /// The epoch that it had recorded.
        recorded: Epoch,
    },
    /// Refuse.
    Refuse(HomeError),
}

/// What to do with an Export when fences so far have named epochs up to `floor`.
pub fn export(record: &Record, floor: Epoch, request: &ExportRequest) -> ExportMove {
    let cleared = Epoch(request.epoch.0.saturating_sub(1));
    if let Some(recorded) = record.behind {
        let recorded = recorded.max(cleared);
        return ExportMove::Behind { recorded };
    }
    let stale = HomeError::StaleEpoch {
        home: record.highest.max(floor),
    };
    if request.epoch <= floor || request.epoch < record.highest {
        return ExportMove::Refuse(stale);
    }
    if Recorded::end_of(cleared) > reached(record) {
        return ExportMove::Behind { recorded: cleared };
    }
    match &record.export {
        ExportState::Closed if request.epoch > record.highest => match restoring(record) {
            Some(error) => ExportMove::Refuse(error),
            None => ExportMove::Open,
        },
        ExportState::Open { export }
            if export.node == request.node
                && export.host == request.host
                && export.protocol == request.protocol
                && export.read_only == request.read_only =>
        {
            ExportMove::Repeat(Box::new(export.clone()))
        }
        // An epoch has one holder. Whoever asks for another's believes an old
        // copy of the store, and must go beyond it.
        _ => ExportMove::Refuse(stale),
    }
}

/// How far a record has come.
fn reached(record: &Record) -> Recorded {
    match record.export {
        ExportState::Closed => Recorded::end_of(record.highest),
        ExportState::Open { .. } | ExportState::Closing { .. } => {
            Recorded::begin_of(record.highest)
        }
    }
}

/// What to do with a Fence.
pub fn fence(record: &Record, request: &FenceRequest) -> FenceMove {
    if let Some(recorded) = record.behind {
        let recorded = recorded.max(request.recorded.epoch);
        return FenceMove::Behind { recorded };
    }
    if request.epoch < record.highest {
        return FenceMove::Refuse(HomeError::StaleEpoch {
            home: record.highest,
        });
    }
    if request.recorded > reached(record) {
        let recorded = request.recorded.epoch;
        return FenceMove::Behind { recorded };
    }
    let highest = request.epoch;
    match &record.export {
        ExportState::Open { export } => FenceMove::Close {
            export: export.clone(),
            inside: 0,
            highest,
        },
        ExportState::Closing { export, inside } => FenceMove::Close {
            export: export.clone(),
            inside: *inside,
            highest,
        },
        ExportState::Closed => match &record.settlement {
            Some(settlement) if highest == record.highest => FenceMove::Repeat(settlement.clone()),
            _ => FenceMove::Note { highest },
        },
    }
}

/// The refusal of a record that is an old copy.
pub fn behind(record: &Record) -> Option<HomeError> {
    record.behind.map(|recorded| HomeError::RecordBehind {
        home: record.highest,
        recorded,
    })
}

/// The refusal of a file that a restore writes, or has written half.
pub fn restoring(record: &Record) -> Option<HomeError> {
    record.restoring.then(|| {
        HomeError::Failed(format!(
            "volume {} is being restored; wait for the restore's end, or interrupt it. \
             If its agent was killed meanwhile, it is half restored: delete it and restore again",
            record.volume
        ))
    })
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
