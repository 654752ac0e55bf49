//! drover drives volumes from node to node.
//!
//! The path of a volume's move, in words: kubelet and the CSI sidecars call
//! [`csi`]; [`attach`] decides who may use the volume and keeps that in
//! [`store`]; at the volume's [`home`] the old [`export`] is fenced through its
//! [`block::gate`], recorded in the [`pool`], and a new one opened; on the
//! workload's node [`initiator`] connects, judges by [`evidence`] who holds a
//! device, shuts it by [`fence`] when its epoch has ended, and mounts. [`backup`] streams read snapshots meanwhile. [`rpc`]
//! carries calls between the processes; [`metrics`] tells what happened.

pub mod attach;
pub mod backup;
pub mod block;
pub mod cli;
pub mod config;
pub mod csi;
pub mod daemon;
#[cfg(any(test, fuzzing))]
pub mod doors;
pub mod evidence;
pub mod export;
pub mod fence;
pub mod home;
pub mod ids;
pub mod initiator;
pub mod iscsi;
pub mod joined;
pub mod metrics;
pub mod nvme_tcp;
pub mod pool;
pub mod reactor;
pub mod rpc;
pub mod store;
