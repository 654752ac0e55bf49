//! What the gate programs and the agent share.
//!
//! The maps outlive the agent, pinned, and an agent of another version opens
//! them again: what is laid out here never changes. A new meaning gets a new map.

/// A disk whose gate is closed: the value of the map `GATES`. Its key is a
/// sequence number (`diskseq`), which the kernel gives only once.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// The volume's epoch that ended here.
    pub epoch: u64,
    /// When the gate was closed, CLOCK_BOOTTIME in ns.
    pub closed_ns: u64,
    /// The volume's id, filled up with zeroes.
    pub volume: [u8; 64],
}

/// A number by which a closed disk can be opened: the key of the map `NODES`,
/// whose value is the disk's sequence number.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Node {
    /// [`Node::BLOCK`] or [`Node::CHARACTER`].
    pub kind: u32,
    /// The device number as the kernel keeps it (`MKDEV`).
    pub dev: u32,
}

impl Node {
    /// A block device: the disk or a partition of it.
    pub const BLOCK: u32 = 0;
    /// A character device that passes commands through to the disk.
    pub const CHARACTER: u32 = 1;
}

/// Who may pass a closed gate: the key of the map `EXEMPT` is a process id,
/// the value when that process began. One entry is the child that shuts a file
/// system down.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exempt {
    /// In hundredths of a second since boot, as /proc/PID/stat tells it.
    pub began: u64,
}

/// `/proc`'s unit of a process's start, in ns (USER_HZ is 100 on every
/// architecture that drover runs on).
pub const TICK_NS: u64 = 10_000_000;

macro_rules! hooks {
    ($($(#[$doc:meta])* $hook:ident $name:literal,)*) => {
        /// Where a program sits: the name of the program, of its pinned link,
        /// and, of an LSM program, of the kernel's hook. As a number it is the
        /// index in the map `REFUSED`.
        #[repr(u32)]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Hook { $($(#[$doc])* $hook,)* }

        impl Hook {
            /// All of them, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$hook,)*];

            /// The name.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$hook => $name,)* }
            }
        }
    };
}

hooks! {
    /// Every bio, by a kprobe that overrides the return value.
    Bio "should_fail_bio",
    /// Opens by device number, the kernel's own for a mount too: the device
    /// program of the root cgroup.
    Opens "device_open",
    /// LSM: opens of files, folders and device nodes.
    FileOpen "file_open",
    /// LSM: reads, writes, splices, fallocate, clones, listing of folders.
    FilePermission "file_permission",
    /// LSM: ioctl.
    FileIoctl "file_ioctl",
    /// LSM: ioctl of a 32-bit process (a hook of its own since 6.8).
    FileIoctlCompat "file_ioctl_compat",
    /// LSM: new mappings.
    MmapFile "mmap_file",
    /// LSM: a mapping that is to become writable.
    FileMprotect "file_mprotect",
    /// LSM: ftruncate (a hook of its own since 6.2).
    FileTruncate "file_truncate",
    /// LSM: truncate, and ftruncate before 6.2.
    PathTruncate "path_truncate",
    /// LSM: a new file.
    InodeCreate "inode_create",
    /// LSM: a new name of a file.
    InodeLink "inode_link",
    /// LSM: a name that goes.
    InodeUnlink "inode_unlink",
    /// LSM: a new symbolic link.
    InodeSymlink "inode_symlink",
    /// LSM: a new folder.
    InodeMkdir "inode_mkdir",
    /// LSM: a folder that goes.
    InodeRmdir "inode_rmdir",
    /// LSM: a new device node, pipe or socket.
    InodeMknod "inode_mknod",
    /// LSM: a name that changes.
    InodeRename "inode_rename",
    /// LSM: owner, mode, times, size.
    InodeSetattr "inode_setattr",
    /// LSM: an extended attribute.
    InodeSetxattr "inode_setxattr",
    /// LSM: an extended attribute that goes.
    InodeRemovexattr "inode_removexattr",
    /// LSM: mounts, by either mount interface, of a super block that lives too.
    SbSetMntOpts "sb_set_mnt_opts",
    /// LSM: remounts.
    SbRemount "sb_remount",
    /// LSM: commands that an io_uring passes through.
    UringCmd "uring_cmd",
    /// No hook of its own: what the LSM programs refused of character devices
    /// that pass commands through (/dev/ng*, /dev/sg*, /dev/bsg/*).
    Passthrough "passthrough",
}

offsets! {
    /// Where the running kernel keeps what the gate programs read, in bytes
    /// from the beginning of each structure.
    Layout {
        /// `bio.bi_bdev`
        bio_bdev,
        /// `block_device.bd_disk`
        bdev_disk,
        /// `gendisk.diskseq`
        disk_seq,
        /// `file.f_inode`
        file_inode,
        /// `file.f_mapping`
        file_mapping,
        /// `address_space.host`
        mapping_host,
        /// `inode.i_mode`
        inode_mode,
        /// `inode.i_rdev`
        inode_rdev,
        /// `inode.i_sb`
        inode_sb,
        /// `bdev_inode.vfs_inode` less `bdev_inode.bdev`
        inode_from_bdev,
        /// `super_block.s_bdev`
        sb_bdev,
        /// `dentry.d_inode`
        dentry_inode,
        /// `path.dentry`
        path_dentry,
        /// `vm_area_struct.vm_file`
        vma_file,
        /// `io_uring_cmd.file`; 0 is its first member, and so it is where there is none.
        uring_file,
        /// Which parameter of `inode_setattr` is the dentry: 0, or 1 since the
        /// kernel passes the mount's id mapping before it.
        setattr_dentry,
        /// `task_struct.tgid`
        task_tgid,
        /// `task_struct.group_leader`
        task_leader,
        /// `task_struct.start_boottime`
        task_start,
    }
}
