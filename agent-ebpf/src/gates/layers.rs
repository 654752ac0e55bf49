//! The programs, layer by layer.

use aya_ebpf::helpers::generated::bpf_override_return;
use aya_ebpf::macros::{cgroup_device, kprobe, lsm};
use aya_ebpf::programs::{DeviceContext, LsmContext, ProbeContext};
use drover_ebpf::gate::{Hook, Node};

use crate::disk::{
    at, of_bdev, of_command, of_dentry, of_file, of_inode, of_mapping, of_number, of_opening,
    of_path, of_super_block,
};
use crate::object::Object;
use crate::shut::{armed, count, is_closed, refuses};

/// -EIO: what a reader and a writer are told.
const EIO: i32 = -5;

/// Called for each bio before it is remapped to the whole disk, and once more
/// by NVMe multipath for the path. Fails it where the kernel lets a program say
/// what a function returns (CONFIG_BPF_KPROBE_OVERRIDE).
#[kprobe]
fn should_fail_bio(ctx: ProbeContext) -> u32 {
    if armed() && is_of_closed(&ctx) == Some(true) {
        count(Hook::Bio);
        // SAFETY: the registers are the context's own.
        unsafe { bpf_override_return(ctx.regs, EIO as i64 as u64) };
    }
    0
}

#[inline(always)]
fn is_of_closed(ctx: &ProbeContext) -> Option<bool> {
    let bio: *const u8 = ctx.arg(0)?;
    let bdev = Object(bio).follow(at!(bio_bdev))?;
    Some(is_closed(of_bdev(bdev)?))
}

/// `bpf_cgroup_dev_ctx.access_type`: the kind of device below, the access above.
const BPF_DEVCG_DEV_BLOCK: u32 = 1;
const BPF_DEVCG_DEV_CHAR: u32 = 2;
const BPF_DEVCG_ACC_READ: u32 = 2;
const BPF_DEVCG_ACC_WRITE: u32 = 4;

/// Called when a device is opened by its number, also by the kernel itself for
/// a mount or device mapper. 1 lets it be opened, 0 is EPERM.
#[cgroup_device]
fn device_open(ctx: DeviceContext) -> i32 {
    if !armed() {
        return 1;
    }
    // SAFETY: the kernel passes a context of this type.
    let (kind, major, minor) = unsafe {
        (
            (*ctx.device).access_type,
            (*ctx.device).major,
            (*ctx.device).minor,
        )
    };
    if kind >> 16 & (BPF_DEVCG_ACC_READ | BPF_DEVCG_ACC_WRITE) == 0 {
        return 1;
    }
    let kind = match kind & 0xffff {
        BPF_DEVCG_DEV_BLOCK => Node::BLOCK,
        BPF_DEVCG_DEV_CHAR => Node::CHARACTER,
        _ => return 1,
    };
    let dev = major << 20 | minor;
    if refuses(Hook::Opens, of_number(Node { kind, dev })) {
        0
    } else {
        1
    }
}

/// A parameter of a hook that is a pointer.
#[inline(always)]
fn pointer(ctx: &LsmContext, index: usize) -> Option<Object> {
    let to: *const u8 = ctx.arg(index);
    if to.is_null() { None } else { Some(Object(to)) }
}

macro_rules! guards {
    ($($program:ident $hook:ident $index:literal $disk_of:ident;)*) => {$(
        #[lsm]
        fn $program(ctx: LsmContext) -> i32 {
            if !armed() {
                return 0;
            }
            let target = match pointer(&ctx, $index) {
                Some(object) => $disk_of(object),
                None => None,
            };
            if refuses(Hook::$hook, target) { EIO } else { 0 }
        }
    )*};
}

// The parameter by which each hook tells the disk, and what it is.
guards! {
    file_open FileOpen 0 of_opening;
    file_permission FilePermission 0 of_file;
    file_ioctl FileIoctl 0 of_file;
    file_ioctl_compat FileIoctlCompat 0 of_file;
    mmap_file MmapFile 0 of_file;
    file_mprotect FileMprotect 0 of_mapping;
    file_truncate FileTruncate 0 of_file;
    path_truncate PathTruncate 0 of_path;
    inode_create InodeCreate 0 of_inode;
    inode_link InodeLink 1 of_inode;
    inode_unlink InodeUnlink 0 of_inode;
    inode_symlink InodeSymlink 0 of_inode;
    inode_mkdir InodeMkdir 0 of_inode;
    inode_rmdir InodeRmdir 0 of_inode;
    inode_mknod InodeMknod 0 of_inode;
    inode_rename InodeRename 0 of_inode;
    inode_setxattr InodeSetxattr 1 of_dentry;
    inode_removexattr InodeRemovexattr 1 of_dentry;
    sb_set_mnt_opts SbSetMntOpts 0 of_super_block;
    sb_remount SbRemount 0 of_super_block;
    uring_cmd UringCmd 0 of_command;
}

/// Its dentry is at one place or another, by the kernel.
#[lsm]
fn inode_setattr(ctx: LsmContext) -> i32 {
    if !armed() {
        return 0;
    }
    let (first, second) = (pointer(&ctx, 0), pointer(&ctx, 1));
    let dentry = if at!(setattr_dentry) == 0 {
        first
    } else {
        second
    };
    let target = match dentry {
        Some(dentry) => of_dentry(dentry),
        None => None,
    };
    if refuses(Hook::InodeSetattr, target) {
        EIO
    } else {
        0
    }
}
