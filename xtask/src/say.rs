//! How progress looks: one line a step, with what and how long.
//!
//! On a terminal the line of a running step counts its seconds; elsewhere (CI)
//! a line every half minute says that it still runs. Colours only on a terminal
//! and without NO_COLOR, or where
//! CLICOLOR_FORCE asks for them.

use std::env;
use std::io::{IsTerminal, Write, stdout};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

const ON_TERMINAL: Duration = Duration::from_secs(1);
const ELSEWHERE: Duration = Duration::from_secs(30);

/// The variable that asks for colours where the output is no terminal: a VM's,
/// whose lines are shown on one.
pub const FORCE_COLOURS: &str = "CLICOLOR_FORCE";

fn paint(code: &str, text: &str) -> String {
    let terminal = stdout().is_terminal() && env::var_os("NO_COLOR").is_none();
    if terminal || env::var_os(FORCE_COLOURS).is_some() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Green, for what went well.
pub fn good(text: &str) -> String {
    paint("32", text)
}

/// Red, for what failed.
pub fn bad(text: &str) -> String {
    paint("31", text)
}

/// Faint, for what is by the way.
pub fn faint(text: &str) -> String {
    paint("2", text)
}

/// A heading.
pub fn title(text: &str) {
    println!("{}", paint("1", text));
}

/// A line by the way.
pub fn note(text: &str) {
    println!("  {}", faint(text));
}

/// The error that ends a command, with its causes.
pub fn error(error: &anyhow::Error) {
    let _ = stdout().flush();
    eprintln!("{} {error:#}", bad("error:"));
}

/// "0.4 s", "2 min 13 s".
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

/// Does `work` and says what it is, that it still runs, and how it ended.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let begin = Instant::now();
    let terminal = stdout().is_terminal();
    let (done, ended) = mpsc::channel::<()>();
    let label = what.to_owned();
    let ticker = thread::spawn(move || tick(&label, begin, terminal, &ended));
    let result = work();
    drop(done);
    // The ticker only prints; were it to panic, the step's own result still counts.
    let _ = ticker.join();
    let (mark, word) = if result.is_ok() {
        (good("✓"), "")
    } else {
        (bad("✗"), " failed")
    };
    let clear = if terminal { "\r\x1b[K" } else { "" };
    println!(
        "{clear}{mark} {what}{word} {}",
        faint(&duration(begin.elapsed()))
    );
    result
}

fn tick(what: &str, begin: Instant, terminal: bool, ended: &mpsc::Receiver<()>) {
    let every = if terminal { ON_TERMINAL } else { ELSEWHERE };
    loop {
        if terminal {
            print!(
                "\r\x1b[K{} {what} {}",
                faint("…"),
                faint(&duration(begin.elapsed()))
            );
            let _ = stdout().flush();
        }
        match ended.recv_timeout(every) {
            Err(RecvTimeoutError::Timeout) if !terminal => {
                println!("  … {what}: {} so far", duration(begin.elapsed()));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
