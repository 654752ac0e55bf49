//! Real children: this test binary stands in for drover's.

use super::*;
use std::os::fd::AsRawFd;

/// Children of this test binary, which runs [`child_entry`] for them.
pub(in crate::initiator) fn children() -> Children {
    let args = [
        "initiator::child::tests::child_entry",
        "--exact",
        "--ignored",
        "--nocapture",
        "--test-threads=1",
        "drover-child",
    ];
    Children::of(
        std::env::current_exe().unwrap(),
        args.map(OsString::from).to_vec(),
    )
}

#[test]
#[ignore = "not a test: the main function of this binary's nursery"]
fn child_entry() {
    let mut args = std::env::args();
    if args.any(|arg| arg == "drover-child") {
        let code = crate::initiator::child_main(args);
        std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
    }
}

fn is_running(pid: &str) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => !stat.rsplit(')').next().unwrap().trim().starts_with('Z'),
        Err(_) => false,
    }
}

#[tokio::test]
async fn an_op_is_answered_by_a_child() {
    let op = Op::Room { path: "/".into() };
    let (answer, _) = children().run(&op, Duration::from_secs(20)).await.unwrap();
    let Answer::Room(room) = answer else {
        panic!("{answer:?}");
    };
    assert!(room.bytes[0] > 0 && room.bytes[0] >= room.bytes[1]);
}

#[tokio::test]
async fn a_call_that_fails_is_named_with_its_object() {
    let op = Op::Room {
        path: "/no/such/path".into(),
    };
    let error = children()
        .run(&op, Duration::from_secs(20))
        .await
        .unwrap_err();
    assert_eq!(error.errno(), Some(Errno::ENOENT));
    assert!(
        error.to_string().contains("statvfs /no/such/path"),
        "{error}"
    );
}

#[tokio::test]
async fn a_program_that_is_no_nursery_is_an_error() {
    let silent = Children::of("/bin/echo".into(), vec!["no nursery".into()]);
    let op = Op::Room { path: "/".into() };
    let error = silent.run(&op, Duration::from_secs(20)).await.unwrap_err();
    assert!(matches!(error, ChildError::Spawn { .. }), "{error}");
    assert!(error.to_string().contains("ended before"), "{error}");
}

#[tokio::test]
async fn a_tool_past_its_deadline_is_ended_with_what_it_started() {
    let children = children();
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let script = format!("sleep 1000 & echo $! $$ > {}; wait", pids.display());
    let args = ["-c".as_ref(), script.as_ref()];
    let run = children.tool("sh", &args, Duration::from_secs(2));
    let error = run.await.unwrap_err();
    assert!(matches!(error, ChildError::Deadline { .. }), "{error}");
    assert_eq!((children.overdue.get(), children.held.get()), (1, 0));
    let pids = std::fs::read_to_string(pids).unwrap();
    for pid in pids.split_whitespace() {
        for _ in 0..200 {
            if !is_running(pid) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(!is_running(pid), "{pid} lives on");
    }
}

#[tokio::test]
async fn a_stopped_child_does_not_hold_its_caller() {
    let children = children();
    let error = children
        .tool(
            "sh",
            &["-c".as_ref(), "kill -STOP $$; echo went on".as_ref()],
            Duration::from_millis(500),
        )
        .await
        .unwrap_err();
    assert!(error.to_string().contains("kill -STOP"), "{error}");
    assert_eq!(children.overdue.get(), 1);
}

#[tokio::test]
async fn a_child_has_none_of_the_agents_descriptors() {
    let file = std::fs::File::open("/").unwrap();
    // SAFETY: fcntl with a number on a descriptor that is open.
    let cleared = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
    assert_eq!(cleared, 0, "close-on-exec could not be cleared");
    let end = children()
        .tool(
            "sh",
            &["-c".as_ref(), "ls /proc/$$/fd".as_ref()],
            Duration::from_secs(20),
        )
        .await
        .unwrap();
    assert_eq!((end.code, end.output.as_str()), (0, "0 1 2"));
    drop(file);
}

#[tokio::test]
async fn a_tools_exit_status_and_both_outputs_are_kept() {
    let end = children()
        .tool(
            "sh",
            &["-c".as_ref(), "echo out; echo err >&2; exit 4".as_ref()],
            Duration::from_secs(20),
        )
        .await
        .unwrap();
    assert_eq!((end.code, end.output.as_str()), (4, "out err"));
}
