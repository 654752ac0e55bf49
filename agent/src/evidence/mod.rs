//! Who can do and does I/O on a disk, as the kernel sees it, and what that means.
pub mod btf;
pub mod cgroups;
pub mod loader;
pub mod mounts;
mod offsets;

use std::path::PathBuf;

/// Why there is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// A file of the kernel's could not be read.
    #[error("read {}: {error}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The kernel's types are not what drover knows.
    #[error(transparent)]
    Btf(#[from] btf::BtfError),
    /// The eBPF object could not be loaded.
    #[error("load the eBPF programs: {0}")]
    Load(String),
    /// A map could not be read or changed.
    #[error("eBPF map {map}: {why}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        why: String,
    },
    /// A list of open files could not be had.
    #[error("eBPF iterator {program}: {why}")]
    Iterate {
        /// Which.
        program: &'static str,
        /// Why.
        why: String,
    },
}

#[cfg(test)]
mod smoke {
    #[test]
    fn smoke_loads() {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let h = super::cgroups::Hierarchy::choose(&text, Default::default());
        let k = super::loader::Kernel::load(&h, 8192).unwrap();
        for p in k.programs() {
            println!("{p:?}");
        }
        println!("{:?}", k.counts().unwrap().len());
        let _d = std::fs::File::open("/sys/block/loop0").unwrap();
        println!(
            "{:?}",
            k.held(
                crate::ids::Diskseq(
                    std::fs::read_to_string("/sys/block/loop0/diskseq")
                        .unwrap()
                        .trim()
                        .parse()
                        .unwrap()
                ),
                super::loader::DESCRIPTORS
            )
            .unwrap()
        );
        println!(
            "{:?}",
            k.held(crate::ids::Diskseq(1), super::loader::MAPPINGS)
                .unwrap()
                .len()
        );
        println!("{:?}", k.losses());
        assert!(k.programs().iter().all(|p| p.failure.is_none()));
    }
}
