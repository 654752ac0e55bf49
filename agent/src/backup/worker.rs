//! The worker: `drover backup-worker`, one job in a process of its own.
//!
//! A repository that hangs puts the thread that touches it into D state, and
//! must take nobody with it; so all that reads or writes a repository happens
//! here. The job comes as one line on standard input. The end of standard
//! input, also by the agent's death, and SIGTERM ask it to stop: it commits
//! what it has read of its slice and exits. If it cannot, it exits anyway
//! after [`LAST_GRACE`].

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};

use super::archive::{self, Ended};
use super::error::BackupError;
use super::restore;
use super::source::Stop;
use super::spec::{Event, Job};
use super::tally::Tally;

/// How often it says how far it is.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// How long a worker lives on that nobody waits for any more.
const LAST_GRACE: Duration = Duration::from_secs(30);

/// Exit code of a worker that stopped when asked.
const STOPPED: u8 = 2;

/// Does the job on standard input. `main` calls it before it starts any thread.
///
/// The exit code is 0 when the job is done, 2 when it was stopped, 1 when it failed.
pub fn worker_main() -> ExitCode {
    // A backup can be done again, so it goes first when memory is short; its
    // parent serves volumes and must not.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "500") {
        eprintln!("write /proc/self/oom_score_adj: {error}");
    }
    let stop = Stop::default();
    let job = match read_job().and_then(|job| watch(&stop).map(|()| job)) {
        Ok(job) => job,
        Err(why) => {
            tell(&Event::Failed(BackupError::Invalid { why }));
            return ExitCode::FAILURE;
        }
    };
    let tally = Tally::default();
    let last = std::thread::scope(|scope| {
        let (end, ended) = mpsc::channel::<()>();
        let (tally, stop) = (&tally, &stop);
        scope.spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(TELL_EVERY) {
                // Nobody listens: nobody wants it any more.
                if !tell(&Event::Progress(tally.counts())) {
                    stop.ask();
                }
            }
        });
        let last = work(&job, tally, stop);
        drop(end);
        last
    });
    tell(&Event::Progress(tally.counts()));
    tell(&last);
    match last {
        Event::Failed(_) => ExitCode::FAILURE,
        Event::Interrupted => ExitCode::from(STOPPED),
        Event::Done(_) | Event::Backups(_) | Event::Progress(_) => ExitCode::SUCCESS,
    }
}

fn work(job: &Job, tally: &Tally, stop: &Stop) -> Event {
    let ended = match job {
        Job::Backup(spec) => archive::run(spec, tally, stop),
        Job::Restore(spec) => restore::run(spec, tally, stop),
        Job::List(spec) => match restore::list(spec, stop) {
            Ok(backups) => return Event::Backups(backups),
            Err(error) => Err(error),
        },
    };
    match ended {
        Ok(Ended::Whole(id)) => Event::Done(id),
        Ok(Ended::Stopped) => Event::Interrupted,
        Err(error) => Event::Failed(error),
    }
}

fn read_job() -> Result<Job, String> {
    let mut line = String::new();
    io::stdin()
        .lock()
        .read_line(&mut line)
        .map_err(|error| format!("read the job from standard input: {error}"))?;
    // The error would quote the line, and the line holds a password.
    serde_json::from_str(&line).map_err(|error| {
        format!(
            "the job on standard input cannot be read: {:?} at column {}; \
             backup-worker is started by drover itself",
            error.classify(),
            error.column()
        )
    })
}

/// Asks for a stop at SIGTERM and at the end of standard input.
fn watch(stop: &Stop) -> Result<(), String> {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block()
        .map_err(|error| format!("block SIGTERM: {error}"))?;
    let stopped = stop.clone();
    std::thread::spawn(move || {
        while term.wait().is_err() {}
        end_soon(&stopped);
    });
    let stopped = stop.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while !matches!(io::stdin().lock().read(&mut buffer), Ok(0) | Err(_)) {}
        end_soon(&stopped);
    });
    Ok(())
}

fn end_soon(stop: &Stop) {
    stop.ask();
    std::thread::sleep(LAST_GRACE);
    std::process::exit(i32::from(STOPPED));
}

/// Says something on standard output. False: nobody listens.
fn tell(event: &Event) -> bool {
    let mut line = serde_json::to_vec(event).expect("plain numbers and texts");
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line).and_then(|()| out.flush()).is_ok()
}
