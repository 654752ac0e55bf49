//! initiator.
