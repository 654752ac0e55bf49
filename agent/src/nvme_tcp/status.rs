//! Status codes, as they stand in a completion (type, code, DNR; no phase bit).

use crate::block::DeviceError;

/// A command's status. The names are the base specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u16);

/// Do not retry.
const DNR: u16 = 0x4000;

#[expect(missing_docs, reason = "the names are the specification's own")]
impl Status {
    pub const SUCCESS: Self = Self(0);
    pub const INVALID_OPCODE: Self = Self(DNR | 0x01);
    pub const INVALID_FIELD: Self = Self(DNR | 0x02);
    pub const COMMAND_ID_CONFLICT: Self = Self(0x03);
    pub const INTERNAL_ERROR: Self = Self(DNR | 0x06);
    /// What an aborted command is answered.
    pub const COMMAND_ABORT_REQUESTED: Self = Self(0x07);
    pub const INVALID_NAMESPACE: Self = Self(DNR | 0x0b);
    pub const COMMAND_SEQUENCE_ERROR: Self = Self(DNR | 0x0c);
    /// A command sequence error that is not for good: the queue is connected, and
    /// its host may connect anew.
    pub const QUEUE_IN_USE: Self = Self(0x0c);
    pub const DATA_SGL_LENGTH_INVALID: Self = Self(DNR | 0x0f);
    pub const SGL_DESCRIPTOR_TYPE_INVALID: Self = Self(DNR | 0x11);
    pub const SGL_OFFSET_INVALID: Self = Self(DNR | 0x16);
    pub const NAMESPACE_WRITE_PROTECTED: Self = Self(DNR | 0x20);
    pub const TRANSIENT_TRANSPORT_ERROR: Self = Self(0x22);
    pub const HOST_IDENTIFIER_INCONSISTENT_FORMAT: Self = Self(DNR | 0x18);
    pub const LBA_OUT_OF_RANGE: Self = Self(DNR | 0x80);
    pub const CAPACITY_EXCEEDED: Self = Self(DNR | 0x81);
    /// The fence's answer: Linux fails the request at once, on every path.
    pub const RESERVATION_CONFLICT: Self = Self(DNR | 0x83);
    pub const ASYNC_EVENT_LIMIT_EXCEEDED: Self = Self(DNR | 0x105);
    pub const INVALID_LOG_PAGE: Self = Self(DNR | 0x109);
    pub const FEATURE_NOT_SAVEABLE: Self = Self(DNR | 0x10d);
    pub const COMMAND_SIZE_LIMIT_EXCEEDED: Self = Self(DNR | 0x183);
    pub const INCOMPATIBLE_FORMAT: Self = Self(DNR | 0x180);
    pub const CONTROLLER_BUSY: Self = Self(0x181);
    pub const CONNECT_INVALID_PARAMETERS: Self = Self(DNR | 0x182);
    pub const CONNECT_INVALID_HOST: Self = Self(DNR | 0x184);
    pub const AUTHENTICATION_REQUIRED: Self = Self(DNR | 0x191);
    pub const WRITE_FAULT: Self = Self(DNR | 0x280);
    pub const UNRECOVERED_READ_ERROR: Self = Self(DNR | 0x281);
    pub const COMPARE_FAILURE: Self = Self(DNR | 0x285);

    /// A name for metrics: few values, whatever a host sends.
    pub fn class(self) -> &'static str {
        match self {
            Self::SUCCESS => "success",
            Self::RESERVATION_CONFLICT => "fenced",
            Self::NAMESPACE_WRITE_PROTECTED => "write-protected",
            Self::CAPACITY_EXCEEDED => "no-space",
            Self::WRITE_FAULT | Self::UNRECOVERED_READ_ERROR | Self::INTERNAL_ERROR => "failed",
            Self::COMPARE_FAILURE => "miscompare",
            Self::CONTROLLER_BUSY => "busy",
            Self::AUTHENTICATION_REQUIRED => "unauthenticated",
            Self::TRANSIENT_TRANSPORT_ERROR => "digest",
            _ => "invalid",
        }
    }

    /// What a host is told when the device did not read.
    pub fn of_read(error: &DeviceError) -> Self {
        Self::of(error, Self::UNRECOVERED_READ_ERROR)
    }

    /// What a host is told when the device did not write or flush.
    pub fn of_write(error: &DeviceError) -> Self {
        Self::of(error, Self::WRITE_FAULT)
    }

    fn of(error: &DeviceError, media: Self) -> Self {
        match error {
            DeviceError::OutOfRange { .. } => Self::LBA_OUT_OF_RANGE,
            DeviceError::NoSpace => Self::CAPACITY_EXCEEDED,
            DeviceError::FlushFailed(_) => Self::INTERNAL_ERROR,
            DeviceError::Io { .. } => media,
        }
    }
}
