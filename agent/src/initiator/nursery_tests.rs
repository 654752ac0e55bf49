//! A real nursery: this test binary stands in for drover's.

use std::time::Duration;

use super::super::child::ChildError;
use super::super::child::tests::children;
use super::super::child_ops::{Node, Op};
use super::*;
use crate::ids::Diskseq;

const LONG: Duration = Duration::from_secs(20);

fn status(pid: Pid, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim_start_matches(':').trim().to_owned())
}

async fn until(what: impl Fn() -> bool) -> bool {
    for _ in 0..400 {
        if what() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

async fn statvfs(children: &super::super::Children) -> Result<(), ChildError> {
    let op = Op::Room { path: "/".into() };
    children.run(&op, LONG).await.map(drop)
}

#[tokio::test]
async fn a_child_is_the_agents_own_and_leads_a_group() {
    let children = children();
    let forked = children.nursery().fork().await.unwrap();
    let pid = forked.running.id().unwrap();
    let own = std::process::id().to_string();
    assert_eq!(status(pid, "PPid"), Some(own));
    assert_eq!(nix::unistd::getpgid(Some(pid)).unwrap(), pid);
    let mut open: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2"]);
    drop(forked);
    assert!(
        until(|| status(pid, "Pid").is_none()).await,
        "{pid} is left"
    );
}

#[tokio::test]
async fn a_nurserys_end_is_nothing_to_its_children_and_the_next_gets_another() {
    let children = children();
    statvfs(&children).await.unwrap();
    let first = children.nursery().pid().unwrap();
    let mut forked = children.nursery().fork().await.unwrap();
    let number = Pid::from_raw(i32::try_from(first).unwrap());
    kill(number, Signal::SIGKILL).unwrap();
    statvfs(&children).await.unwrap();
    assert_ne!(children.nursery().pid().unwrap(), first);
    assert!(until(|| status(number, "Pid").is_none()).await);
    // The child waits for its op still, and ends without one.
    assert!(status(forked.running.id().unwrap(), "Pid").is_some());
    drop(forked.socket);
    let ended = tokio::time::timeout(LONG, forked.running.wait()).await;
    assert!(ended.unwrap().unwrap().success());
    assert_eq!(forked.running.id(), None);
}

#[tokio::test]
async fn a_stopped_nursery_holds_nobody() {
    let children = children();
    statvfs(&children).await.unwrap();
    let stopped = children.nursery().pid().unwrap();
    let number = Pid::from_raw(i32::try_from(stopped).unwrap());
    kill(number, Signal::SIGSTOP).unwrap();
    let op = Op::Room { path: "/".into() };
    let error = children.run(&op, Duration::from_millis(200)).await;
    let error = error.unwrap_err();
    assert!(matches!(error, ChildError::Deadline { .. }), "{error}");
    statvfs(&children).await.unwrap();
    assert!(until(|| status(number, "Pid").is_none()).await);
}

#[tokio::test]
async fn an_op_past_its_deadline_is_ended() {
    // A FIFO that nobody writes to: its open does not return.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("subsysnqn");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let children = children();
    let op = Op::Delete {
        controller: folder.path().to_owned(),
        subsystem: String::new(),
    };
    let error = children.run(&op, Duration::from_millis(500)).await;
    let error = error.unwrap_err();
    assert!(matches!(error, ChildError::Deadline { .. }), "{error}");
    assert_eq!((children.overdue.get(), children.held.get()), (1, 0));
}

/// A child of this process by the beginning of its name.
fn child_named(name: &str) -> Option<Pid> {
    let own = std::process::id().to_string();
    let all = std::fs::read_dir("/proc").unwrap();
    all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .find(|pid| {
            status(*pid, "Name").is_some_and(|found| found.starts_with(name))
                && status(*pid, "PPid").as_ref() == Some(&own)
        })
}

#[tokio::test]
async fn a_child_that_ends_without_an_answer_is_an_error_that_says_how() {
    // No other test's child has this name.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("subsysnqn");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let op = Op::Delete {
        controller: folder.path().to_owned(),
        subsystem: String::new(),
    };
    let children = children();
    let run = tokio::spawn(async move { children.run(&op, LONG).await });
    let name = "delete /var/tmp";
    assert!(until(|| child_named(name).is_some()).await, "it never ran");
    kill(child_named(name).unwrap(), Signal::SIGKILL).unwrap();
    let error = run.await.unwrap().unwrap_err();
    let ChildError::Silent { what, status, .. } = &error else {
        panic!("{error}");
    };
    assert!(what.starts_with(name), "{what}");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    assert_eq!(
        error.errno(),
        None,
        "no call failed that one could judge by"
    );
}

#[tokio::test]
async fn many_children_run_at_once() {
    let children = children();
    let all = (0..32).map(|n| {
        let children = children.clone();
        tokio::spawn(async move {
            let device = Node {
                path: format!("/no/such/device{n}").into(),
                diskseq: Diskseq(1),
            };
            let op = Op::SyncDevice { device };
            let error = children.run(&op, LONG).await.unwrap_err();
            assert!(
                error.to_string().contains(&format!("device{n}:")),
                "{error}"
            );
        })
    });
    for one in all.collect::<Vec<_>>() {
        one.await.unwrap();
    }
}
