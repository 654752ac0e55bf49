//! Debian's packages: compilers, file system tools, kernels and the emulator.
//!
//! The package lists are fetched at most once, and only when something is
//! missing. Services that come with a package are not started.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{process, say};

/// What drover's build and tests use, and what for.
const PACKAGES: &[&str] = &[
    // The eBPF programs: a rustc with its source tree, and the LLVM that
    // bpf-linker must share with it.
    "rustc-web",
    "rust-web-src",
    "cargo-web",
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "gcc",
    "g++",
    "libc6-dev",
    "protobuf-compiler",
    "libprotobuf-dev",
    "git",
    // The VM, and its older kernel (6.1).
    EMULATOR,
    "linux-image-amd64",
    "python3",
    "python3-venv",
    // The first program in it: virtme-ng packs it into an initramfs.
    "busybox-static",
    // Volumes on a node, as kubelet handles them.
    "xfsprogs",
    "e2fsprogs",
    "util-linux",
    "mount",
    "udev",
    "kmod",
    "dmsetup",
    "iproute2",
    "procps",
    "psmisc",
    // Load, and other people's tools that check drover's results.
    "nvme-cli",
    "open-iscsi",
    "fio",
    "restic",
    "prometheus",
    "sg3-utils",
    "libiscsi-bin",
    "qemu-utils",
    "qemu-block-extra",
    // The iSCSI target that drover is measured beside.
    "tgt",
];

/// The test kernel's source (Debian 12's security archive), and what builds it:
/// pahole, of `dwarves`, makes the types that eBPF programs are loaded with.
const KERNEL_SOURCE: &str = "linux-source-6.12";
const KERNEL_BUILD: &[&str] = &[
    KERNEL_SOURCE,
    "make",
    "gcc",
    "bc",
    "bison",
    "flex",
    "dwarves",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
    "tar",
    "kmod",
];

/// The emulator. Debian 12's own, 7.2, panics its kernels now and then: two
/// processors of it can disagree on an instruction that the kernel is patching,
/// as it does whenever a tracepoint is taken into use (mended in QEMU 8.1 by
/// locking a page before it is translated). The newer one comes from backports.
const EMULATOR: &str = "qemu-system-x86";
const EMULATOR_MENDED: &str = "1:8.1";
/// Debian 12's backports: no package is taken from there unless it is asked for.
const BACKPORTS: &str = "bookworm-backports";
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/drover-backports.list";
const BACKPORTS_SOURCE: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
     http://deb.debian.org/debian bookworm-backports main\n";

/// The VM's newer kernel: one package a version, the newest is wanted.
const KERNEL: &str = "linux-image-6.12.";

const LOOK: Duration = Duration::from_secs(30);
const UPDATE: Duration = Duration::from_secs(600);
const INSTALL: Duration = Duration::from_secs(3600);

/// Installs what is missing.
pub fn install() -> Result<()> {
    missing_packages()?;
    if emulator_is_mended()? {
        return Ok(());
    }
    // The VMs run without it, only not for hours: no reason to stop here.
    if let Err(failure) = newer_emulator() {
        say::note(&format!(
            "QEMU 7.2 stays, whose VMs panic now and then; by hand: \
             add {BACKPORTS} to apt's sources, then \
             apt-get install -t {BACKPORTS} {EMULATOR} ({failure:#})"
        ));
    }
    Ok(())
}

fn emulator_is_mended() -> Result<bool> {
    let version = version(EMULATOR)?;
    let mut compare = Command::new("dpkg");
    compare.args(["--compare-versions", &version, "ge", EMULATOR_MENDED]);
    Ok(process::read(&mut compare, LOOK).is_ok())
}

/// The version of an installed package.
fn version(package: &str) -> Result<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${Version}", package]);
    Ok(process::read(&mut query, LOOK)?.trim().to_owned())
}

fn newer_emulator() -> Result<()> {
    say::step(&format!("{EMULATOR} from {BACKPORTS}"), || {
        let mut tee = as_root()?;
        tee.args([
            "sh",
            "-c",
            &format!("printf '{BACKPORTS_SOURCE}' > {BACKPORTS_LIST}"),
        ]);
        process::read(&mut tee, LOOK)?;
        process::read(&mut apt(&["update", "-qq"])?, UPDATE)?;
        let mut install = apt(&["install", "-qq", "--yes", "--no-install-recommends"])?;
        process::read(install.args(["-t", BACKPORTS, EMULATOR]), INSTALL)
    })?;
    Ok(())
}

/// Installs what is missing of the test kernel's source and its build; the
/// source's version.
pub fn kernel_source() -> Result<String> {
    let missing = absent(KERNEL_BUILD)?;
    if !missing.is_empty() {
        update()?;
        fetch(missing)?;
    }
    version(KERNEL_SOURCE)
}

/// Installs bpftrace, which drover's tracing is measured beside, if it is missing.
pub fn bpftrace() -> Result<()> {
    let missing = absent(&["bpftrace"])?;
    if missing.is_empty() {
        return Ok(());
    }
    update()?;
    fetch(missing)
}

fn missing_packages() -> Result<()> {
    let mut missing = absent(PACKAGES)?;
    let kernel_there = installed()?.iter().any(|name| is_kernel(name));
    if missing.is_empty() && kernel_there {
        return Ok(());
    }
    update()?;
    if !kernel_there {
        missing.push(newest_kernel()?);
    }
    fetch(missing)
}

/// Which of them are not installed.
fn absent(wanted: &[&str]) -> Result<Vec<String>> {
    let present = installed()?;
    let missing = wanted.iter().filter(|name| !present.contains(**name));
    Ok(missing.map(|name| (*name).to_owned()).collect())
}

fn update() -> Result<()> {
    say::step("apt-get update", || {
        process::read(&mut apt(&["update", "-qq"])?, UPDATE)
    })
    .context("fetch Debian's package lists; check /etc/apt/sources.list and the network")?;
    Ok(())
}

fn fetch(missing: Vec<String>) -> Result<()> {
    let list = missing.join(" ");
    say::step(&format!("apt-get install {list}"), || {
        let mut command = apt(&["install", "-qq", "--yes", "--no-install-recommends"])?;
        process::read(command.args(&missing), INSTALL)
    })
    .with_context(|| format!("install Debian packages; by hand: apt-get install {list}"))?;
    let present = installed()?;
    let absent: Vec<String> = missing
        .into_iter()
        .filter(|name| !present.contains(name.as_str()))
        .collect();
    if !absent.is_empty() {
        let list = absent.join(" ");
        bail!("apt-get left these packages uninstalled; by hand: apt-get install {list}");
    }
    Ok(())
}

/// The names of all installed packages.
fn installed() -> Result<BTreeSet<String>> {
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat=${db:Status-Abbrev} ${Package}\n"]);
    let text = process::read(&mut query, LOOK)
        .context("dpkg-query lists the installed packages: setup knows Debian 12 only")?;
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("ii"))
        .map(|name| name.trim().to_owned())
        .collect())
}

fn is_kernel(package: &str) -> bool {
    package
        .strip_prefix(KERNEL)
        .and_then(|rest| rest.strip_suffix("+deb12-amd64"))
        .is_some_and(|patch| patch.parse::<u32>().is_ok())
}

/// The newest 6.12 kernel that the package lists know.
fn newest_kernel() -> Result<String> {
    let mut search = Command::new("apt-cache");
    search.args([
        "search",
        "--names-only",
        "^linux-image-6\\.12\\..*deb12-amd64$",
    ]);
    let text = process::read(&mut search, LOOK)?;
    newest(&text).context(
        "no package linux-image-6.12.N+deb12-amd64 is known to apt: \
         add Debian 12's security archive (bookworm-security main) to apt's sources",
    )
}

fn newest(search: &str) -> Option<String> {
    search
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| is_kernel(name))
        .max_by_key(|name| patch(name))
        .map(str::to_owned)
}

/// 117 of `linux-image-6.12.117+deb12-amd64`.
fn patch(package: &str) -> u32 {
    let digits = package
        .strip_prefix(KERNEL)
        .and_then(|rest| rest.split('+').next());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// apt-get, as root, that asks nothing and waits for another apt.
fn apt(arguments: &[&str]) -> Result<Command> {
    // RUNLEVEL=1 keeps invoke-rc.d from starting the services of packages
    // (prometheus) on machines without systemd.
    let mut command = as_root()?;
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1"])
        .args(["apt-get", "-o", "DPkg::Lock::Timeout=600"])
        .args(arguments);
    Ok(command)
}

/// `env` as root: what follows are variables, then a program.
fn as_root() -> Result<Command> {
    let root = fs::metadata("/proc/self")
        .context("look at /proc/self")?
        .uid()
        == 0;
    let mut command = Command::new(if root { "env" } else { "sudo" });
    if !root {
        command.args(["--non-interactive", "env"]);
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_plain_kernel_is_taken() {
        let search = "\
linux-image-6.12.9+deb12-amd64 - Linux 6.12 for 64-bit PCs
linux-image-6.12.117+deb12-amd64 - Linux 6.12 for 64-bit PCs
linux-image-6.12.118+deb12-cloud-amd64 - cloud
linux-image-6.12.118+deb12-rt-amd64 - rt
linux-image-6.12.118+deb12-amd64-dbg - symbols
linux-image-6.12.22+deb12-amd64 - Linux 6.12";
        assert_eq!(
            newest(search).as_deref(),
            Some("linux-image-6.12.117+deb12-amd64")
        );
        assert_eq!(newest("linux-image-6.12.118+deb12-rt-amd64 - rt"), None);
    }
}
