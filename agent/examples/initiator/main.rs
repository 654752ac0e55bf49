//! Proves the initiator on a real kernel: both file systems and raw block, a
//! fence by the target, and a restart of the agent in between. Over NVMe/TCP
//! against the kernel's own target (nvmet, through configfs); over iSCSI against
//! drover's target, which is also killed under I/O. And the node's gate, which
//! shuts a disk there, by itself.
//!
//! Run it in a VM: `agent/tests/vm/initiator.sh`, `iscsi_initiator.sh`, `gate_node.sh`.
//! Needs root.

mod dirty;
mod gate;
mod gate_bench;
mod iscsi;
mod knock;
mod nvmet;
mod scene;
mod writer;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use drover::attach::ports::{Access, FsType};
use drover::initiator::child_main;
use scene::{Open, life};

fn fs(fs: FsType) -> Access {
    Access::Mount {
        fs,
        flags: Vec::new(),
    }
}

async fn gates(bio: bool, open: Open) -> Result<()> {
    let (ext4, xfs) = (fs(FsType::Ext4), fs(FsType::Xfs));
    gate::proof("raw", Access::Block, 64, bio, open)
        .await
        .context("raw")?;
    gate::proof("gate-ext4", ext4, 160, bio, open)
        .await
        .context("ext4")?;
    gate::proof("gate-xfs", xfs, 320, bio, open)
        .await
        .context("xfs")
}

async fn lives(open: Open) -> Result<()> {
    let (ext4, xfs) = (fs(FsType::Ext4), fs(FsType::Xfs));
    life("ext4", ext4, 160, open).await.context("ext4")?;
    life("xfs", xfs, 320, open).await.context("xfs")?;
    life("block", Access::Block, 16, open)
        .await
        .context("block")
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let what = args.next();
    if what.as_deref() == Some("child") {
        return child_main(args);
    }
    let run = || -> Result<()> {
        let runtime = tokio::runtime::Runtime::new()?;
        match what.as_deref() {
            Some("writer") => writer::main(args),
            Some("gate-hold") => gate::hold(args),
            Some("gate") => {
                let bio = match args.next().as_deref() {
                    Some("bio") => true,
                    None => false,
                    Some(other) => bail!("gate {other:?}: only bio can be asked for"),
                };
                runtime.block_on(gates(bio, nvmet::Port::open()?.exports()))
            }
            Some("gate-bench") => runtime.block_on(gate_bench::run(nvmet::Port::open()?.exports())),
            None | Some("nvme") => runtime.block_on(lives(nvmet::Port::open()?.exports())),
            Some("iscsi") => runtime.block_on(async {
                iscsi::ten_kills().await.context("ten kills")?;
                iscsi::ten_cuts().await.context("ten cuts")?;
                lives(iscsi::exports()).await
            }),
            Some(other) => bail!("{other:?} is neither nvme, iscsi nor gate"),
        }
    };
    match run() {
        Ok(()) => {
            println!("initiator: all passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("initiator: {error:#}");
            ExitCode::FAILURE
        }
    }
}
