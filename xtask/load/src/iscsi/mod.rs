//! iSCSI (RFC 7143), as much of it as load needs: no authentication, no
//! digests, READ(16) and WRITE(16).

pub mod client;
pub mod login;
pub mod null;
mod pdu;
