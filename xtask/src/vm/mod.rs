//! A VM with a Debian kernel that has what this machine's may lack: NVMe/TCP,
//! device mapper, BPF LSM.
//!
//! virtme-ng boots it with the machine's own root file system, read-only, so
//! build products and tools are in place; folders given as writable are the
//! machine's own, and what else is written (/tmp, /var, /etc) lives in the
//! VM's memory and goes with it. The processor is emulated always: /dev/kvm may
//! exist and open, and still not run an ordinary kernel.
//!
//! What virtme-ng was seen to do, and what is made of it here:
//! - it starts virtme-run from PATH: the venv stands in front;
//! - qemu opens its standard output and error anew, as files: two that are one
//!   regular file write over each other, so it gets two pipes;
//! - standard input must not be a terminal, which it would set to raw;
//! - it looks for a virtiofsd that may not serve it: 9p is asked for;
//! - a kernel that panics shows nothing and gives status 255, so the console
//!   stays on with only the gravest messages let through, and 255 without the
//!   guest's own word for it is said to be the kernel's end;
//! - a guest that hangs would run for ever: `timeout` in the guest ends the
//!   command first, and a minute later qemu is ended by its id.

mod kernel;

pub use kernel::Kernel;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{places, process, say, setup};

/// What every command in a VM finds done.
const PRELUDE: &str = include_str!("prelude.sh");
/// How much longer than the guest's own limit the machine waits, for the boot
/// (half a minute, more when the machine is busy) and the shutdown.
const BOOT: Duration = Duration::from_secs(240);
/// What virtme-ng answers when the guest left no status.
const NO_STATUS: i32 = 255;

/// What `cargo xtask vm` is told.
#[derive(clap::Args)]
pub struct Arguments {
    /// 6.12, 6.1, custom (what `cargo xtask kernel` built), or the path of an image
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Memory, as 2G or 512M
    #[arg(long, default_value = "2G", value_parser = memory)]
    memory: u32,
    /// A folder that the VM may write to; all others are read-only or its own
    #[arg(long, value_name = "DIR")]
    rw: Vec<PathBuf>,
    /// Seconds that the command may run
    #[arg(long, default_value_t = 900, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A VM to run.
pub struct VmSpec {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Folders that it may write to.
    pub writable: Vec<PathBuf>,
    /// How long the command may run, boot not counted.
    pub timeout: Duration,
    /// Environment variables of the command.
    pub environment: Vec<(String, String)>,
    /// The command and its arguments; its folder is the checkout's root.
    pub command: Vec<String>,
}

impl VmSpec {
    /// A VM of the usual size that runs `command` for up to `timeout`.
    pub fn new(kernel: Kernel, timeout: Duration, command: Vec<String>) -> Self {
        let (writable, environment) = (Vec::new(), Vec::new());
        Self {
            kernel,
            memory_mib: 2048,
            writable,
            timeout,
            environment,
            command,
        }
    }
}

/// How a command in a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// With this exit status.
    Exited(i32),
    /// It was not done in time.
    TimedOut,
    /// The VM went down under it (a kernel panic), or never came up.
    Down,
}

/// A VM's run.
#[derive(Debug)]
pub struct Outcome {
    /// How the command ended.
    pub status: Status,
    /// How long it took, boot included.
    pub elapsed: Duration,
}

impl Outcome {
    /// Whether the command succeeded.
    pub fn success(&self) -> bool {
        self.status == Status::Exited(0)
    }

    /// What happened, for a message.
    pub fn describe(&self) -> String {
        let after = say::duration(self.elapsed);
        match self.status {
            Status::Exited(code) => format!("exit status {code} after {after}"),
            Status::TimedOut => format!("not done after {after}"),
            Status::Down => format!("the VM went down after {after}"),
        }
    }
}

/// The command.
pub fn command(arguments: Arguments) -> Result<ExitCode> {
    setup::run()?;
    let mut spec = VmSpec::new(
        arguments.kernel,
        Duration::from_secs(arguments.timeout),
        arguments.command,
    );
    spec.memory_mib = arguments.memory;
    spec.writable = arguments.rw;
    let outcome = run(&spec, &mut |line| println!("{line}"))?;
    match outcome.status {
        Status::Exited(code) => {
            // A status is one byte; what a signal ended is 128 and more already.
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
        }
        Status::TimedOut | Status::Down => bail!("{}", outcome.describe()),
    }
}

/// Boots a VM, runs the command in it, and hands every line it prints to `line`.
///
/// # Errors
/// When the VM cannot be started: no such kernel, a writable folder that is not
/// there, virtme-ng missing. How the command ended is no error here.
pub fn run(spec: &VmSpec, line: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let image = spec.kernel.image()?;
    let scratch = places::Scratch::new(&format!("vm-{}", spec.kernel.name()))?;
    let script = scratch.path().join("command.sh");
    let written = scratch.path().join("status");
    fs::write(&script, guest_script(spec, &written)?)
        .with_context(|| format!("write {}", script.display()))?;
    let mut vng = Command::new(places::venv()?.join("bin/vng"));
    vng.current_dir(places::root())
        .env("PATH", places::path()?)
        .arg("--run")
        .arg(&image)
        .args(["--disable-kvm", "--cpus", "2", "--force-9p", "--verbose"])
        .arg("--memory")
        .arg(format!("{}M", spec.memory_mib))
        .args([
            "--append",
            "quiet loglevel=2 lsm=lockdown,capability,landlock,yama,apparmor,bpf",
        ])
        .arg("--rwdir")
        .arg(scratch.path());
    for folder in &spec.writable {
        let folder = fs::canonicalize(folder)
            .with_context(|| format!("find the VM's writable folder {}", folder.display()))?;
        vng.arg("--rwdir").arg(folder);
    }
    vng.arg("--exec")
        .arg(format!("sh {}", quoted(&text(&script)?)));
    let mut console = Console::default();
    let ended = process::stream(&mut vng, spec.timeout + BOOT, &mut |text| {
        if let Some(shown) = console.shown(text) {
            line(shown);
        }
    })
    .context("start the VM; `cargo xtask setup` installs virtme-ng")?;
    if let Some(boot) = console.withheld() {
        line(&boot);
    }
    let status = match (
        guest_status(&written),
        ended.status.and_then(|status| status.code()),
    ) {
        (Some(TIMED_OUT | KILLED), _) => Status::TimedOut,
        (Some(code), _) => Status::Exited(code),
        (None, None) => Status::TimedOut,
        (None, Some(NO_STATUS)) => Status::Down,
        (None, Some(code)) => bail!("virtme-ng did not start the VM (exit status {code})"),
    };
    scratch.remove()?;
    Ok(Outcome {
        status,
        elapsed: ended.elapsed,
    })
}

/// What `timeout` answers for a command that it ended.
const TIMED_OUT: i32 = 124;
/// And for one that it had to kill.
const KILLED: i32 = 137;

/// The script that the guest runs: the prelude, then the command under a limit.
/// Its status goes to a file, since virtme-ng's 255 may mean two things.
fn guest_script(spec: &VmSpec, status: &Path) -> Result<String> {
    let mut script = String::from(PRELUDE);
    let mut export = |name: &str, value: &str| {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    };
    export(
        "PATH",
        places::path()?.to_str().context("PATH is not UTF-8")?,
    );
    export("DROVER_CACHE", &text(&places::cache()?)?);
    export("CARGO_TARGET_DIR", &text(&places::target()?)?);
    for (name, value) in &spec.environment {
        export(name, value);
    }
    script.push_str(&format!("echo '{BOOTED}'\n"));
    let words: Vec<String> = spec.command.iter().map(|word| quoted(word)).collect();
    script.push_str(&format!(
        "cd {}\ntimeout --kill-after=10 {} {}\ncode=$?\necho $code > {}\nexit $code\n",
        quoted(&text(places::root())?),
        spec.timeout.as_secs().max(1),
        words.join(" "),
        quoted(&text(status)?),
    ));
    Ok(script)
}

/// The status that the guest wrote down.
fn guest_status(path: &Path) -> Option<i32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The line that the guest prints when the boot is over.
const BOOTED: &str = "drover-vm: booted";

/// What the VM prints: a boot that went well is not worth showing.
#[derive(Default)]
struct Console {
    boot: String,
    booted: bool,
}

impl Console {
    /// The line, when it is the command's or a complaint of the kernel's.
    fn shown<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        if self.booted {
            return (!line.contains("] reboot: ")).then_some(line);
        }
        if line.ends_with(BOOTED) {
            self.booted = true;
            self.boot.clear();
        } else {
            self.boot.push_str(line);
            self.boot.push('\n');
        }
        None
    }

    /// The last lines of a boot that never ended.
    fn withheld(&self) -> Option<String> {
        (!self.booted).then(|| process::tail(&self.boot))
    }
}

fn text(path: &Path) -> Result<String> {
    let text = path
        .to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(text.to_owned())
}

/// A word as the shell reads it back.
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// MiB of "2G" or "512M".
fn memory(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is no size; write 2G or 512M");
    let digits = text.trim_end_matches(['G', 'M']);
    let number: u32 = digits.parse().map_err(|_| wrong())?;
    let mib = match text.strip_prefix(digits) {
        Some("G") => number.checked_mul(1024),
        Some("M") => Some(number),
        _ => None,
    };
    let mib = mib.ok_or_else(wrong)?;
    if mib < 256 {
        return Err(format!(
            "{text} is too little for a kernel and its modules; at least 256M"
        ));
    }
    Ok(mib)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_or_refused_with_what_was_written() {
        assert_eq!(memory("2G"), Ok(2048));
        assert_eq!(memory("512M"), Ok(512));
        for wrong in [
            "",
            "G",
            "2",
            "2K",
            "2GG",
            "-1G",
            "9999999999G",
            "5000000G",
            "64M",
        ] {
            assert!(memory(wrong).unwrap_err().contains(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_boot_is_shown_only_when_it_never_ends() {
        let mut console = Console::default();
        assert_eq!(console.shown("[    0.000000] Linux version"), None);
        assert!(console.withheld().unwrap().contains("Linux version"));
        assert_eq!(console.shown(BOOTED), None);
        assert_eq!(console.shown("ok"), Some("ok"));
        assert_eq!(console.shown("[   18.848588] reboot: Power down"), None);
        assert_eq!(console.withheld(), None);
    }

    #[test]
    fn the_shell_reads_back_what_was_quoted() {
        let word = "it's $HOME `x` \"y\" \\ *";
        let mut echo = Command::new("sh");
        echo.arg("-c").arg(format!("printf %s {}", quoted(word)));
        assert_eq!(
            String::from_utf8(echo.output().unwrap().stdout).unwrap(),
            word
        );
    }
}
