//! The decision whether to format, for every answer blkid gives.

use super::*;
use crate::ids::Bytes;
use crate::initiator::bench::{Bench, mount};
use crate::initiator::superblock::Superblock;

fn found(code: i32, out: &str) -> Examination {
    Examination {
        size: Bytes(1 << 30),
        superblock: None,
        marked: false,
        blkid_code: Some(code),
        blkid_out: out.to_owned(),
        blkid_err: String::new(),
    }
}

fn plan_rw(found: &Examination, ever_written: bool) -> Result<Plan, String> {
    plan(found, ever_written, false, FsType::Xfs)
}

#[test]
fn only_a_blank_never_written_volume_is_formatted() {
    let blank = found(2, "");
    assert_eq!(plan_rw(&blank, false), Ok(Plan::Format));
    assert!(
        plan_rw(&blank, true)
            .unwrap_err()
            .contains("was written before")
    );
    assert!(plan(&blank, false, true, FsType::Xfs).is_err(), "read-only");
    for out in [
        "TYPE=ext4\n",
        "PTTYPE=gpt\n",
        "TYPE=LVM2_member\n",
        "TYPE=xfs\nPTTYPE=dos\n",
    ] {
        assert!(plan_rw(&found(0, out), false).is_err(), "{out:?}");
    }
    assert_eq!(
        plan_rw(&found(0, "TYPE=xfs\n"), false),
        Ok(Plan::Mount { marked: false })
    );
    assert_eq!(
        plan_rw(&found(0, "TYPE=xfs\n"), true),
        Ok(Plan::Mount { marked: false })
    );
}

#[test]
fn an_answer_that_blkid_does_not_describe_is_never_blank() {
    for code in [1, 4, 8, 127, -1] {
        assert!(plan_rw(&found(code, ""), false).is_err(), "{code}");
    }
    let mut killed = found(0, "");
    killed.blkid_code = None;
    assert!(plan_rw(&killed, false).is_err());
    assert!(plan_rw(&found(0, ""), false).is_err());
    let mut complained = found(2, "");
    complained.blkid_err = "blkid: error: /dev/x: Input/output error".to_owned();
    assert!(plan_rw(&complained, false).is_err());
    let mut damaged = found(2, "");
    damaged.superblock = Some(Superblock {
        size: Bytes(5),
        unfinished: false,
    });
    assert!(plan_rw(&damaged, false).is_err());
}

#[test]
fn an_interrupted_format_is_done_again_and_a_finished_one_is_not() {
    let mut blank = found(2, "");
    blank.marked = true;
    assert_eq!(plan_rw(&blank, true), Ok(Plan::Format));
    assert!(plan(&blank, true, true, FsType::Xfs).is_err(), "read-only");

    let mut half = found(0, "TYPE=xfs\n");
    half.superblock = Some(Superblock {
        size: Bytes(1 << 30),
        unfinished: true,
    });
    assert_eq!(
        plan_rw(&half, true),
        Ok(Plan::Mount { marked: false }),
        "no mark, no format"
    );
    half.marked = true;
    assert_eq!(plan_rw(&half, true), Ok(Plan::Format));

    let mut whole = half;
    whole.superblock = Some(Superblock {
        size: Bytes(1 << 30),
        unfinished: false,
    });
    assert_eq!(plan_rw(&whole, true), Ok(Plan::Mount { marked: true }));
    whole.blkid_out = "TYPE=ext4\n".to_owned();
    assert!(plan_rw(&whole, true).is_err(), "another file system");
}

#[test]
fn mount_options_are_passed_on_and_dangerous_ones_are_not() {
    let flags = |list: &[&str]| -> Vec<String> { list.iter().map(|&s| s.to_owned()).collect() };
    let xfs = options(FsType::Xfs, &flags(&["noatime,nodev", "defaults"]), false);
    assert_eq!(xfs.as_deref(), Ok("rw,noatime,nodev,nouuid"));
    let ext4 = options(FsType::Ext4, &flags(&["", "commit=9"]), true);
    assert_eq!(ext4.as_deref(), Ok("ro,commit=9"));
    for bad in [
        "bind",
        "remount,rw",
        "loop=/dev/loop0",
        "noatime,move",
        "helper=x",
        "a b",
        "offset=4096",
    ] {
        assert!(
            options(FsType::Ext4, &flags(&[bad]), false).is_err(),
            "{bad:?}"
        );
    }
    assert!(options(FsType::Ext4, &flags(&["rw"]), true).is_err());
}

#[tokio::test]
async fn root_a_check_that_outlasts_its_call_is_waited_for_by_the_next() {
    let mut bench = Bench::new(64);
    bench.stage(mount(FsType::Ext4)).await.unwrap();
    bench.unstage().await.unwrap();
    bench.change(|a| a.exported.ever_written = true);
    bench.restart(|settings| settings.device.tool = Duration::ZERO);
    let late = bench.stage(mount(FsType::Ext4)).await.unwrap_err();
    assert!(matches!(late, NodeError::Deadline { .. }), "{late}");
    assert!(late.to_string().contains("fsck"), "{late}");
    let staged = async {
        while let Err(late) = bench.stage(mount(FsType::Ext4)).await {
            assert!(matches!(late, NodeError::Deadline { .. }), "{late}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let staged = tokio::time::timeout(Duration::from_secs(60), staged).await;
    assert!(staged.is_ok(), "each call began it anew");
    assert!(bench.is_mounted("staging"));
}
