//! What the facts about a disk's holders mean. Pure: facts in, judgement out.
//!
//! The first row that applies decides:
//!
//! | What is known of the disk                                   | Verdict         |
//! |-------------------------------------------------------------|-----------------|
//! | the facts could not be had                                  | `Unknown`       |
//! | the disk has gone: nothing reaches it any more              | `Quiet`         |
//! | a holder could write, registered or not, whatever it did    | `Live`          |
//! | I/O went uncounted within the progress window               | `Unknown`       |
//! | the kernel counts other openers than were found             | `Unknown`       |
//! | a holder that only reads is not registered                  | `Unknown`       |
//! | a registered reader read within the progress window         | `BackupRunning` |
//! | there are registered readers, and none of them did          | `BackupStale`   |
//! | nobody holds it                                             | `Quiet`         |
//!
//! A mount of drover's own explains its opener and is no holder: it is left out
//! before the facts come here. The processes that have files open on it are
//! holders. The kernel's count is of the device's openers: of files on that mount
//! there is none, so "nobody" and "only registered readers" hold for what
//! descriptors and mappings of processes show (the limits in [`super`]).

use std::time::Duration;

use crate::attach::ports::{Holder, Judgement, Verdict};

/// What was seen of a disk.
#[derive(Debug, Clone)]
pub enum Sight {
    /// Nothing, and why.
    Blind(String),
    /// The disk has gone.
    Gone,
    /// Its holders.
    Seen(Facts),
}

/// Who holds a disk.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Everybody but drover's own mounts.
    pub holders: Vec<Holder>,
    /// Openers by the kernel's count less those that were found. Below 0: a
    /// count changed meanwhile.
    pub unexplained: i64,
    /// What I/O went uncounted within the progress window, if any.
    pub lost: Option<String>,
}

/// Judges.
pub fn judge(sight: Sight, window: Duration) -> Judgement {
    let facts = match sight {
        Sight::Blind(why) => return judgement(Verdict::Unknown, why, Vec::new()),
        Sight::Gone => {
            let why = "the disk has gone: nothing reaches it any more".to_owned();
            return judgement(Verdict::Quiet, why, Vec::new());
        }
        Sight::Seen(facts) => facts,
    };
    let (verdict, reason) = decide(&facts, window);
    judgement(verdict, reason, facts.holders)
}

fn judgement(verdict: Verdict, reason: String, holders: Vec<Holder>) -> Judgement {
    Judgement {
        verdict,
        reason,
        holders,
    }
}

fn decide(facts: &Facts, window: Duration) -> (Verdict, String) {
    let all = &facts.holders;
    let window_ms = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
    // Of several writers, the one that wrote last tells the most.
    let writer = all
        .iter()
        .filter(|h| h.writable)
        .min_by_key(|h| h.last_write_ms.unwrap_or(u64::MAX));
    if let Some(writer) = writer {
        let when = match writer.last_write_ms {
            Some(ms) => format!("it last wrote {ms} ms ago"),
            None => "it was not seen to write".to_owned(),
        };
        return (Verdict::Live, format!("{} can write; {when}", who(writer)));
    }
    if let Some(lost) = &facts.lost {
        return (Verdict::Unknown, format!("evidence was lost: {lost}"));
    }
    if facts.unexplained != 0 {
        let n = facts.unexplained;
        let why = if n > 0 {
            format!(
                "the kernel counts {n} more openers than could be found (a file registered with an io_uring, a descriptor on its way over a socket, a mount in a namespace without processes, or a user inside the kernel)"
            )
        } else {
            "openers came and went while they were counted".to_owned()
        };
        return (Verdict::Unknown, why);
    }
    if let Some(stranger) = all.iter().find(|h| !h.registered) {
        let hint = match stranger.pid {
            0 => "unmount or detach it".to_owned(),
            pid => format!("if it is a backup, register it (drover backup register, pid {pid})"),
        };
        return (
            Verdict::Unknown,
            format!("{} reads and is not registered; {hint}", who(stranger)),
        );
    }
    let last = all
        .iter()
        .filter_map(|h| h.last_read_ms.map(|ms| (ms, h)))
        .min_by_key(|(ms, _)| *ms);
    match (last, all.first()) {
        (Some((ms, reader)), _) if ms <= window_ms => (
            Verdict::BackupRunning,
            format!("{} reads as registered, last {ms} ms ago", who(reader)),
        ),
        (Some((ms, reader)), _) => (
            Verdict::BackupStale,
            format!("{} is registered and last read {ms} ms ago", who(reader)),
        ),
        (None, Some(reader)) => (
            Verdict::BackupStale,
            format!("{} is registered and was not seen to read", who(reader)),
        ),
        (None, None) => (Verdict::Quiet, "nobody holds it".to_owned()),
    }
}

fn who(holder: &Holder) -> String {
    let Holder { pid, name, .. } = holder;
    match (&holder.pod, holder.cgroup.as_str()) {
        _ if *pid == 0 => name.clone(),
        (Some(pod), _) => match &pod.container {
            Some(container) => {
                format!(
                    "process {pid} ({name}) of pod {}, container {container}",
                    pod.uid
                )
            }
            None => format!("process {pid} ({name}) of pod {}", pod.uid),
        },
        (None, "") => format!("process {pid} ({name})"),
        (None, group) => format!("process {pid} ({name}) of cgroup {group}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_millis(100);

    fn holder(pid: u32, writable: bool, registered: bool, read: Option<u64>) -> Holder {
        Holder {
            pid,
            name: "dd".to_owned(),
            cgroup: "/pod".to_owned(),
            pod: None,
            writable,
            registered,
            last_read_ms: read,
            last_write_ms: None,
            read_bytes: 0,
            written_bytes: 0,
        }
    }

    fn of(holders: Vec<Holder>, unexplained: i64, lost: bool) -> Judgement {
        let facts = Facts {
            holders,
            unexplained,
            lost: lost.then(|| "1 event".to_owned()),
        };
        judge(Sight::Seen(facts), WINDOW)
    }

    #[test]
    fn without_sight_nothing_is_known() {
        let judged = judge(Sight::Blind("no BTF".to_owned()), WINDOW);
        assert_eq!(
            (judged.verdict, judged.reason.as_str()),
            (Verdict::Unknown, "no BTF")
        );
    }

    #[test]
    fn a_disk_that_has_gone_is_quiet() {
        assert_eq!(judge(Sight::Gone, WINDOW).verdict, Verdict::Quiet);
    }

    #[test]
    fn who_could_write_is_live_whatever_else_is_known() {
        for registered in [false, true] {
            for (unexplained, lost) in [(0, false), (1, true), (-1, false)] {
                let judged = of(vec![holder(5, true, registered, None)], unexplained, lost);
                assert_eq!(judged.verdict, Verdict::Live);
                assert!(judged.reason.contains("process 5 (dd) of cgroup /pod"));
            }
        }
    }

    #[test]
    fn the_latest_writer_is_named() {
        let mut late = holder(6, true, false, None);
        late.last_write_ms = Some(3);
        let judged = of(vec![holder(5, true, false, None), late], 0, false);
        assert!(judged.reason.contains("process 6") && judged.reason.contains("3 ms ago"));
    }

    #[test]
    fn a_writer_in_a_pod_is_named_by_it() {
        let mut writer = holder(6, true, false, None);
        writer.pod = Some(crate::attach::ports::Pod {
            uid: "1b2c".to_owned(),
            container: Some("9f8e".to_owned()),
        });
        let reason = of(vec![writer], 0, false).reason;
        assert!(reason.starts_with("process 6 (dd) of pod 1b2c, container 9f8e can write"));
    }

    #[test]
    fn lost_evidence_is_unknown_and_never_quiet() {
        assert_eq!(of(vec![], 0, true).verdict, Verdict::Unknown);
        let reader = holder(5, false, true, Some(1));
        assert_eq!(of(vec![reader], 0, true).verdict, Verdict::Unknown);
    }

    #[test]
    fn openers_that_do_not_add_up_are_unknown() {
        for unexplained in [1, 2, -1] {
            assert_eq!(of(vec![], unexplained, false).verdict, Verdict::Unknown);
            let reader = holder(5, false, true, Some(1));
            assert_eq!(
                of(vec![reader], unexplained, false).verdict,
                Verdict::Unknown
            );
        }
    }

    #[test]
    fn an_unregistered_reader_is_unknown_and_named() {
        let known = holder(4, false, true, Some(1));
        let judged = of(vec![known, holder(5, false, false, Some(1))], 0, false);
        assert_eq!(judged.verdict, Verdict::Unknown);
        assert!(judged.reason.contains("process 5") && judged.reason.contains("register"));
    }

    #[test]
    fn a_registered_reader_runs_as_long_as_it_reads() {
        let verdict = |read| of(vec![holder(5, false, true, read)], 0, false).verdict;
        assert_eq!(verdict(Some(100)), Verdict::BackupRunning);
        assert_eq!(verdict(Some(101)), Verdict::BackupStale);
        assert_eq!(verdict(None), Verdict::BackupStale);
        let two = vec![
            holder(5, false, true, None),
            holder(6, false, true, Some(1)),
        ];
        assert_eq!(of(two, 0, false).verdict, Verdict::BackupRunning);
    }

    #[test]
    fn nobody_is_quiet() {
        assert_eq!(of(vec![], 0, false).verdict, Verdict::Quiet);
    }

    proptest! {
        /// Whatever is registered and whenever it read: only a table without a
        /// writer, a stranger, a doubt or a loss lets go of the disk.
        #[test]
        fn nothing_in_doubt_is_let_go(
            rows in prop::collection::vec((any::<bool>(), any::<bool>(), any::<Option<u64>>()), 0..5),
            unexplained in -2_i64..3,
            lost: bool,
        ) {
            let holders: Vec<_> = rows.iter().map(|&(w, r, t)| holder(1, w, r, t)).collect();
            let doubt = lost || unexplained != 0 || rows.iter().any(|&(w, r, _)| w || !r);
            let verdict = of(holders, unexplained, lost).verdict;
            prop_assert_eq!(doubt, matches!(verdict, Verdict::Live | Verdict::Unknown));
            if !doubt {
                prop_assert_eq!(rows.is_empty(), verdict == Verdict::Quiet);
            }
        }
    }
}
