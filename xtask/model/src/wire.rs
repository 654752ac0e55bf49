//! The small words of the model: nodes and epochs as numbers, what is asked of
//! a home, what it answers, and what happens to the arbiter.

use drover::attach::ports::HomeError;

/// A node that may hold the volume, by its place in [`NODES`].
pub type Node = u8;
/// An epoch.
pub type Number = u8;

/// The nodes' names; no other text of a record has them in it.
pub const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];
/// The one ticket beside the workload's.
pub const TICKET: &str = "ticket";
/// No epoch comes up above this one; the search's bound is well below it.
const HIGHEST: Number = 8;
/// How many fences can be told apart.
const FENCES: u32 = (HIGHEST as u32 + 1) * (HIGHEST as u32 + 2);

/// How far the home's record is known to have come, as
/// [`Recorded`](drover::attach::ports::Recorded) of the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Recorded {
    /// The highest epoch in it.
    pub epoch: Number,
    /// Whether that epoch's end is in it too.
    pub ended: bool,
}

/// What a home is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request {
    /// End every export up to an epoch.
    Fence {
        /// The epoch.
        epoch: Number,
        /// What the home is known to have recorded; at most the epoch's end.
        recorded: Recorded,
    },
    /// Open an export.
    Export {
        /// Its epoch.
        epoch: Number,
        /// For whom.
        node: Node,
    },
    /// Claim the volume's file for a restore.
    Restore,
}

impl Request {
    fn bit(self) -> u32 {
        match self {
            Self::Fence { epoch, recorded } => {
                debug_assert!(recorded.epoch <= epoch);
                let recorded = u32::from(recorded.epoch) * 2 + u32::from(recorded.ended);
                u32::from(epoch) * (u32::from(epoch) + 1) + recorded
            }
            Self::Export { epoch, node } => FENCES + u32::from(epoch) * 3 + u32::from(node),
            Self::Restore => FENCES + 3 * (HIGHEST as u32 + 1),
        }
    }

    fn every() -> impl Iterator<Item = Self> {
        (0..=HIGHEST)
            .flat_map(|epoch| {
                let recorded = (0..=epoch)
                    .flat_map(|epoch| [false, true].map(|ended| Recorded { epoch, ended }));
                let fences = recorded.map(move |recorded| Self::Fence { epoch, recorded });
                let exports = [0, 1, 2].map(|node| Self::Export { epoch, node });
                fences.chain(exports)
            })
            .chain([Self::Restore])
    }
}

/// Requests under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Requests(u128);

impl Requests {
    /// Those for which `keep` holds.
    pub fn keep(&mut self, keep: impl Fn(Request) -> bool) {
        *self = self.iter().filter(|request| keep(*request)).collect();
    }

    /// Each as `to` makes it.
    pub fn map(&mut self, to: impl Fn(Request) -> Request) {
        *self = self.iter().map(to).collect();
    }

    /// One after another.
    pub fn iter(self) -> impl Iterator<Item = Request> {
        let any = self.0 != 0;
        Request::every()
            .take_while(move |_| any)
            .filter(move |request| self.0 & (1 << request.bit()) != 0)
    }

    /// With the nodes renamed.
    pub fn renamed(self, permutation: &[Node]) -> Self {
        let renamed = self.iter().map(|request| match request {
            Request::Export { epoch, node } => Request::Export {
                epoch,
                node: permutation[usize::from(node)],
            },
            other => other,
        });
        renamed.collect()
    }
}

impl Extend<Request> for Requests {
    /// Adds some. Each may arrive at any time from now on, again and again, or never.
    fn extend<I: IntoIterator<Item = Request>>(&mut self, requests: I) {
        for request in requests {
            self.0 |= 1 << request.bit();
        }
    }
}

impl FromIterator<Request> for Requests {
    fn from_iter<I: IntoIterator<Item = Request>>(requests: I) -> Self {
        let mut all = Self::default();
        all.extend(requests);
        all
    }
}

/// What a home answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reply {
    /// It is done; for a fence, with the settlement of the epoch asked about.
    Done,
    /// A call failed, or something is in the way.
    Failed,
    /// Its record is behind an epoch it had recorded.
    Behind,
    /// The epoch is stale; the home is at this one.
    Stale(Number),
}

impl Reply {
    /// Those there are.
    pub fn every() -> impl Iterator<Item = Self> {
        let stale = (0..=HIGHEST).map(Self::Stale);
        [Self::Done, Self::Failed, Self::Behind]
            .into_iter()
            .chain(stale)
    }

    /// A refusal.
    pub fn of(error: &HomeError) -> Self {
        match error {
            HomeError::StaleEpoch { home } => {
                Self::Stale(u8::try_from(home.0).expect("a handful of epochs"))
            }
            HomeError::RecordBehind { .. } => Self::Behind,
            HomeError::Failed(_) => Self::Failed,
            other => unreachable!("no decision refuses like this: {other:?}"),
        }
    }

    fn bit(self) -> u16 {
        match self {
            Self::Done => 1,
            Self::Failed => 2,
            Self::Behind => 4,
            Self::Stale(home) => 8 << home,
        }
    }
}

/// Answers to the pending intent that the arbiter has not taken yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Replies(u16);

impl Replies {
    /// Adds one. It may arrive at any time, again and again, or never.
    pub fn add(&mut self, reply: Reply) {
        self.0 |= reply.bit();
    }

    /// One after another.
    pub fn iter(self) -> impl Iterator<Item = Reply> {
        let any = self.0 != 0;
        Reply::every()
            .take_while(move |_| any)
            .filter(move |reply| self.0 & reply.bit() != 0)
    }
}

/// What happens to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// A workload on a node wants the volume, while these nodes (bits) are lost.
    Publish {
        /// The node.
        node: Node,
        /// The lost.
        lost: u8,
    },
    /// The workload has left.
    Unpublish,
    /// A node was declared lost.
    NodeLost(Node),
    /// A backup takes its ticket on a node.
    Backup(Node),
    /// A restore takes its ticket.
    Restore,
    /// That ticket's lease runs out.
    TicketEnds,
    /// The process has started.
    Resume,
    /// An answer to the pending intent.
    Result(Reply),
}
