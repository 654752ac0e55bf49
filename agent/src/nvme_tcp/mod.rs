//! nvme_tcp.
