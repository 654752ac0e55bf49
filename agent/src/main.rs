//! The `drover` binary.

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("backup-worker") => drover::backup::worker_main(),
        _ => ExitCode::FAILURE,
    }
}
