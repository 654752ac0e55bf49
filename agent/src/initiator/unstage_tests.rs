//! Every cell of the table.

use super::*;
use crate::attach::ports::Holder;

const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn every_cell_of_the_table() {
    use Verdict::{BackupRunning, BackupStale, Live, Quiet, Unknown};
    let claims = [
        Claim::Free,
        Claim::Mounted,
        Claim::ReadOnly,
        Claim::Held("mkfs".to_owned()),
    ];
    for verdict in [Quiet, BackupRunning, BackupStale, Live, Unknown] {
        for claim in &claims {
            let gone = match (verdict, claim) {
                (Quiet, Claim::Free) => Some(Ending::Disconnect),
                (BackupRunning | BackupStale, Claim::Free | Claim::ReadOnly) => {
                    Some(Ending::CutReaders)
                }
                _ => None,
            };
            let cell = |standing: &Standing, waited| decide(verdict, claim, standing, waited);
            let current = Standing::Current(DEADLINE);
            let early = Duration::from_secs(20);
            let left = Ending::Refuse(Duration::from_secs(100));
            let at = (verdict, claim.clone());
            assert_eq!(cell(&current, early), gone.unwrap_or(left), "{at:?}");
            let late = gone.unwrap_or(Ending::CutHolders);
            assert_eq!(cell(&current, DEADLINE), late, "{at:?}");
            assert_eq!(cell(&current, DEADLINE * 2), late, "{at:?}");
            assert_eq!(cell(&Standing::Ended, Duration::ZERO), late, "{at:?}");
        }
    }
}

#[test]
fn a_refusal_names_process_cgroup_and_last_write() {
    let judgement = Judgement {
        verdict: Verdict::Live,
        reason: "a descriptor is open for writing".to_owned(),
        holders: vec![Holder {
            pid: 4711,
            name: "postgres".to_owned(),
            cgroup: "/kubepods/pod1".to_owned(),
            pod: None,
            writable: true,
            registered: false,
            last_read_ms: None,
            last_write_ms: Some(120),
            read_bytes: 0,
            written_bytes: 4096,
        }],
    };
    let text = who(&judgement, &Claim::Free);
    for part in [
        "postgres (pid 4711)",
        "/kubepods/pod1",
        "last write 120 ms ago",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let many = Judgement {
        holders: vec![judgement.holders[0].clone(); 9],
        ..judgement
    };
    assert!(who(&many, &Claim::Mounted).contains("4 more"));
}
