//! Reads of the running kernel's structures, at the offsets the agent found.

use drover_ebpf::Offsets;

pub use crate::object::Object;

/// Filled in by the agent before the programs are loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

/// The offset of one field, as the agent found it.
macro_rules! at {
    ($field:ident) => {
        $crate::kernel::offset(core::mem::offset_of!(drover_ebpf::Offsets, $field))
    };
}
pub(crate) use at;

/// Reads the entry of OFFSETS that begins at byte `entry`; volatile, since the
/// compiler believes that all are 0.
#[inline(always)]
pub fn offset(entry: usize) -> usize {
    let table = (&raw const OFFSETS).cast::<u8>();
    // SAFETY: `at!` names a field of OFFSETS, all of which are aligned u32.
    (unsafe { table.add(entry).cast::<u32>().read_volatile() }) as usize
}

/// The sequence number of a gendisk.
#[inline(always)]
pub fn diskseq_of(disk: Object) -> Option<u64> {
    disk.read(at!(disk_seq))
}

/// A process: what names it for good.
#[derive(Clone, Copy)]
pub struct Process {
    pub tgid: u32,
    pub start_ns: u64,
    pub cgroup: u64,
    pub leader: Object,
}

/// The process of a task.
#[inline(always)]
pub fn process_of(task: Object) -> Option<Process> {
    let leader = task.follow(at!(task_leader))?;
    Some(Process {
        tgid: task.read(at!(task_tgid))?,
        start_ns: leader.read(at!(task_start))?,
        cgroup: cgroup_of(task).unwrap_or(0),
        leader,
    })
}

/// Whether a task is the kernel's own: its cgroup says nothing of whom it works for.
#[inline(always)]
pub fn is_kernels(task: Object) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    task.read::<u32>(at!(task_flags)).unwrap_or(0) & PF_KTHREAD != 0
}

/// The cgroup that a bio is charged to, where this kernel tells.
#[inline(always)]
pub fn cgroup_charged(bio: Object) -> Option<u64> {
    if at!(bio_group) == 0 {
        return None;
    }
    let blkcg = bio.follow(at!(bio_group))?.follow(at!(group_blkcg))?;
    let group = blkcg.follow(at!(blkcg_cgroup))?;
    group.follow(at!(cgroup_node))?.read(at!(node_id))
}

#[inline(always)]
fn cgroup_of(task: Object) -> Option<u64> {
    let set = task.follow(at!(task_cgroups))?;
    let mut group = set.follow(at!(css_set_slot))?;
    if at!(through_subsys) != 0 {
        group = group.follow(at!(css_cgroup))?;
    }
    group.follow(at!(cgroup_node))?.read(at!(node_id))
}
