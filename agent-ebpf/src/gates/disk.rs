//! From what a hook is given to the disk below it.
//!
//! No function is handed to another here, as `map` and `and_then` would have
//! it: the compiler makes a function of its own of such a value, whose types
//! the kernel refuses to read (BTF knows no Rust enum).

use drover_ebpf::gate::{Layout, Node};

use crate::object::Object;
use crate::shut::NODES;

/// Filled in by the agent before the programs are loaded.
#[unsafe(no_mangle)]
static LAYOUT: Layout = Layout::UNKNOWN;

/// The offset of one field, as the agent found it.
macro_rules! at {
    ($field:ident) => {
        $crate::disk::entry(core::mem::offset_of!(drover_ebpf::gate::Layout, $field))
    };
}
pub(crate) use at;

/// Reads the entry of LAYOUT that begins at byte `entry`; volatile, since the
/// compiler believes that all are 0.
#[inline(always)]
pub fn entry(entry: usize) -> usize {
    let table = (&raw const LAYOUT).cast::<u8>();
    // SAFETY: `at!` names a field of LAYOUT, all of which are aligned u32.
    (unsafe { table.add(entry).cast::<u32>().read_volatile() }) as usize
}

/// What a file leads to.
#[derive(Clone, Copy)]
pub struct Target {
    /// The disk's sequence number.
    pub disk: u64,
    /// Whether commands pass through here unseen by the block layer.
    pub passthrough: bool,
}

impl Target {
    #[inline(always)]
    fn plain(disk: u64) -> Self {
        Self {
            disk,
            passthrough: false,
        }
    }
}

/// include/uapi/linux/stat.h
const S_IFMT: u16 = 0o170_000;
const S_IFCHR: u16 = 0o020_000;
const S_IFBLK: u16 = 0o060_000;

/// The disk that a `struct block_device` is of or on.
#[inline(always)]
pub fn of_bdev(bdev: Object) -> Option<u64> {
    bdev.follow(at!(bdev_disk))?.read(at!(disk_seq))
}

/// The disk that a file system is on; none where it is on none, as proc is.
#[inline(always)]
pub fn of_super_block(sb: Object) -> Option<Target> {
    Some(Target::plain(of_bdev(sb.follow(at!(sb_bdev))?)?))
}

/// The disk that the inode's file system is on.
#[inline(always)]
pub fn of_inode(inode: Object) -> Option<Target> {
    of_super_block(inode.follow(at!(inode_sb))?)
}

/// The same of a dentry that has an inode.
#[inline(always)]
pub fn of_dentry(dentry: Object) -> Option<Target> {
    of_inode(dentry.follow(at!(dentry_inode))?)
}

/// The same of a path.
#[inline(always)]
pub fn of_path(path: Object) -> Option<Target> {
    of_dentry(path.follow(at!(path_dentry))?)
}

/// The disk that a mapping's file leads to.
#[inline(always)]
pub fn of_mapping(vma: Object) -> Option<Target> {
    of_file(vma.follow(at!(vma_file))?)
}

/// The disk that a command of an io_uring goes to.
#[inline(always)]
pub fn of_command(command: Object) -> Option<Target> {
    of_file(command.follow(at!(uring_file))?)
}

/// The disk that an open file leads to: the one below its file system, or the
/// one that it is itself.
#[inline(always)]
pub fn of_file(file: Object) -> Option<Target> {
    let inode = file.follow(at!(file_inode))?;
    match inode.read::<u16>(at!(inode_mode))? & S_IFMT {
        S_IFCHR => of_node(inode, Node::CHARACTER),
        // The file's own inode is of the node in /dev; its mapping is the disk's.
        S_IFBLK => {
            let host = file.follow(at!(file_mapping))?.follow(at!(mapping_host))?;
            let bdev = Object(host.0.wrapping_sub(at!(inode_from_bdev)));
            Some(Target::plain(of_bdev(bdev)?))
        }
        _ => of_inode(inode),
    }
}

/// The same of a file that is only being opened: its device's number is all
/// that is known of it.
#[inline(always)]
pub fn of_opening(file: Object) -> Option<Target> {
    let inode = file.follow(at!(file_inode))?;
    match inode.read::<u16>(at!(inode_mode))? & S_IFMT {
        S_IFCHR => of_node(inode, Node::CHARACTER),
        S_IFBLK => of_node(inode, Node::BLOCK),
        _ => of_inode(inode),
    }
}

#[inline(always)]
fn of_node(inode: Object, kind: u32) -> Option<Target> {
    of_number(Node {
        kind,
        dev: inode.read(at!(inode_rdev))?,
    })
}

/// The closed disk that a device number leads to.
#[inline(always)]
pub fn of_number(node: Node) -> Option<Target> {
    // SAFETY: the value is copied at once; at worst it is of an entry that is
    // being replaced, and then names no closed disk.
    let disk = unsafe { NODES.get(&node) }.copied()?;
    Some(Target {
        disk,
        passthrough: node.kind == Node::CHARACTER,
    })
}
