//! Who has a disk open: the kernel's own count, and every open file that leads to it.

use core::ffi::c_void;

use aya_ebpf::bindings::seq_file;
use aya_ebpf::helpers::generated::bpf_seq_write;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use drover_ebpf::{DEVICE, FILE, FMODE_PATH, FOLDER, Held};

use crate::kernel::{Object, Typed, at, process_of};

/// The sequence number of the disk whose holders are being listed.
#[map]
static TARGET: Array<u64> = Array::with_max_entries(1, 0);
/// `bdev_sops`' file system, BDEVFS_MAGIC in include/uapi/linux/magic.h.
const BDEVFS_MAGIC: u64 = 0x6264_6576;
/// SYSFS_MAGIC, in the same file.
const SYSFS_MAGIC: u64 = 0x6265_6572;

/// `struct bpf_iter_meta`.
#[repr(C)]
pub struct Meta {
    seq: *mut seq_file,
}

/// `struct bpf_iter__task_file`.
#[repr(C)]
pub struct TaskFile {
    meta: *const Meta,
    task: *const u8,
    fd: u64,
    file: *const u8,
}

/// `struct bpf_iter__task_vma`.
#[repr(C)]
pub struct TaskVma {
    meta: *const Meta,
    task: *const u8,
    vma: *const u8,
}

/// Each descriptor of each task that has a table of its own.
#[unsafe(link_section = "iter/task_file")]
#[unsafe(no_mangle)]
extern "C" fn descriptors(ctx: *const TaskFile) -> i32 {
    // Each pointer is loaded once: the verifier believes a check only of the
    // very value that was checked.
    // SAFETY: the kernel passes a context of this type.
    let (meta, task, file) = unsafe {
        (
            (&raw const (*ctx).meta).read_volatile(),
            (&raw const (*ctx).task).read_volatile(),
            (&raw const (*ctx).file).read_volatile(),
        )
    };
    if !task.is_null() && !file.is_null() {
        // None: it leads elsewhere. One that cannot be read is in the kernel's
        // count of openers, which the agent compares.
        let _ = list(meta, Typed(task), Object(file));
    }
    0
}

/// Each mapping of each process: a mapping keeps its file open after its descriptor is closed.
#[unsafe(link_section = "iter/task_vma")]
#[unsafe(no_mangle)]
extern "C" fn mappings(ctx: *const TaskVma) -> i32 {
    // SAFETY: the kernel passes a context of this type; loaded once, as above.
    let (meta, task, vma) = unsafe {
        (
            (&raw const (*ctx).meta).read_volatile(),
            (&raw const (*ctx).task).read_volatile(),
            (&raw const (*ctx).vma).read_volatile(),
        )
    };
    if !task.is_null() && !vma.is_null() {
        if let Some(file) = Object(vma).follow(at!(vma_file)) {
            // As above.
            let _ = list(meta, Typed(task), file);
        }
    }
    0
}

/// Passes the file on to the agent when it leads to the target.
#[inline(always)]
fn list(meta: *const Meta, task: Typed, file: Object) -> Option<()> {
    let mode: u32 = file.read(at!(file_mode))?;
    if mode & FMODE_PATH != 0 {
        return None;
    }
    let host = file.follow(at!(file_mapping))?.follow(at!(mapping_host))?;
    let sb = host.follow(at!(inode_sb))?;
    let (kind, bdev) = match sb.read::<u64>(at!(sb_magic))? {
        BDEVFS_MAGIC => {
            let bdev = host.0.wrapping_sub(at!(inode_from_bdev));
            (DEVICE, Object(bdev))
        }
        // The agent has the folders of the target open. Of any other folder
        // this makes no block device, and no sequence number that is the target's.
        SYSFS_MAGIC => {
            let kobject = host.follow(at!(inode_private))?.follow(at!(node_private))?;
            (FOLDER, Object(kobject.0.wrapping_sub(at!(bdev_kobject))))
        }
        _ => (FILE, sb.follow(at!(sb_bdev))?),
    };
    let disk = bdev.follow(at!(bdev_disk))?;
    if disk.read::<u64>(at!(disk_seq))? != *TARGET.get(0)? {
        return None;
    }
    let process = process_of(task)?;
    let held = Held {
        file: file.0 as u64,
        start_ns: process.start_ns,
        cgroup: process.cgroup,
        tgid: process.tgid,
        mode,
        kind,
        dev: bdev.read(at!(bdev_dev))?,
        openers: bdev.read(at!(bdev_openers))?,
        pad: 0,
        comm: process.leader.object().read(at!(task_comm))?,
    };
    // SAFETY: `meta` and its `seq` come from the kernel's context and are
    // valid for this call; `held` is initialised whole and has no padding.
    unsafe {
        bpf_seq_write(
            (*meta).seq,
            (&raw const held).cast::<c_void>(),
            size_of::<Held>() as u32,
        );
    }
    Some(())
}
