//! `cargo xtask kernel`: the kernel that proves the gate's `bio` layer.
//!
//! Debian's own kernels let no program say what a function returns
//! (CONFIG_BPF_KPROBE_OVERRIDE), so there that layer cannot be in force. This is
//! Debian's source of the same series with a small configuration of our own,
//! `fragment.config`: only what the VM and its scripts use, nothing a module.
//! VMs boot it as `--kernel custom`, when they are asked to.
//!
//! In the cache's `kernel` folder:
//!
//! - `build/`: the unpacked source, built in place. A build that was interrupted
//!   goes on there where it was. An unpacking that was interrupted leaves only
//!   `build.part`, and begins anew.
//! - `ready/`: image, configuration and `lib/modules`, whole or not there at
//!   all: put together as `ready.part` and renamed. `ready/of` says of which
//!   source and configuration it is; of others, it is built again.
//!
//! `modprobe` takes a name for loaded that `modules.builtin` lists, so scripts
//! need not know that nothing is a module here.

mod config;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::{places, process, say, setup};

/// What is on; all else is off.
const FRAGMENT: &str = include_str!("fragment.config");
/// Where Debian's package puts the source.
const ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";
/// Which version of it a build folder holds: written when all is unpacked.
const SOURCE: &str = ".drover-source";
/// The function that the gate's first layer overrides.
const HOOKED: &str = "should_fail_bio";

const LOOK: Duration = Duration::from_secs(60);
const UNPACK: Duration = Duration::from_secs(1800);
/// Twenty minutes of two idle cores, and far more of two busy ones.
const BUILD: Duration = Duration::from_secs(6 * 3600);

/// How to build it.
#[derive(clap::Args)]
pub struct Arguments {
    /// Compilers that run at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    jobs: u8,
    /// How far all other work goes first, as nice(1) counts it
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(0..=19))]
    nice: u8,
}

/// The command.
pub fn command(arguments: &Arguments) -> Result<ExitCode> {
    let version = setup::kernel_source()?;
    let folder = places::kernel()?;
    let _lock = places::lock("kernel.lock", || {
        say::note("another `cargo xtask kernel` is at work; waiting for it");
    })?;
    let of = format!("{version}\n{FRAGMENT}");
    if is_ready(&folder.join("ready"), &of) {
        say::note("the test kernel is built already");
    } else {
        let build = folder.join("build");
        unpack(&build, &version)?;
        configure(&build, arguments)?;
        say::step("make bzImage", || {
            process::read(make(&build, arguments).arg("bzImage"), BUILD)
        })
        .context("build the kernel; what is built stays, and the next run goes on there")?;
        say::step("put the kernel in place", || {
            install(&build, &folder.join("ready"), &of)
        })?;
    }
    say::note(&format!("{}", image(&folder.join("ready"))?.display()));
    say::note("cargo xtask test --kernel custom");
    Ok(ExitCode::SUCCESS)
}

/// The image that was built.
///
/// # Errors
/// When none was, or not to its end.
pub fn built() -> Result<PathBuf> {
    image(&places::kernel()?.join("ready"))
}

fn image(ready: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(ready).into_iter().flatten().flatten();
    let mut images = entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("vmlinuz-"))
    });
    images.next().with_context(|| {
        format!(
            "no test kernel is in {}; `cargo xtask kernel` builds it",
            ready.display()
        )
    })
}

fn is_ready(ready: &Path, of: &str) -> bool {
    fs::read_to_string(ready.join("of")).is_ok_and(|text| text == of) && image(ready).is_ok()
}

/// Removes a folder, if it is there.
fn clear(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    clear(to)?;
    fs::rename(from, to).with_context(|| format!("rename {} to {}", from.display(), to.display()))
}

fn unpack(build: &Path, version: &str) -> Result<()> {
    if fs::read_to_string(build.join(SOURCE)).is_ok_and(|held| held == version) {
        return Ok(());
    }
    say::step(&format!("unpack {ARCHIVE}"), || {
        let part = build.with_extension("part");
        clear(&part)?;
        clear(build)?;
        fs::create_dir_all(&part).with_context(|| format!("create {}", part.display()))?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--strip-components=1", "--file", ARCHIVE])
            .arg("--directory")
            .arg(&part);
        process::read(&mut tar, UNPACK)?;
        let source = part.join(SOURCE);
        fs::write(&source, version).with_context(|| format!("write {}", source.display()))?;
        rename(&part, build)
    })
}

fn make(build: &Path, arguments: &Arguments) -> Command {
    // The lock is make's own, and its children's: when this program is killed they
    // build on, and a second make among them would spoil what they write.
    let mut make = Command::new("flock");
    make.arg(build.with_extension("lock"))
        .args(["nice", &format!("-n{}", arguments.nice)])
        .args(["make", "--silent", &format!("-j{}", arguments.jobs)])
        .current_dir(build)
        // Of a make that runs this: not this build's.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL");
    make
}

fn configure(build: &Path, arguments: &Arguments) -> Result<()> {
    let fragment = build.with_file_name("fragment.config");
    fs::write(&fragment, FRAGMENT).with_context(|| format!("write {}", fragment.display()))?;
    let mut configure = make(build, arguments);
    configure
        .arg("allnoconfig")
        .env("KCONFIG_ALLCONFIG", &fragment);
    process::read(&mut configure, LOOK * 10).context("configure the kernel")?;
    let written = build.join(".config");
    let text = fs::read_to_string(&written);
    let text = text.with_context(|| format!("read {}", written.display()))?;
    let unmet = config::unmet(FRAGMENT, &text);
    ensure!(
        unmet.is_empty(),
        "this source does not take, for want of what it depends on (xtask/src/kernel/fragment.config): {}",
        unmet.join(", ")
    );
    Ok(())
}

/// Puts together what a VM needs, and only then gives it its name.
fn install(build: &Path, ready: &Path, of: &str) -> Result<()> {
    let read = |name: &str| {
        let path = build.join(name);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    if !config::has_function(&read("System.map")?, HOOKED) {
        bail!(
            "the compiler left no function {HOOKED} in this kernel, or made a copy of another \
             name for those who call it: the gate's first layer has no place to sit"
        );
    }
    let release = read("include/config/kernel.release")?;
    let release = release.trim();
    let part = ready.with_extension("part");
    clear(&part)?;
    let modules = part.join("lib/modules").join(release);
    fs::create_dir_all(&modules).with_context(|| format!("create {}", modules.display()))?;
    let copies = [
        (
            "arch/x86/boot/bzImage",
            part.join(format!("vmlinuz-{release}")),
        ),
        (".config", part.join("config")),
        ("modules.builtin", modules.join("modules.builtin")),
        (
            "modules.builtin.modinfo",
            modules.join("modules.builtin.modinfo"),
        ),
    ];
    for (name, to) in copies {
        fs::copy(build.join(name), &to)
            .with_context(|| format!("copy {name} to {}", to.display()))?;
    }
    // The order of its modules: it has none.
    fs::write(modules.join("modules.order"), "")
        .with_context(|| format!("write in {}", modules.display()))?;
    let mut depmod = Command::new("depmod");
    depmod
        .arg("--basedir")
        .arg(&part)
        .arg(release)
        .env("PATH", places::path()?);
    process::read(&mut depmod, LOOK)?;
    fs::write(part.join("of"), of).with_context(|| format!("write in {}", part.display()))?;
    rename(&part, ready)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("drover-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn write(&self, name: &str, text: &str) {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// A build folder as make leaves it.
    fn built(folder: &Folder, map: &str) -> PathBuf {
        for (name, text) in [
            ("System.map", map),
            ("include/config/kernel.release", "6.12.1-drover\n"),
            ("arch/x86/boot/bzImage", "image"),
            (".config", "CONFIG_BPF=y\n"),
            ("modules.builtin", "kernel/fs/xfs/xfs.ko\n"),
            (
                "modules.builtin.modinfo",
                "xfs.file=fs/xfs/xfs\0xfs.license=GPL\0",
            ),
        ] {
            folder.write(&format!("build/{name}"), text);
        }
        folder.0.join("build")
    }

    #[test]
    fn what_is_ready_is_whole_and_of_this_source_and_configuration() {
        let folder = Folder::new("kernel-ready");
        let build = built(&folder, "ffffffff81000000 t should_fail_bio\n");
        let ready = folder.0.join("ready");
        assert!(!is_ready(&ready, "one"));
        let missing = image(&ready).unwrap_err().to_string();
        assert!(missing.contains("cargo xtask kernel"), "{missing}");
        // What an interrupted run left is not taken for whole.
        folder.write("ready.part/vmlinuz-6.12.0-drover", "half");
        assert!(!is_ready(&ready, "one"));
        install(&build, &ready, "one").unwrap();
        assert!(is_ready(&ready, "one") && !is_ready(&ready, "two"));
        assert!(!folder.0.join("ready.part").exists());
        assert_eq!(image(&ready).unwrap(), ready.join("vmlinuz-6.12.1-drover"));
        // Built in, and so known to modprobe.
        let mut modprobe = Command::new("modprobe");
        modprobe
            .arg("--dirname")
            .arg(&ready)
            .args(["--set-version", "6.12.1-drover", "--show-depends", "xfs"])
            .env("PATH", places::path().unwrap());
        let said = process::read(&mut modprobe, LOOK).unwrap();
        assert!(said.contains("builtin xfs"), "{said}");
        // Another takes its place.
        install(&build, &ready, "two").unwrap();
        assert!(is_ready(&ready, "two"));
    }

    #[test]
    fn a_kernel_without_the_function_is_refused() {
        let folder = Folder::new("kernel-map");
        let build = built(&folder, "ffffffff81000000 t should_fail_bio.isra.0\n");
        let ready = folder.0.join("ready");
        let error = install(&build, &ready, "one").unwrap_err().to_string();
        assert!(error.contains("should_fail_bio"), "{error}");
        assert!(!ready.exists());
    }
}
