//! The fence and grant protocol, model-checked: `cargo xtask model`.
//!
//! What decides in the product decides here: the arbiter's
//! [`VolumeState::step`](drover::attach::state::VolumeState::step), the home's
//! [`drover::home::decide`], over the records that both keep, and the proofs
//! without which no grant can be made. What acts in the product (the runner,
//! the home's calls, gates, the pool's lock, kernels) is written down again in
//! [`protocol`], small, cut wherever a process can be killed or a message be
//! late. [stateright](https://docs.rs/stateright) then looks at every state
//! that can come up, and says for each of [`search::named`] whether it holds.
//!
//! Order of reading: [`wire`] has the small words; [`product`] asks the product,
//! with [`records`] and [`table`]; [`state`] is the whole system at one moment,
//! [`protocol`] and [`home`] are what can happen next, [`search`] is what must
//! hold, [`bounds`] what a search covers.
//!
//! It refuses to call a search complete that has left out a state.

mod bounds;
mod home;
mod product;
mod protocol;
mod records;
mod report;
mod search;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod wire;

use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::Parser;
use stateright::HasDiscoveries;

/// Searches every state of the fence and grant protocol.
#[derive(Parser)]
#[command(name = "model")]
struct Arguments {
    /// Nodes that may hold the volume
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=3))]
    nodes: u8,
    /// The highest epoch that is decided
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=4))]
    epochs: u8,
    /// A search that takes longer ends then, and is not complete
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    minutes: u64,
    /// Print each property of each search as one JSON object a line
    #[arg(long)]
    json: bool,
    /// Only the searches whose name contains this
    #[arg(long)]
    only: Option<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let limit = Duration::from_secs(arguments.minutes * 60);
    let threads = available_parallelism().map_or(1, usize::from);
    let part = arguments.only.as_deref().unwrap_or_default();
    let all = bounds::full(arguments.nodes, arguments.epochs);
    let chosen: Vec<_> = all.iter().filter(|of| of.name.contains(part)).collect();
    if chosen.is_empty() {
        let names: Vec<_> = all.iter().map(|of| of.name).collect();
        eprintln!("no search's name contains {part:?}: there are {names:?}");
        return ExitCode::FAILURE;
    }
    let mut good = true;
    for bounds in chosen {
        let found = search::run(*bounds, HasDiscoveries::AllFailures, threads, limit);
        good &= found.good();
        if arguments.json {
            report::json(bounds, &found);
        } else {
            report::text(bounds, &found);
        }
    }
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
