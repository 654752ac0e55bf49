//! Which figures there are: a load, the side of drover's that takes it, and
//! whom it is compared with.

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// drover's iSCSI target.
    DroverIscsi,
    /// drover's NVMe/TCP target.
    DroverNvme,
    /// tgt, Longhorn's frontend.
    Tgt,
    /// A file over plain sockets: the machine's limit.
    Limit,
    /// An iSCSI target that does nothing: the client's limit.
    NullIscsi,
    /// An NVMe/TCP target that does nothing: the client's limit.
    NullNvme,
}

impl Side {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::DroverIscsi | Self::DroverNvme => "drover",
            Self::Tgt => "tgt",
            Self::Limit => "limit",
            Self::NullIscsi | Self::NullNvme => "null target",
        }
    }
}

/// What the backing file is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Medium {
    /// Memory: the frontend alone is seen.
    Memory,
    /// A disk: what is left of the difference behind one.
    Disk,
}

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Commands a second.
    Iops,
    /// 2^20 bytes a second.
    MibPerSecond,
}

impl Unit {
    /// As reports write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::MibPerSecond => "MiB/s",
        }
    }
}

/// A load, as `load run` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// read, write or mixed.
    pub mix: &'static str,
    /// Bytes of a command.
    pub size: u32,
    /// Commands in flight on each connection.
    pub depth: u16,
    /// Sessions; of NVMe/TCP, I/O queues.
    pub sessions: u16,
}

/// One load on several sides in turn.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// What the file is on.
    pub medium: Medium,
    /// The load.
    pub load: Load,
    /// What is counted.
    pub unit: Unit,
    /// drover's side.
    pub drover: Side,
    /// Whom it is compared with, and the figure's name.
    pub peers: &'static [(Side, &'static str)],
}

const fn load(mix: &'static str, size: u32, depth: u16, sessions: u16) -> Load {
    Load {
        mix,
        size,
        depth,
        sessions,
    }
}

const KIB: u32 = 1024;

const fn iscsi(load: Load, unit: Unit, peers: &'static [(Side, &'static str)]) -> Row {
    Row {
        medium: Medium::Memory,
        load,
        unit,
        drover: Side::DroverIscsi,
        peers,
    }
}

const fn nvme(load: Load, unit: Unit, peers: &'static [(Side, &'static str)]) -> Row {
    Row {
        medium: Medium::Memory,
        load,
        unit,
        drover: Side::DroverNvme,
        peers,
    }
}

const fn on_disk(row: Row) -> Row {
    Row {
        medium: Medium::Disk,
        ..row
    }
}

use Side::{Limit, NullIscsi, NullNvme, Tgt};
use Unit::{Iops, MibPerSecond};

/// All rows that this machine's kernel can show, in order.
pub const ROWS: &[Row] = &[
    iscsi(
        load("read", 4 * KIB, 32, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_read"),
            (Limit, "iscsi_4k_qd32_read_vs_limit"),
            (NullIscsi, "iscsi_4k_qd32_read_vs_null"),
        ],
    ),
    iscsi(
        load("write", 4 * KIB, 32, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_write"),
            (Limit, "iscsi_4k_qd32_write_vs_limit"),
            (NullIscsi, "iscsi_4k_qd32_write_vs_null"),
        ],
    ),
    iscsi(
        load("read", 4 * KIB, 1, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd1_read"),
            (Limit, "iscsi_4k_qd1_read_vs_limit"),
            (NullIscsi, "iscsi_4k_qd1_read_vs_null"),
        ],
    ),
    iscsi(
        load("read", 128 * KIB, 32, 1),
        MibPerSecond,
        &[
            (Tgt, "iscsi_128k_qd32_read"),
            (Limit, "iscsi_128k_qd32_vs_limit"),
            (NullIscsi, "iscsi_128k_qd32_read_vs_null"),
        ],
    ),
    iscsi(
        load("write", 128 * KIB, 32, 1),
        MibPerSecond,
        &[
            (Tgt, "iscsi_128k_qd32_write"),
            (Limit, "iscsi_128k_qd32_write_vs_limit"),
            (NullIscsi, "iscsi_128k_qd32_write_vs_null"),
        ],
    ),
    iscsi(
        load("mixed", 4 * KIB, 32, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_mixed"),
            (NullIscsi, "iscsi_4k_qd32_mixed_vs_null"),
        ],
    ),
    iscsi(
        load("read", 4 * KIB, 128, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd128_read"),
            (NullIscsi, "iscsi_4k_qd128_read_vs_null"),
        ],
    ),
    iscsi(
        load("mixed", 64 * KIB, 8, 1),
        MibPerSecond,
        &[
            (Tgt, "iscsi_64k_qd8_mixed"),
            (NullIscsi, "iscsi_64k_qd8_mixed_vs_null"),
        ],
    ),
    iscsi(
        load("read", 1024 * KIB, 8, 1),
        MibPerSecond,
        &[
            (Tgt, "iscsi_1m_qd8_read"),
            (NullIscsi, "iscsi_1m_qd8_read_vs_null"),
        ],
    ),
    iscsi(
        load("read", 4 * KIB, 32, 8),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_read_8_sessions"),
            (NullIscsi, "iscsi_4k_qd32_read_8_sessions_vs_null"),
        ],
    ),
    nvme(
        load("read", 4 * KIB, 1, 1),
        Iops,
        &[
            (Limit, "nvme_4k_qd1_read_vs_limit"),
            (NullNvme, "nvme_4k_qd1_read_vs_null"),
        ],
    ),
    nvme(
        load("read", 4 * KIB, 32, 1),
        Iops,
        &[
            (Limit, "nvme_4k_qd32_read_vs_limit"),
            (NullNvme, "nvme_4k_qd32_read_vs_null"),
        ],
    ),
    nvme(
        load("write", 4 * KIB, 32, 1),
        Iops,
        &[
            (Limit, "nvme_4k_qd32_write_vs_limit"),
            (NullNvme, "nvme_4k_qd32_write_vs_null"),
        ],
    ),
    nvme(
        load("read", 128 * KIB, 32, 1),
        MibPerSecond,
        &[
            (Limit, "nvme_128k_qd32_vs_limit"),
            (NullNvme, "nvme_128k_qd32_read_vs_null"),
        ],
    ),
    nvme(
        load("write", 128 * KIB, 32, 1),
        MibPerSecond,
        &[
            (Limit, "nvme_128k_qd32_write_vs_limit"),
            (NullNvme, "nvme_128k_qd32_write_vs_null"),
        ],
    ),
    nvme(
        load("read", 4 * KIB, 32, 8),
        Iops,
        &[
            (Limit, "nvme_4k_qd32_read_8_queues_vs_limit"),
            (NullNvme, "nvme_4k_qd32_read_8_queues_vs_null"),
        ],
    ),
    on_disk(iscsi(
        load("read", 4 * KIB, 32, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_read_disk"),
            (Limit, "iscsi_4k_qd32_read_vs_limit_disk"),
        ],
    )),
    on_disk(iscsi(
        load("write", 4 * KIB, 32, 1),
        Iops,
        &[
            (Tgt, "iscsi_4k_qd32_write_disk"),
            (Limit, "iscsi_4k_qd32_write_vs_limit_disk"),
        ],
    )),
    on_disk(iscsi(
        load("read", 4 * KIB, 1, 1),
        Iops,
        &[(Tgt, "iscsi_4k_qd1_read_disk")],
    )),
    on_disk(iscsi(
        load("read", 128 * KIB, 32, 1),
        MibPerSecond,
        &[
            (Tgt, "iscsi_128k_qd32_read_disk"),
            (Limit, "iscsi_128k_qd32_vs_limit_disk"),
        ],
    )),
    on_disk(nvme(
        load("read", 128 * KIB, 32, 1),
        MibPerSecond,
        &[(Limit, "nvme_128k_qd32_vs_limit_disk")],
    )),
];

/// Every mix, size and depth, by one session and by eight: iSCSI beside tgt, and
/// NVMe/TCP beside the limit, on a file in memory.
pub fn sweep() -> Vec<Row> {
    let mut rows = Vec::new();
    for mix in ["read", "write", "mixed"] {
        for size in [4, 64, 128, 1024] {
            for depth in [1, 8, 32, 128] {
                for sessions in [1, 8] {
                    let load = load(mix, size * KIB, depth, sessions);
                    rows.push(iscsi(load, unit(size), named("iscsi", load, Tgt)));
                    rows.push(nvme(load, unit(size), named("nvme", load, Limit)));
                }
            }
        }
    }
    rows
}

/// What is counted for commands of so many KiB.
const fn unit(kib: u32) -> Unit {
    if kib > 4 { MibPerSecond } else { Iops }
}

/// A cell's only peer. There are as many names as cells, and each is made once.
fn named(wire: &str, load: Load, peer: Side) -> &'static [(Side, &'static str)] {
    let Load {
        mix,
        size,
        depth,
        sessions,
    } = load;
    let size = match size / KIB {
        1024 => "1m".to_owned(),
        kib => format!("{kib}k"),
    };
    let name = format!("sweep_{wire}_{size}_qd{depth}_{mix}_{sessions}");
    vec![(peer, &*name.leak())].leak()
}

/// The figure of memory: what each session beyond the first adds to what a
/// target has resident.
pub const MEMORY: &str = "rss_per_session_kib";

/// Figures of a VM, with their depths; the peer is nvmet.
pub const IN_VM: &[(&str, u16)] = &[("nvme_4k_qd1_read", 1), ("nvme_4k_qd32_read", 32)];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_sweep_has_each_cell_once() {
        let names: BTreeSet<&str> = sweep().iter().map(|row| row.peers[0].1).collect();
        assert_eq!(names.len(), 2 * 3 * 4 * 4 * 2);
        assert!(names.contains("sweep_iscsi_1m_qd128_mixed_8"));
        assert!(names.contains("sweep_nvme_4k_qd1_read_1"));
    }

    #[test]
    fn no_two_figures_share_a_name_and_a_disks_are_marked() {
        let mut seen: BTreeSet<&str> = IN_VM.iter().map(|(name, _)| *name).collect();
        seen.insert(MEMORY);
        for row in ROWS {
            for (_, name) in row.peers {
                assert!(seen.insert(name), "{name}");
                assert_eq!(
                    name.ends_with("_disk"),
                    row.medium == Medium::Disk,
                    "{name}"
                );
            }
        }
    }
}
