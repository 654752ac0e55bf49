//! What one search covers, and the faults that can be planted in it.

use crate::wire::{Node, Number};

/// What one search covers. Whatever is not bounded here happens any number of
/// times: messages lost, doubled, late and in any order; the arbiter and the
/// home killed and started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How the search is called.
    pub name: &'static str,
    /// Nodes that may hold the volume, 1 to 3. Its home is one more.
    pub nodes: Node,
    /// The highest epoch that the arbiter decides; searched is what leads up to it.
    pub epochs: Number,
    /// How many writes a holder makes in its epoch, one after another.
    pub writes: u8,
    /// How many nodes can be declared lost at a time. They may come back.
    pub lost: u8,
    /// Whether a backup holds a ticket on a node, now and then.
    pub backups: bool,
    /// Whether restores write to the volume at its home.
    pub restores: bool,
    /// How often the store is put back from an old copy.
    pub old_copies: u8,
    /// A fault planted on purpose.
    pub planted: Option<Planted>,
}

impl Bounds {
    /// In words.
    pub fn covers(&self) -> String {
        let times = |count: u8, what: &str| match count {
            0 => format!("no {what}"),
            1 => format!("1 {what}"),
            more => format!("{more} {what}s"),
        };
        format!(
            "{}, {}, {} a holder and epoch, {} lost at a time, backups {}, restores {}, {}; \
             without bound: publish, unpublish, node lost and back, messages lost, doubled, late \
             and reordered, arbiter and home killed at any point, calls that fail, connections that break",
            times(self.nodes, "node"),
            times(self.epochs, "epoch"),
            times(self.writes, "write"),
            times(self.lost, "node"),
            if self.backups { "yes" } else { "no" },
            if self.restores { "yes" } else { "no" },
            times(self.old_copies, "old copy of the store put back"),
        )
    }
}

/// The searches of `cargo xtask model`.
pub fn full(nodes: Node, epochs: Number) -> Vec<Bounds> {
    let plain = Bounds {
        name: "moves",
        nodes,
        epochs,
        writes: 2,
        lost: nodes,
        backups: false,
        restores: false,
        old_copies: 0,
        planted: None,
    };
    vec![
        plain,
        Bounds {
            name: "tickets",
            lost: 1,
            backups: true,
            restores: true,
            ..plain
        },
        Bounds {
            name: "old copies of the store",
            lost: 1,
            old_copies: 2,
            ..plain
        },
        Bounds {
            name: "all at once",
            writes: 1,
            lost: 1,
            backups: true,
            restores: true,
            old_copies: 1,
            ..plain
        },
    ]
}

/// The searches that are tests: under a minute together.
#[cfg(test)]
pub fn small() -> Vec<Bounds> {
    full(2, 2)
}

/// A fault that a wrong product could have. Each must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// The arbiter takes a home's silence for a receipt.
    GrantWithoutReceipt,
    /// A fence does not wait for the commands inside the gate.
    FenceDoesNotWait,
    /// A fence records the end and answers, and closes the gate only then.
    GateClosesLast,
    /// A home that is killed forgets its record.
    HomeForgets,
    /// A successor serves while its predecessor's writes are on the way.
    NoExitBarrier,
    /// A host connects again while commands of its last connection are inside.
    NoBusyAnswer,
    /// A claim for a restore is only in memory.
    RestoreUnrecorded,
    /// A result is taken for the pending intent's, whichever it is of.
    AnyResultCounts,
}
