//! Loads the gate programs over the pinned maps, and puts their links into the
//! places of those that an earlier agent left.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError};
use aya::programs::{CgroupDevice, KProbe, Lsm, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use drover_ebpf::gate::Hook;

use super::maps::Maps;
use super::{GateError, HookReport, cgroup, detached, layout, pins};
use crate::evidence::btf::Types;

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// An error with its causes; the verifier's log ends with the reason, and can
/// be long.
fn text(error: &dyn std::error::Error) -> GateError {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    if text.contains("bpf_override_return") {
        // The verifier's word for it is a page long.
        let why = "this kernel lets no program override what a function returns (CONFIG_BPF_KPROBE_OVERRIDE)";
        return GateError::Load(why.to_owned());
    }
    let tail = text.char_indices().rev().nth(600).map_or(0, |(at, _)| at);
    GateError::Load(text[tail..].to_owned())
}

impl From<ProgramError> for GateError {
    fn from(error: ProgramError) -> Self {
        text(&error)
    }
}

impl From<LinkError> for GateError {
    fn from(error: LinkError) -> Self {
        text(&error)
    }
}

/// Loads and attaches what can be. Each program by itself; what came of it is
/// in the report.
pub fn load(folder: &Path) -> Result<(Maps, Vec<HookReport>), GateError> {
    let bytes = fs::read(KERNEL_BTF).map_err(|error| GateError::Read {
        path: KERNEL_BTF.into(),
        error,
    })?;
    let layout: Vec<u8> = layout::find(&Types::parse(&bytes)?)?.bytes().collect();
    let btf = Btf::from_sys_fs().map_err(|e| text(&e))?;
    let mut ebpf = EbpfLoader::new()
        .btf(Some(&btf))
        .override_global("LAYOUT", layout.as_slice(), true)
        .default_map_pin_directory(folder)
        .load(aya::include_bytes_aligned!(concat!(
            env!("OUT_DIR"),
            "/drover-gates.o"
        )))
        .map_err(|e| text(&e))?;
    let lsm = lsm_is_on();
    let mut reports = Vec::new();
    for hook in Hook::ALL {
        let failure = match (hook, &lsm) {
            (Hook::Passthrough, _) => continue,
            (Hook::Bio | Hook::Opens, _) | (_, Ok(())) => attach(&mut ebpf, *hook, &btf, folder),
            (_, Err(why)) => Err(GateError::Load(why.clone())),
        };
        let failure = failure.err().map(|error| error.to_string());
        reports.push(HookReport {
            hook: *hook,
            holds: failure.is_none() || pins::place(folder, *hook).exists(),
            failure,
        });
    }
    pins::tidy(folder)?;
    Ok((Maps::take(&mut ebpf)?, reports))
}

/// Attaches a program, pins its link, and lets go of the one before it.
fn attach(ebpf: &mut Ebpf, hook: Hook, btf: &Btf, folder: &Path) -> Result<(), GateError> {
    let program = ebpf
        .program_mut(hook.name())
        .ok_or_else(|| GateError::Load("the object has no such program".to_owned()))?;
    let doorstep = pins::clear_doorstep(folder, hook)?;
    let link: FdLink = match hook {
        Hook::Bio => {
            let program: &mut KProbe = program.try_into()?;
            program.load()?;
            is_called(hook.name())?;
            let link = program.attach(hook.name(), 0)?;
            program.take_link(link)?.try_into()?
        }
        Hook::Opens => {
            let program: &mut CgroupDevice = program.try_into()?;
            program.load()?;
            let io = |what: &str, error| GateError::Load(format!("{what}: {error}"));
            let root = cgroup::root().map_err(|e| io("find the root cgroup", e))?;
            let link = cgroup::link(program.fd()?.as_fd(), &root)
                .map_err(|e| io("link the device program to the root cgroup", e))?;
            cgroup::pin(&link, &doorstep).map_err(|error| GateError::Pin {
                call: "pin",
                path: doorstep.clone(),
                error,
            })?;
            return pins::take_place(folder, hook);
        }
        _ => {
            let program: &mut Lsm = program.try_into()?;
            program.load(hook.name(), btf)?;
            let link = program.attach()?;
            program.take_link(link)?.into()
        }
    };
    link.pin(&doorstep).map_err(|e| text(&e))?;
    pins::take_place(folder, hook)
}

const SYMBOLS: &str = "/proc/kallsyms";

/// Fails where the kernel's own callers may go past a function: a program on it
/// would attach, and never be asked.
fn is_called(function: &str) -> Result<(), GateError> {
    let symbols = fs::read_to_string(SYMBOLS).map_err(|error| GateError::Read {
        path: SYMBOLS.into(),
        error,
    })?;
    match copy_of(function, &symbols) {
        Some(copy) => Err(GateError::Load(format!(
            "this kernel's compiler made {copy} of {function}: what calls it goes past a program on it"
        ))),
        None => Ok(()),
    }
}

/// A copy that the compiler made of a static function for its callers, such as
/// `f.constprop.0` of `f`.
fn copy_of<'a>(function: &str, symbols: &'a str) -> Option<&'a str> {
    let names = symbols
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2));
    let is_copy = |name: &&str| {
        name.strip_prefix(function)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    // A part that is moved away, and calls nothing differently.
    names.filter(is_copy).find(|name| !name.contains(".cold"))
}

/// Whether the kernel asks BPF LSM programs at all: they load and attach also
/// where `bpf` is not among the security modules of this boot.
fn lsm_is_on() -> Result<(), String> {
    let path = Path::new("/sys/kernel/security/lsm");
    let list = fs::read_to_string(path).or_else(|_| {
        // securityfs need not be mounted where an agent runs.
        let root = detached::root(c"securityfs", None, false)?;
        fs::read_to_string(detached::below(&root, "lsm"))
    });
    match list {
        Ok(list) if list.trim().split(',').any(|name| name == "bpf") => Ok(()),
        Ok(list) => Err(format!(
            "bpf is not among this boot's security modules ({}); add it to lsm= on the kernel's command line",
            list.trim()
        )),
        Err(error) => Err(format!("read {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_copy_of_just_that_function_counts() {
        let symbols = |name| format!("0000 T should_fail_bio\n0000 t {name}\t[module]\n");
        let copy = |name| copy_of("should_fail_bio", &symbols(name)).is_some();
        assert!(copy("should_fail_bio.constprop.0") && copy("should_fail_bio.isra.0"));
        assert!(!copy("should_fail_bio.cold") && !copy("should_fail_bios.isra.0"));
        assert!(!copy("_eil_addr_should_fail_bio") && !copy("submit_bio.part.0"));
    }
}
