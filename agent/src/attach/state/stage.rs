//! Where a volume stands, by name, and which way leads on.

/// A phase without what it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the diagram of the module above explains them")]
pub enum Stage {
    Creating,
    Idle,
    Closing,
    Handing,
    Exporting,
    Attached,
    Ending,
    Deleting,
    Gone,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Creating,
        Self::Idle,
        Self::Closing,
        Self::Handing,
        Self::Exporting,
        Self::Attached,
        Self::Ending,
        Self::Deleting,
        Self::Gone,
    ];

    /// Whether a volume may go from here to `to` in one step. Staying is always legal.
    pub fn may_become(self, to: Self) -> bool {
        use Stage::{
            Attached, Closing, Creating, Deleting, Ending, Exporting, Gone, Handing, Idle,
        };
        self == to
            || matches!(
                (self, to),
                (Creating, Idle | Deleting)
                    | (Idle, Handing | Exporting | Ending)
                    | (Closing, Idle | Handing | Ending)
                    | (Handing, Closing | Exporting)
                    | (Exporting, Attached | Handing | Closing)
                    | (Attached, Handing | Closing)
                    | (Ending, Deleting | Closing)
                    | (Deleting, Ending | Closing | Gone)
            )
    }

    /// Its name, as messages and metrics spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Idle => "idle",
            Self::Closing => "closing",
            Self::Handing => "handing",
            Self::Exporting => "exporting",
            Self::Attached => "attached",
            Self::Ending => "ending",
            Self::Deleting => "deleting",
            Self::Gone => "gone",
        }
    }
}
