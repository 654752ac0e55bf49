//! Where the running kernel keeps what the gate programs read.

use drover_ebpf::gate::Layout;

use crate::evidence::btf::{BtfError, Types};

/// Looks up every offset the programs need.
pub fn find(types: &Types<'_>) -> Result<Layout, BtfError> {
    let at = |structure, member| types.offset(structure, member);
    // security/security.c: (dentry, attributes), and since 6.9 the mount's id
    // mapping before them. Where the kernel has no BPF LSM it matters not.
    let setattr = types.parameters("bpf_lsm_inode_setattr").unwrap_or(2);
    Ok(Layout {
        bio_bdev: at("bio", "bi_bdev")?,
        bdev_disk: at("block_device", "bd_disk")?,
        disk_seq: at("gendisk", "diskseq")?,
        file_inode: at("file", "f_inode")?,
        file_mapping: at("file", "f_mapping")?,
        mapping_host: at("address_space", "host")?,
        inode_mode: at("inode", "i_mode")?,
        inode_rdev: at("inode", "i_rdev")?,
        inode_sb: at("inode", "i_sb")?,
        inode_from_bdev: at("bdev_inode", "vfs_inode")? - at("bdev_inode", "bdev")?,
        sb_bdev: at("super_block", "s_bdev")?,
        dentry_inode: at("dentry", "d_inode")?,
        path_dentry: at("path", "dentry")?,
        vma_file: at("vm_area_struct", "vm_file")?,
        // Where there is no io_uring there is no such hook either.
        uring_file: at("io_uring_cmd", "file").unwrap_or(0),
        setattr_dentry: u32::from(setattr > 2),
        task_tgid: at("task_struct", "tgid")?,
        task_leader: at("task_struct", "group_leader")?,
        task_start: at("task_struct", "start_boottime")?,
    })
}
