//! Types that the eBPF programs and the agent share.
//!
//! All are `#[repr(C)]`, without padding that is not named, and valid for any
//! bit pattern, so each side may read the other's bytes as they are.
#![no_std]

/// Who did I/O on what: the key of [`IoCount`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct IoKey {
    /// The whole disk's sequence number.
    pub diskseq: u64,
    /// The cgroup's 64-bit id.
    pub cgroup: u64,
    /// When the process began, in ns since boot: process ids are used again.
    pub start_ns: u64,
    /// The process id (task group).
    pub tgid: u32,
    /// Always 0.
    pub pad: u32,
}

/// One place of an array of keys. What is counted for its key lies at the same
/// index of an array of counts, on each CPU.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Place<K> {
    /// Whose it is: [`FREE`], [`TAKING`], [`LEAVING`], or the [`Key::print`]
    /// of `key`.
    pub print: u64,
    /// The key, as long as a print is there.
    pub key: K,
}

/// Nobody's place, and its counts are 0. A program takes it.
pub const FREE: u64 = 0;
/// A program is about to write its key.
pub const TAKING: u64 = 1;
/// No program finds it any more, though one that has found it may still be
/// counting. The agent frees it.
pub const LEAVING: u64 = 2;

/// What is counted for.
pub trait Key: Copy + Eq {
    /// A number that few keys share, and that is none of [`FREE`], [`TAKING`] and
    /// [`LEAVING`]. It tells where the key's place is looked for, see [`place_of`].
    fn print(&self) -> u64;
}

/// Places that are looked at for one key, one after another. Where two of three
/// are taken, about one key in a million finds none in so many.
pub const PROBES: u32 = 32;

/// Where a key of this print is looked for: the first place for a `probe` of 0. Each
/// key goes on by steps of its own, so taken places do not gather; a step is odd,
/// and so comes by each of the `mask + 1` places, a power of two.
#[inline(always)]
pub fn place_of(print: u64, probe: u32, mask: u32) -> u32 {
    let step = (print >> 40) as u32 | 1;
    (print as u32).wrapping_add(probe.wrapping_mul(step)) & mask
}

impl Key for IoKey {
    #[inline(always)]
    fn print(&self) -> u64 {
        // Multiplied by odd numbers without a pattern (of the golden ratio, and of
        // splitmix64), so that each bit of the key has its say in the upper ones,
        // of which the uppermost become the lowest too.
        let (ratio, mix) = (0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9);
        let process = u64::from(self.tgid).wrapping_mul(mix) ^ self.start_ns;
        let mixed = (process ^ self.cgroup.rotate_left(20)).wrapping_mul(ratio);
        let mixed = (mixed ^ self.diskseq).wrapping_mul(mix);
        (mixed ^ (mixed >> 47)).max(LEAVING + 1)
    }
}

impl Key for LatencyKey {
    /// The kernel counts disks up, so those that are there at a time mostly have
    /// places of their own.
    #[inline(always)]
    fn print(&self) -> u64 {
        // No disk has the number 0.
        (self.diskseq << 2) | u64::from(self.direction)
    }
}

/// What one process did on one disk.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoCount {
    /// Reads submitted.
    pub reads: u64,
    /// Bytes of these.
    pub read_bytes: u64,
    /// Writes submitted (zone appends and write zeroes too).
    pub writes: u64,
    /// Bytes of these.
    pub written_bytes: u64,
    /// Flushes without data.
    pub flushes: u64,
    /// Discards and secure erases.
    pub discards: u64,
    /// When it last read, CLOCK_MONOTONIC in ns, at most a tick before; 0: never.
    pub last_read_ns: u64,
    /// When it last wrote or discarded, CLOCK_MONOTONIC in ns, at most a tick before; 0: never.
    pub last_write_ns: u64,
}

/// The key of [`Latency`].
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct LatencyKey {
    /// The sequence number of the disk whose queue the request was in.
    pub diskseq: u64,
    /// One of [`READ`], [`WRITE`], [`FLUSH`], [`DISCARD`].
    pub direction: u32,
    /// Always 0.
    pub pad: u32,
}

/// Direction of a read.
pub const READ: u32 = 0;
/// Direction of a write.
pub const WRITE: u32 = 1;
/// Direction of a flush.
pub const FLUSH: u32 = 2;
/// Direction of a discard.
pub const DISCARD: u32 = 3;

/// Buckets of a latency histogram: bucket n counts what took from 2^n to
/// 2^(n+1) ns; the last one counts all that took longer.
pub const BUCKETS: usize = 40;

/// How many histograms there is room for; a power of two.
pub const LATENCIES: u32 = 1024;

/// How long requests took: from their allocation to their completion, and
/// the part of it that the device had them.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// Requests by the logarithm of their duration.
    pub buckets: [u64; BUCKETS],
    /// The sum of all durations in ns.
    pub sum_ns: u64,
    /// Requests that ended and had no start time (the queue's iostats are off).
    pub untimed: u64,
    /// Requests that ended with an error; they are in the buckets too.
    pub errors: u64,
    /// Those that tell when the driver got them (the kernel notes it where the
    /// queue keeps statistics, as writeback throttling makes it), by the
    /// logarithm of their time from there.
    pub device_buckets: [u64; BUCKETS],
    /// The sum of these times in ns.
    pub device_sum_ns: u64,
    /// The sum of what these requests waited before that, in ns.
    pub queue_sum_ns: u64,
}

impl Latency {
    /// No request yet.
    pub const NONE: Self = Self {
        buckets: [0; BUCKETS],
        sum_ns: 0,
        untimed: 0,
        errors: 0,
        device_buckets: [0; BUCKETS],
        device_sum_ns: 0,
        queue_sum_ns: 0,
    };
}

/// Index in the map `LOST` of I/O that found no room among the counts.
pub const LOST_IO: u32 = 0;
/// Index in the map `LOST` of requests that found no room among the latencies.
pub const LOST_LATENCY: u32 = 1;

/// Events that were seen and could not be counted.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// How many.
    pub events: u64,
    /// When the last of them was, CLOCK_MONOTONIC in ns.
    pub last_ns: u64,
}

/// What a watched process sent over TCP.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes that TCP took from it.
    pub bytes: u64,
    /// When it last did, CLOCK_MONOTONIC in ns; 0: never.
    pub last_ns: u64,
}

/// A descriptor of the block device itself (or of a partition of it).
pub const DEVICE: u32 = 0;
/// A file of a file system that is mounted from it.
pub const FILE: u32 = 1;

/// The folder of a disk or partition in sysfs. Whoever opens one is told the
/// kernel's own count of who has the device open.
pub const FOLDER: u32 = 2;

/// One open file that a task holds, by descriptor or by mapping.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// The kernel's `struct file`: equal for descriptors that share one.
    pub file: u64,
    /// When the process began, in ns since boot.
    pub start_ns: u64,
    /// The cgroup's 64-bit id.
    pub cgroup: u64,
    /// The process id (task group).
    pub tgid: u32,
    /// `f_mode`.
    pub mode: u32,
    /// [`DEVICE`], [`FILE`] or [`FOLDER`].
    pub kind: u32,
    /// The block device's number as the kernel keeps it (`MKDEV`).
    pub dev: u32,
    /// `bd_openers` of that block device.
    pub openers: u32,
    /// Always 0.
    pub pad: u32,
    /// The command name.
    pub comm: [u8; 16],
}

/// `f_mode` bit: open for writing.
pub const FMODE_WRITE: u32 = 0x2;
/// `f_mode` bit: only a path, the file itself is not open.
pub const FMODE_PATH: u32 = 0x4000;

macro_rules! offsets {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $field:ident,)* }) => {
        $(#[$about])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct $name { $($(#[$doc])* pub $field: u32,)* }

        impl $name {
            /// What the object is compiled with, before the agent puts in its own.
            pub const UNKNOWN: Self = Self { $($field: 0,)* };

            /// The same as bytes.
            pub fn bytes(&self) -> impl Iterator<Item = u8> {
                [$(self.$field,)*].into_iter().flat_map(u32::to_ne_bytes)
            }
        }
    };
}
pub mod gate;

offsets! {
    /// Where the running kernel keeps what the programs read, in bytes
    /// from the beginning of each structure.
    Offsets {
        /// `bio.bi_bdev`
        bio_bdev,
        /// `bio.bi_opf`
        bio_opf,
        /// `bio.bi_iter.bi_size`
        bio_size,
        /// `bio.bi_blkg`; 0 where a bio does not tell a cgroup of the chosen hierarchy
        bio_group,
        /// `blkcg_gq.blkcg`
        group_blkcg,
        /// `blkcg.css.cgroup`
        blkcg_cgroup,
        /// `block_device.bd_disk`
        bdev_disk,
        /// `block_device.bd_openers`
        bdev_openers,
        /// `block_device.bd_dev`
        bdev_dev,
        /// `block_device.bd_device.kobj`
        bdev_kobject,
        /// `gendisk.diskseq`
        disk_seq,
        /// `request.q`
        rq_queue,
        /// `request.cmd_flags`
        rq_flags,
        /// `request.start_time_ns`
        rq_start,
        /// `request.io_start_time_ns`
        rq_io_start,
        /// `request.__data_len`
        rq_len,
        /// `request_queue.disk`
        queue_disk,
        /// `task_struct.flags`
        task_flags,
        /// `task_struct.tgid`
        task_tgid,
        /// `task_struct.group_leader`
        task_leader,
        /// `task_struct.start_boottime`
        task_start,
        /// `task_struct.comm`
        task_comm,
        /// `task_struct.cgroups`
        task_cgroups,
        /// `css_set.dfl_cgrp`, or the element of `css_set.subsys` for the chosen controller
        css_set_slot,
        /// 1 where `css_set_slot` holds a `cgroup_subsys_state`, 0 where it holds a `cgroup`
        through_subsys,
        /// `cgroup_subsys_state.cgroup`
        css_cgroup,
        /// `cgroup.kn`
        cgroup_node,
        /// `kernfs_node.id`
        node_id,
        /// `kernfs_node.priv`
        node_private,
        /// `file.f_mode`
        file_mode,
        /// `file.f_mapping`
        file_mapping,
        /// `address_space.host`
        mapping_host,
        /// `inode.i_sb`
        inode_sb,
        /// `inode.i_private`
        inode_private,
        /// `super_block.s_magic`
        sb_magic,
        /// `super_block.s_bdev`
        sb_bdev,
        /// `bdev_inode.vfs_inode` less `bdev_inode.bdev`
        inode_from_bdev,
        /// `sock.sk_protocol`
        sock_protocol,
        /// `vm_area_struct.vm_file`
        vma_file,
    }
}
