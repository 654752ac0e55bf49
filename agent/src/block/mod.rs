//! What a frontend reads and writes, and the gate that each of its commands
//! passes.
//!
//! [`BlockDevice`] is narrow on purpose: the data path behind it can be
//! replaced without a frontend noticing. It does no fencing; that is
//! [`gate::Gate`]'s work, and a frontend must hold a pass of it from before a
//! command touches the device until the command has settled.

pub mod device;
pub mod file;
mod flushes;
pub mod gate;

pub use device::{BLOCK, BlockDevice, DeviceError, Direct, Extent};
