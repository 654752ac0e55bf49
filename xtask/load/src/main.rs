//! One load generator for three wires alike: iSCSI, NVMe/TCP, and one without
//! a protocol that shows what sockets and the file allow at all.
//!
//! A thread a connection; sockets are sent to and received from in batches, so
//! that the client is seldom what is measured. How much it can do itself is
//! what it reaches against `load serve-null`, a target that does nothing. Every
//! block that is read is checked ([`pattern`]).
//!
//! Order of reading: [`drive`] is the loop; [`inbox`] and [`outbox`] its two
//! ends of a socket; [`iscsi`], [`nvme`] and [`raw`] the wires; [`run`] puts
//! the figures together.

mod drive;
mod histogram;
mod inbox;
mod iscsi;
mod nvme;
mod outbox;
mod pattern;
mod processor;
mod raw;
mod run;
mod serve;
mod slots;

use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// A load generator for iSCSI, NVMe/TCP and plain sockets.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Put a target under load; one JSON object says what came of it
    Run(run::Arguments),
    /// Serve a file over plain sockets: the limit of any protocol
    ServeRaw {
        /// The file
        #[arg(long)]
        file: PathBuf,
        /// Where to listen
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Who does the file's I/O
        #[arg(long, default_value = "auto")]
        engine: raw::serve::Engine,
    },
    /// Answer commands without doing anything: the client's own limit
    ServeNull {
        /// The protocol
        wire: Null,
        /// Where to listen
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Write a file whose blocks tell their places, as `run` expects it
    Fill {
        /// The file; it is made anew
        #[arg(long)]
        file: PathBuf,
        /// Its size in MiB
        #[arg(long)]
        mib: u64,
    },
}

/// A protocol that has a null target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Null {
    /// iSCSI
    Iscsi,
    /// NVMe over TCP
    Nvme,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Verb::Run(arguments) => {
            let report = run::run(&arguments)?;
            println!("{}", serde_json::to_string(&report)?);
            Ok(())
        }
        Verb::ServeRaw {
            file,
            listen,
            engine,
        } => {
            let served = raw::serve::Served::open(&file, engine)?;
            serve::listen(listen, move |socket| served.serve(socket))
        }
        Verb::ServeNull {
            wire: Null::Iscsi,
            listen,
        } => serve::listen(listen, |socket| {
            serve::answer(&mut iscsi::null::NullTarget::default(), socket)
        }),
        Verb::ServeNull {
            wire: Null::Nvme,
            listen,
        } => serve::listen(listen, |socket| {
            serve::answer(&mut nvme::null::NullTarget::default(), socket)
        }),
        Verb::Fill { file, mib } => fill(&file, mib),
    }
}

fn fill(path: &Path, mib: u64) -> Result<()> {
    const MIB: usize = 1 << 20;
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    for number in 0..mib {
        let offset = number << 20;
        file.write_all_at(&pattern::filled(offset, MIB), offset)
            .with_context(|| format!("write {}", path.display()))?;
    }
    file.sync_all()
        .with_context(|| format!("sync {}", path.display()))
}
