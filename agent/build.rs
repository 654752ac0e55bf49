//! Compiles the protocol files, and the eBPF programs to two objects with BTF
//! that the binary embeds.
//!
//! The programs need a rustc with its own source tree and the bpf-linker that
//! belongs to it (`cargo xtask setup` installs both: Debian's `rustc-web`,
//! `rust-web-src`, `cargo-web`, and bpf-linker in the cache folder). Their
//! places can be named by DROVER_BPF_RUSTC, DROVER_BPF_CARGO and PATH.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    protocols()?;
    programs()
}

fn protocols() -> Result<(), Box<dyn Error>> {
    let folder = Path::new("../proto");
    let files =
        ["csi.proto", "drover.proto", "pluginregistration.proto"].map(|name| folder.join(name));
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    tonic_prost_build::configure().compile_protos(&files, &[folder.to_path_buf()])?;
    Ok(())
}

fn programs() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=../agent-ebpf");
    for name in ["DROVER_BPF_RUSTC", "DROVER_BPF_CARGO", "DROVER_CACHE"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let cargo = env::var("DROVER_BPF_CARGO").unwrap_or_else(|_| "/usr/bin/cargo".into());
    let rustc = env::var("DROVER_BPF_RUSTC").unwrap_or_else(|_| "/usr/bin/rustc".into());
    let target = out.join("ebpf");
    let mut command = Command::new(&cargo);
    command
        .current_dir("../agent-ebpf")
        .args([
            "build",
            "--release",
            "--locked",
            "--bins",
            "--features",
            "programs",
        ])
        .args([
            "--target",
            "bpfel-unknown-none",
            "-Z",
            "build-std=core",
            "--target-dir",
        ])
        .arg(&target)
        .env("RUSTC", &rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("PATH", path_with_linker()?)
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            ["-Cdebuginfo=2", "-Clink-arg=--btf"].join("\x1f"),
        )
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTDOC")
        .env_remove("CARGO_TARGET_DIR");
    let status = command
        .status()
        .map_err(|e| format!("run {cargo}: {e}: install it with `cargo xtask setup`"))?;
    if !status.success() {
        return Err(format!(
            "the eBPF programs do not compile ({status}): `cargo xtask setup` installs the compiler and bpf-linker"
        )
        .into());
    }
    for object in ["drover-ebpf", "drover-gates"] {
        std::fs::copy(
            target.join("bpfel-unknown-none/release").join(object),
            out.join(format!("{object}.o")),
        )?;
    }
    Ok(())
}

/// PATH with the cache folder's bin first, where `cargo xtask setup` puts bpf-linker.
fn path_with_linker() -> Result<std::ffi::OsString, Box<dyn Error>> {
    let cache = match env::var_os("DROVER_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env::var_os("HOME").ok_or("HOME is not set")?).join(".cache/drover"),
    };
    let mut folders = vec![cache.join("bin")];
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    Ok(env::join_paths(folders)?)
}
