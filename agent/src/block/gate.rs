//! The epoch gate.
