//! The table of verdicts, with real processes: those of its cells that
//! [`super::root_loop_tests`] lacks. Needs what that one needs.

use super::loader::MAPPINGS;
use super::root_loop_tests::bench::{self, Bench, LoopDisk};
use super::*;
use crate::attach::ports::Verdict;

/// A mapping of a file on drover's own mount whose descriptor is closed: without
/// that program nothing tells of it.
#[test]
fn without_mappings_no_verdict_is_had() {
    let _turn = Bench::new();
    let disk = LoopDisk::new(16);
    let config = EvidenceConfig::default();
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let hierarchy = Hierarchy::choose(&text, config.cgroups);
    let mut kernel = Kernel::load(&hierarchy, config.processes).unwrap();
    kernel.refuse(MAPPINGS);
    let evidence = Evidence::new(config, hierarchy, Ok(kernel), Box::new(monotonic));
    let judged = bench::wait_for(evidence.judge(&disk.disk, &[]));
    assert_eq!(judged.verdict, Verdict::Unknown);
    let why = "iter task_vma does not run on this kernel";
    assert!(judged.reason.contains(why), "{}", judged.reason);
    assert_eq!(evidence.describe().blind, Some(judged.reason));
}
