//! Reservations that outlive the process: bytes, whatever protocol made them.

/// Keeps one export's reservations through restarts and power loss.
pub trait Keeper: Send + Sync + 'static {
    /// Makes a state durable in place of the one before; none: there is
    /// nothing to keep any more. It may wait for a disk.
    ///
    /// # Errors
    /// Why it is not kept: the command that wanted it fails, and nothing has changed.
    fn keep(&self, state: Option<&[u8]>) -> Result<(), String>;
}

/// Who keeps an export's reservations, and what was kept last.
pub struct Kept {
    /// Who keeps them.
    pub keeper: Box<dyn Keeper>,
    /// What was kept; none: nothing, or it was another export's.
    pub state: Option<Vec<u8>>,
}
