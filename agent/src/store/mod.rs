//! The state of the control plane: small records under typed keys, changed by
//! compare-and-swap.
//!
//! A store knows nothing of what the bytes mean. It refuses a change whose
//! expected version is not the current one, so two writers can never both
//! believe that they decided.

pub mod embedded;

pub use embedded::EmbeddedStore;

use std::fmt;

use async_trait::async_trait;

/// What a record is of; the first part of its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// One per volume: its description, tickets, epoch and phase.
    Volume,
    /// One per snapshot.
    Snapshot,
    /// One per node that has ever registered.
    Node,
    /// One per receipt.
    Receipt,
    /// One per line of the journal.
    Note,
}

/// A record's key. The id must not be empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// What the record is of.
    pub kind: Kind,
    /// Which one.
    pub id: String,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}/{}", self.kind, self.id)
    }
}

/// A record's version: changes with every change of the record, never comes again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version(pub u64);

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its version.
    pub version: Version,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Somebody else changed the record first: read it again.
    #[error("record {0} has changed meanwhile")]
    Conflict(Key),
    /// The store cannot be reached or cannot write.
    #[error("store: {0}")]
    Unavailable(String),
}

/// Records under keys. A change is durable when its call returns.
#[async_trait]
pub trait StateStore: Send + Sync {
    /// Reads a record.
    async fn get(&self, key: &Key) -> Result<Option<Stored>, StoreError>;
    /// Writes a record that is at `expected` (none: that does not exist).
    async fn put(
        &self,
        key: &Key,
        expected: Option<Version>,
        bytes: Vec<u8>,
    ) -> Result<Version, StoreError>;
    /// Removes a record that is at `expected`.
    async fn delete(&self, key: &Key, expected: Version) -> Result<(), StoreError>;
    /// All records of a kind, by id.
    async fn list(&self, kind: Kind) -> Result<Vec<(Key, Stored)>, StoreError>;
}
