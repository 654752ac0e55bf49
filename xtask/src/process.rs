//! How a program is run: always with a time limit, and ended with all its
//! children when that is over.
//!
//! Children stay in xtask's process group, so that Ctrl-C reaches them too; at
//! the limit they are found by their parents in /proc and ended by their ids.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::say;

/// How long a program that was told to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// What a program that ran to its end, or to its limit, left.
pub struct Ended {
    /// Its exit status; none when the limit ended it.
    pub status: Option<ExitStatus>,
    /// How long it ran.
    pub elapsed: Duration,
}

/// A command's name and arguments, for messages.
pub fn words(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}

/// Runs `command` with no input and hands each line of its output and errors to
/// `line` as it comes.
///
/// # Errors
/// When it cannot be started. That it failed or was ended is no error here.
pub fn stream(command: &mut Command, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<Ended> {
    let begin = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {}", words(command)))?;
    let (sender, lines) = mpsc::channel();
    let output: [Option<Box<dyn Read + Send>>; 2] = [
        child
            .stdout
            .take()
            .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        child
            .stderr
            .take()
            .map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
    ];
    for pipe in output.into_iter().flatten() {
        let sender = sender.clone();
        thread::spawn(move || forward(pipe, &sender));
    }
    drop(sender);
    let mut status = None;
    let mut quiet_since_end = None::<Instant>;
    while begin.elapsed() < limit {
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok(text) => line(&text),
            Err(RecvTimeoutError::Disconnected) if status.is_some() => break,
            Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(10)),
            Err(RecvTimeoutError::Timeout) => {
                // A daemon it left behind may hold the pipes for ever.
                if quiet_since_end.is_some_and(|since| since.elapsed() > GRACE) {
                    break;
                }
            }
        }
        if status.is_none() {
            status = child
                .try_wait()
                .with_context(|| format!("wait for {}", words(command)))?;
            if status.is_some() {
                quiet_since_end = Some(Instant::now());
            }
        }
    }
    if status.is_none() {
        end(&mut child);
        for text in lines.try_iter() {
            line(&text);
        }
    }
    Ok(Ended {
        status,
        elapsed: begin.elapsed(),
    })
}

fn forward(pipe: impl Read, lines: &mpsc::Sender<String>) {
    for bytes in BufReader::new(pipe).split(b'\n') {
        let Ok(bytes) = bytes else { return };
        let text = String::from_utf8_lossy(&bytes)
            .trim_end_matches('\r')
            .to_owned();
        if lines.send(text).is_err() {
            return;
        }
    }
}

/// Runs `command`, which must succeed, and gives its output and errors together.
///
/// # Errors
/// When it cannot be started, fails, or is not done at the limit; with the last
/// lines of what it said.
pub fn read(command: &mut Command, limit: Duration) -> Result<String> {
    let mut text = String::new();
    let ended = stream(command, limit, &mut |line| {
        text.push_str(line);
        text.push('\n');
    })?;
    match ended.status {
        Some(status) if status.success() => Ok(text),
        Some(status) => bail!("{}: {status}\n{}", words(command), tail(&text)),
        None => bail!(
            "{}: not done after {}\n{}",
            words(command),
            say::duration(limit),
            tail(&text)
        ),
    }
}

/// The last lines of a program's output, indented.
pub fn tail(text: &str) -> String {
    const LINES: usize = 40;
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    lines[from..]
        .iter()
        .map(|line| format!("    {line}\n"))
        .collect()
}

/// A program that is talked to in lines. When it is dropped, its input ends;
/// one that goes on for a while after that is ended.
pub struct Dialogue {
    child: Child,
    input: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    words: String,
}

impl Dialogue {
    /// Starts it; its errors go to `errors`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, errors: Stdio) -> Result<Self> {
        let words = words(command);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .with_context(|| format!("start {words}"))?;
        let (sender, lines) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || forward(output, &sender));
        }
        Ok(Self {
            input: child.stdin.take(),
            child,
            lines,
            words,
        })
    }

    /// Says a line to it.
    ///
    /// # Errors
    /// When it does not listen any more.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("its input has ended")?;
        writeln!(input, "{line}").with_context(|| format!("say {line:?} to {}", self.words))
    }

    /// What follows `first` in its next line that begins so; other lines are
    /// passed over.
    ///
    /// # Errors
    /// When it ended without such a line, or there was none in time.
    pub fn hear(&mut self, first: &str, limit: Duration) -> Result<String> {
        let until = Instant::now() + limit;
        loop {
            match self
                .lines
                .recv_timeout(until.saturating_duration_since(Instant::now()))
            {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(first) {
                        return Ok(rest.to_owned());
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("{} ended before it said {first:?}", self.words)
                }
                Err(RecvTimeoutError::Timeout) => bail!(
                    "{} did not say {first:?} in {}",
                    self.words,
                    say::duration(limit)
                ),
            }
        }
    }
}

impl Drop for Dialogue {
    fn drop(&mut self) {
        drop(self.input.take());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
        end(&mut self.child);
    }
}

/// Ends a child and all that descends from it: asks, waits, kills, by id.
pub fn end(child: &mut Child) {
    let family = family(child.id());
    signal("TERM", &family);
    let begin = Instant::now();
    while begin.elapsed() < GRACE {
        if matches!(child.try_wait(), Ok(Some(_))) && !family.iter().any(|id| alive(*id)) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let left: Vec<u32> = family.into_iter().filter(|id| alive(*id)).collect();
    signal("KILL", &left);
    let _ = child.wait();
}

fn signal(name: &str, ids: &[u32]) {
    if ids.is_empty() {
        return;
    }
    // Some may have ended meanwhile; kill(1) then complains, and rightly goes on.
    let _ = Command::new("kill")
        .arg(format!("-{name}"))
        .args(ids.iter().map(u32::to_string))
        .stderr(Stdio::null())
        .status();
}

fn alive(id: u32) -> bool {
    parent_and_state(id).is_some_and(|(_, state)| state != 'Z')
}

/// The process and its descendants, parents first.
fn family(root: u32) -> Vec<u32> {
    let mut children: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    for id in entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if let Some((parent, _)) = parent_and_state(id) {
            children.entry(parent).or_default().push(id);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(id) = found.get(next) {
        found.extend(children.get(id).into_iter().flatten());
        next += 1;
    }
    found
}

/// Fields 3 and 4 of /proc/PID/stat; the name before them may hold spaces and brackets.
fn parent_and_state(id: u32) -> Option<(u32, char)> {
    let text = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_comes_line_by_line_with_the_status() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2; exit 3"]);
        let ended = stream(&mut command, Duration::from_secs(20), &mut |l| {
            lines.push(l.to_owned())
        })
        .unwrap();
        lines.sort();
        assert_eq!(lines, ["one", "two"]);
        assert_eq!(ended.status.unwrap().code(), Some(3));
    }

    #[test]
    fn the_limit_ends_grandchildren_too() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "sh -c 'echo $$; sleep 600; true' ; true"]);
        let ended = stream(&mut command, Duration::from_secs(1), &mut |l| {
            lines.push(l.to_owned())
        })
        .unwrap();
        assert!(ended.status.is_none());
        let grandchild: u32 = lines[0].parse().unwrap();
        assert!(!alive(grandchild));
    }

    #[test]
    fn a_failure_names_the_command_and_its_last_words() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo it broke; exit 1"]);
        let error = read(&mut command, Duration::from_secs(20))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("sh -c echo it broke"), "{error}");
        assert!(error.contains("    it broke"), "{error}");
    }

    #[test]
    fn a_dialogue_passes_lines_over_ends_in_time_and_says_when_there_is_none() {
        let second = Duration::from_secs(10);
        let mut cat = Dialogue::start(&mut Command::new("cat"), Stdio::null()).unwrap();
        cat.tell("one").unwrap();
        cat.tell("two 2 3").unwrap();
        assert_eq!(cat.hear("two", second).unwrap(), " 2 3");
        let late = cat.hear("three", Duration::from_millis(20)).unwrap_err();
        assert!(late.to_string().contains("cat did not say"), "{late}");
        let mut gone = Dialogue::start(&mut Command::new("true"), Stdio::null()).unwrap();
        let ended = gone.hear("x", second).unwrap_err();
        assert!(ended.to_string().contains("true ended before"), "{ended}");
    }
}
