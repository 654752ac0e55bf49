//! The rig: plays kubelet and the CSI sidecars, workloads, backup tools and
//! rogues against real drover processes on a real kernel.
//!
//! It knows drover by its sockets and its command line alone. It runs as root
//! where the kernel has NVMe/TCP or iSCSI: in the VM that `cargo xtask` boots, or on a
//! machine whose kernel has it.
//!
//! Order of reading: [`cluster`] starts and kills drover's processes, [`csi`]
//! calls them, [`roles`] are the processes that use volumes; [`demo`],
//! [`moves`], [`stuck`], [`unsettled`], [`faults`], [`rogues`] and [`partition`]
//! are the stories.

mod cluster;
mod csi;
mod demo;
mod faults;
mod flow;
mod link;
mod moves;
mod partition;
mod rogues;
mod roles;
mod stuck;
mod timeline;
mod unsettled;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Plays kubelet, workloads and rogues against a real drover.
#[derive(Parser)]
struct Rig {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Args, Clone)]
struct Place {
    /// The drover binary
    #[arg(long)]
    drover: PathBuf,
    /// An empty folder for everything that is made, on a file system with 2 GiB
    #[arg(long)]
    scratch: PathBuf,
    /// The protocol that every volume is exported over. Over iSCSI, iscsid must run
    #[arg(long, value_enum, default_value_t = Protocol::NvmeTcp)]
    protocol: Protocol,
}

/// How nodes reach volumes.
#[derive(clap::ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    /// NVMe over TCP.
    NvmeTcp,
    /// iSCSI.
    Iscsi,
}

impl Protocol {
    /// Its name in StorageClass parameters.
    fn name(self) -> &'static str {
        match self {
            Self::NvmeTcp => "nvme-tcp",
            Self::Iscsi => "iscsi",
        }
    }
}

#[derive(Subcommand)]
enum Command {
    /// A volume moves from node to node while backups hold it and a rogue writes
    Demo {
        #[command(flatten)]
        place: Place,
        /// Print one JSON object as the last line
        #[arg(long)]
        json: bool,
    },
    /// Many moves, with snapshots, growth, backups and restarts thrown in
    Moves {
        #[command(flatten)]
        place: Place,
        /// How many moves
        #[arg(long, default_value_t = 12)]
        moves: u32,
        /// The seed of everything that is thrown in; printed, so that a run can be had again
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Unpublish and move with a backup that is slow, hangs, lost its snapshot, or fails on every call
    Stuck {
        #[command(flatten)]
        place: Place,
    },
    /// A home's disk that hangs with writes inside, a move, and the operator's word
    Unsettled {
        #[command(flatten)]
        place: Place,
    },
    /// Agents and controllers killed at bad moments, devices that answer with errors
    Faults {
        #[command(flatten)]
        place: Place,
    },
    /// A node whose link is cut is declared lost, and comes back
    Partition {
        #[command(flatten)]
        place: Place,
    },
    /// Epochs handed round under writers with stale devices, while processes are killed at random
    Rogues {
        #[command(flatten)]
        place: Place,
        /// How long
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The seed of everything that is thrown in; printed, so that a run can be had again
        #[arg(long)]
        seed: Option<u64>,
    },
    /// A part that another command of the rig starts
    #[command(hide = true, subcommand)]
    Role(roles::Role),
}

fn main() -> ExitCode {
    let rig = Rig::parse();
    let outcome = match rig.command {
        Command::Role(role) => roles::play(role),
        story => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => runtime.block_on(tell(story)),
                Err(error) => Err(error.into()),
            }
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn tell(story: Command) -> anyhow::Result<()> {
    match story {
        Command::Demo { place, json } => demo::tell(&place, json).await,
        Command::Moves { place, moves, seed } => moves::tell(&place, moves, seed).await,
        Command::Stuck { place } => stuck::tell(&place).await,
        Command::Unsettled { place } => unsettled::tell(&place).await,
        Command::Faults { place } => faults::tell(&place).await,
        Command::Partition { place } => partition::tell(&place).await,
        Command::Rogues {
            place,
            seconds,
            seed,
        } => rogues::tell(&place, seconds, seed).await,
        Command::Role(role) => roles::play(role),
    }
}
