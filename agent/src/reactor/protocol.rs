//! What a connection's protocol is asked, and what it asks for.

use std::time::Instant;

use super::buffer::Buffer;
use super::link::Link;
use crate::block::{BlockDevice, DeviceError};
use crate::ids::Lba;

/// A protocol's own name for an operation of its: it comes back with the outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag(pub u64);

/// One connection's protocol, as a state machine: it does no I/O and never
/// waits. All its calls come from one thread at a time.
pub trait Protocol: Send {
    /// There are bytes in [`Link::input`] that it has not consumed. It is
    /// called again as long as it consumes some or asks for a fill; when it does
    /// neither, once more bytes have come.
    fn received(&mut self, link: &mut Link) -> Result<(), End>;

    /// The buffer given to [`Link::fill`] is full.
    fn filled(&mut self, buffer: Buffer, link: &mut Link) -> Result<(), End>;

    /// An operation begun with [`Link::begin`] has ended.
    fn done(&mut self, tag: Tag, outcome: Outcome, link: &mut Link) -> Result<(), End>;

    /// Its [`Waker`](super::Waker) was used, its deadline has come, or a buffer
    /// that was refused may be had now.
    fn woken(&mut self, link: &mut Link) -> Result<(), End>;

    /// When it wants to be woken without anything else happening.
    fn deadline(&self) -> Option<Instant>;

    /// The connection has ended, for this reason; nothing more is called.
    /// Operations that are still under way settle by themselves.
    fn ended(&mut self, end: &End);
}

/// Why a connection ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// Reading or writing failed.
    #[error("{call}: {errno}")]
    Io {
        /// What was being done.
        call: &'static str,
        /// The kernel's reason.
        errno: nix::errno::Errno,
    },
    /// The peer did not do something in time; it is not waited for any longer.
    #[error("{0} did not happen in time")]
    Late(&'static str),
    /// The protocol ends it, and says why. What was sent before goes out first.
    #[error("{0}")]
    Protocol(&'static str),
}

/// What a device is to do. Buffers are whole blocks and come back with the outcome.
pub enum Operation {
    /// Fill the buffer from `lba` on.
    Read {
        /// First block.
        lba: Lba,
        /// As long as what is read.
        buffer: Buffer,
    },
    /// Write the buffer from `lba` on; durable when done, with `fua`.
    Write {
        /// First block.
        lba: Lba,
        /// What is written.
        buffer: Buffer,
        /// Whether it must be durable when done.
        fua: bool,
    },
    /// Have the disk keep all that was written.
    Flush,
    /// Anything else. It is called on a thread that may wait.
    Call(Call),
}

/// An operation that may wait: what it is to do with the device.
pub type Call = Box<dyn FnOnce(&dyn BlockDevice) -> Outcome + Send>;

/// How an operation ended.
#[derive(Debug)]
pub struct Outcome {
    /// The buffer it was given, or that it made.
    pub buffer: Option<Buffer>,
    /// Whether it did what it was to do.
    pub result: Result<(), Failed>,
}

/// Why an operation did not do what it was to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failed {
    /// The device's reason.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// What was to be compared differs, first at this byte.
    #[error("the data differs at byte {at}")]
    Miscompare {
        /// Offset of the first byte that differs, in what was to be compared.
        at: u64,
    },
    /// It was not begun: a gate that it was in was closed before.
    #[error("its gate was closed before it began")]
    Closed,
    /// Something beside the device failed, such as keeping a record.
    #[error("{0}")]
    Other(String),
}

impl Operation {
    /// A read that must come from the medium: what a cache holds is written before.
    pub fn read_durable(lba: Lba, mut buffer: Buffer) -> Self {
        Self::Call(Box::new(move |device| {
            let result = device.flush().and_then(|()| device.read(lba, &mut buffer));
            Outcome::new(Some(buffer), result)
        }))
    }

    /// Does it on this thread, waiting for the device.
    pub fn perform(self, device: &dyn BlockDevice) -> Outcome {
        match self {
            Self::Read { lba, mut buffer } => {
                let result = device.read(lba, &mut buffer);
                Outcome::new(Some(buffer), result)
            }
            Self::Write { lba, buffer, fua } => {
                let result = device.write(lba, &buffer, fua);
                Outcome::new(Some(buffer), result)
            }
            Self::Flush => Outcome::new(None, device.flush()),
            Self::Call(call) => call(device),
        }
    }

    /// Its outcome when it is not begun.
    pub fn refused(self) -> Outcome {
        let buffer = match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => Some(buffer),
            Self::Flush | Self::Call(_) => None,
        };
        let result = Err(Failed::Closed);
        Outcome { buffer, result }
    }
}

impl Outcome {
    /// The end of a device's call.
    pub fn new(buffer: Option<Buffer>, result: Result<(), DeviceError>) -> Self {
        let result = result.map_err(Failed::Device);
        Self { buffer, result }
    }
}
