//! NVMe over TCP (NVM Express TCP Transport Specification 1.0, Base
//! Specification 2.0), as much of it as load needs: no authentication, no
//! digests, Read and Write.

pub mod client;
pub mod connect;
pub mod null;
mod pdu;
