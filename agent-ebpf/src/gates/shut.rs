//! Which gates are closed, who may pass, and what was refused.

use aya_ebpf::helpers::bpf_get_current_task;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use drover_ebpf::gate::{Exempt, Gate, Hook, Node, TICK_NS};

use crate::disk::{Target, at};
use crate::object::Object;

/// Closed disks by their sequence number.
#[map]
static GATES: HashMap<u64, Gate> = HashMap::pinned(1024, 0);
/// Closed disks by the numbers with which they can be opened.
#[map]
pub static NODES: HashMap<Node, u64> = HashMap::pinned(8192, 0);
/// Processes that may pass.
#[map]
static EXEMPT: HashMap<u32, Exempt> = HashMap::pinned(64, 0);
/// Not 0 while there may be a closed gate.
#[map]
static ARMED: Array<u32> = Array::pinned(1, 0);
/// How often each hook refused.
#[map]
static REFUSED: PerCpuArray<u64> = PerCpuArray::pinned(64, 0);

/// Whether any gate is closed at all.
#[inline(always)]
pub fn armed() -> bool {
    ARMED.get(0).is_some_and(|armed| *armed != 0)
}

/// Whether the disk's gate is closed.
#[inline(always)]
pub fn is_closed(disk: u64) -> bool {
    // SAFETY: only whether there is an entry is looked at.
    unsafe { GATES.get(&disk) }.is_some()
}

/// Whether the running process is to be refused; counts it then.
#[inline(always)]
pub fn refuses(hook: Hook, target: Option<Target>) -> bool {
    let Some(target) = target else {
        return false;
    };
    if !is_closed(target.disk) || is_exempt() == Some(true) {
        return false;
    }
    count(hook);
    if target.passthrough {
        count(Hook::Passthrough);
    }
    true
}

#[inline(always)]
pub fn count(hook: Hook) {
    if let Some(count) = REFUSED.get_ptr_mut(hook as u32) {
        // SAFETY: this CPU's own element. A program that interrupts another
        // can lose one of two counts, which decides nothing.
        unsafe { *count += 1 };
    }
}

#[inline(always)]
fn is_exempt() -> Option<bool> {
    // SAFETY: the helper has no precondition.
    let task = Object(unsafe { bpf_get_current_task() } as *const u8);
    let tgid: u32 = task.read(at!(task_tgid))?;
    // SAFETY: the value is copied at once.
    let exempt = unsafe { EXEMPT.get(&tgid) }.copied()?;
    let began: u64 = task.follow(at!(task_leader))?.read(at!(task_start))?;
    Some(began / TICK_NS == exempt.began)
}
