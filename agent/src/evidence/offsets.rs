//! Where the running kernel keeps what the programs read.

use drover_ebpf::Offsets;

use super::btf::{BtfError, Types};
use super::cgroups::{Hierarchy, Kind};

/// Looks up every offset the programs need, for the hierarchy whose ids they shall tell.
pub fn find(types: &Types<'_>, hierarchy: &Hierarchy) -> Result<Offsets, BtfError> {
    let at = |structure, member| types.offset(structure, member);
    let (css_set_slot, through_subsys) = match &hierarchy.kind {
        Kind::V1 { controller } => {
            let index = types.enumerator(&format!("{}_cgrp_id", subsystem(controller)))?;
            (at("css_set", "subsys")? + 8 * index, 1)
        }
        Kind::V2 | Kind::Unmounted => (at("css_set", "dfl_cgrp")?, 0),
    };
    // Not in kernels without CONFIG_BLK_CGROUP.
    let group = at("bio", "bi_blkg").ok().filter(|_| hierarchy.charges_io());
    let (bio_group, group_blkcg, blkcg_cgroup) = match group {
        Some(group) => (group, at("blkcg_gq", "blkcg")?, at("blkcg", "css.cgroup")?),
        None => (0, 0, 0),
    };
    Ok(Offsets {
        bio_group,
        group_blkcg,
        blkcg_cgroup,
        bio_bdev: at("bio", "bi_bdev")?,
        bio_opf: at("bio", "bi_opf")?,
        bio_size: at("bio", "bi_iter.bi_size")?,
        bdev_disk: at("block_device", "bd_disk")?,
        bdev_openers: at("block_device", "bd_openers")?,
        bdev_dev: at("block_device", "bd_dev")?,
        bdev_kobject: at("block_device", "bd_device.kobj")?,
        disk_seq: at("gendisk", "diskseq")?,
        rq_queue: at("request", "q")?,
        rq_flags: at("request", "cmd_flags")?,
        rq_start: at("request", "start_time_ns")?,
        rq_io_start: at("request", "io_start_time_ns")?,
        rq_len: at("request", "__data_len")?,
        queue_disk: at("request_queue", "disk")?,
        task_flags: at("task_struct", "flags")?,
        task_tgid: at("task_struct", "tgid")?,
        task_leader: at("task_struct", "group_leader")?,
        task_start: at("task_struct", "start_boottime")?,
        task_comm: at("task_struct", "comm")?,
        task_cgroups: at("task_struct", "cgroups")?,
        css_set_slot,
        through_subsys,
        css_cgroup: at("cgroup_subsys_state", "cgroup")?,
        cgroup_node: at("cgroup", "kn")?,
        node_id: at("kernfs_node", "id")?,
        file_mode: at("file", "f_mode")?,
        file_mapping: at("file", "f_mapping")?,
        mapping_host: at("address_space", "host")?,
        inode_private: at("inode", "i_private")?,
        node_private: at("kernfs_node", "priv")?,
        inode_sb: at("inode", "i_sb")?,
        sb_magic: at("super_block", "s_magic")?,
        sb_bdev: at("super_block", "s_bdev")?,
        inode_from_bdev: at("bdev_inode", "vfs_inode")? - at("bdev_inode", "bdev")?,
        sock_protocol: at("sock", "sk_protocol")?,
        vma_file: at("vm_area_struct", "vm_file")?,
    })
}

/// The kernel's own name of a controller (include/linux/cgroup_subsys.h).
fn subsystem(controller: &str) -> &str {
    match controller {
        "blkio" => "io",
        other => other,
    }
}
