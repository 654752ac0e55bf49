//! Reads of the running kernel's structures, at the offsets the agent found.

use aya_ebpf::helpers::generated::bpf_get_current_task_btf;
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

/// A kernel structure whose type the verifier knows: a parameter of a hook, or
/// where a field of another such structure points. The verifier takes the place
/// of a checked read: it refuses a program that reads what is no field of that
/// type, so a read is one load. (An offset is a number to it, since the agent's
/// table is frozen before the programs are loaded.) A load that faults gives 0
/// (`BPF_PROBE_MEM` in the kernel's kernel/bpf/verifier.c).
#[derive(Clone, Copy)]
pub struct Typed(pub *const u8);

impl Typed {
    /// The running task.
    #[inline(always)]
    pub fn current() -> Self {
        // SAFETY: the helper has no precondition.
        Self(unsafe { bpf_get_current_task_btf() } as *const u8)
    }

    /// The field at `offset` bytes.
    #[inline(always)]
    pub fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the verifier lets no other load pass than one of a field of
        // this structure, and the kernel makes one that faults a 0. Volatile:
        // each field is loaded where it is asked for, and as a whole.
        unsafe { self.0.wrapping_add(offset).cast::<T>().read_volatile() }
    }

    /// Follows a pointer at `offset` bytes; none when it is null.
    #[inline(always)]
    pub fn follow(self, offset: usize) -> Option<Self> {
        let to: *const u8 = self.read(offset);
        if to.is_null() { None } else { Some(Self(to)) }
    }

    /// The same structure where its type does not matter.
    #[inline(always)]
    pub fn object(self) -> Object {
        Object(self.0)
    }
}

/// The sequence number of a gendisk.
#[inline(always)]
pub fn diskseq_of(disk: Typed) -> u64 {
    disk.read(at!(disk_seq))
}

/// A process: what names it for good.
#[derive(Clone, Copy)]
pub struct Process {
    pub tgid: u32,
    pub start_ns: u64,
    pub cgroup: u64,
    pub leader: Typed,
}

/// The process of a task.
#[inline(always)]
pub fn process_of(task: Typed) -> Option<Process> {
    let leader = task.follow(at!(task_leader))?;
    Some(Process {
        tgid: task.read(at!(task_tgid)),
        start_ns: leader.read(at!(task_start)),
        cgroup: cgroup_of(task).unwrap_or(0),
        leader,
    })
}

/// Whether a task is the kernel's own: its cgroup says nothing of whom it works for.
#[inline(always)]
pub fn is_kernels(task: Typed) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    task.read::<u32>(at!(task_flags)) & PF_KTHREAD != 0
}

/// The cgroup that a bio is charged to, where this kernel tells.
#[inline(always)]
pub fn cgroup_charged(bio: Typed) -> Option<u64> {
    if at!(bio_group) == 0 {
        return None;
    }
    let blkcg = bio.follow(at!(bio_group))?.follow(at!(group_blkcg))?;
    let group = blkcg.follow(at!(blkcg_cgroup))?;
    Some(group.follow(at!(cgroup_node))?.read(at!(node_id)))
}

#[inline(always)]
fn cgroup_of(task: Typed) -> Option<u64> {
    let set = task.follow(at!(task_cgroups))?;
    let mut group = set.follow(at!(css_set_slot))?;
    if at!(through_subsys) != 0 {
        group = group.follow(at!(css_cgroup))?;
    }
    Some(group.follow(at!(cgroup_node))?.read(at!(node_id)))
}
