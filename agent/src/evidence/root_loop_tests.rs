//! The evidence of real disks, on the kernel these tests run on. They need
//! root and loop devices, run one at a time, and clean up after themselves.

pub mod bench;

use std::fs::File;

use nix::sys::signal::Signal;

use self::bench::{Bench, Child, LoopDisk, direct, until};
use super::streams::Motion;
use super::*;
use crate::attach::ports::{Holder, Verdict};
use crate::ids::Bytes;

fn reader_of(disk: &LoopDisk, who: Who) -> Reader {
    Reader {
        who,
        volume: "vol-1".parse().unwrap(),
        ticket: TicketId::random(),
        disk: disk.disk.clone(),
    }
}

fn holder(judged: &Judgement, pid: u32) -> &Holder {
    let found = judged.holders.iter().find(|h| h.pid == pid);
    found.unwrap_or_else(|| panic!("{pid} in {judged:?}"))
}

#[test]
fn every_program_runs_on_this_kernel() {
    let bench = Bench::new();
    let report = bench.evidence.describe();
    assert_eq!(report.blind, None);
    assert!(
        report.programs.iter().all(|p| p.failure.is_none()),
        "{report:?}"
    );
    assert_ne!(report.cgroup, "none");
}

#[test]
fn counts_are_exact_and_attributed_to_the_process() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let before = bench.evidence.io(&disk.disk).unwrap().total;
    let file = direct(&disk.path(), true);
    for i in 0..7 {
        bench::write_block(&file, i);
    }
    for i in 0..5 {
        bench::read_block(&file, i);
    }
    file.sync_all().unwrap();
    let io = bench.evidence.io(&disk.disk).unwrap();
    let own = io
        .processes
        .iter()
        .find(|p| p.pid == std::process::id())
        .unwrap();
    assert_eq!((own.count.writes, own.count.written_bytes), (7, 7 * 4096));
    assert_eq!((own.count.reads, own.count.read_bytes), (5, 5 * 4096));
    assert!(own.count.flushes >= 1);
    assert!(own.count.last_read_ns >= own.count.last_write_ns);
    assert!(own.count.last_write_ns > 0);

    // Another process, that has ended when it is asked about.
    let mut dd = Child::sh(
        "exec dd if=$0 of=/dev/null bs=4096 count=3 iflag=direct status=none",
        &disk,
    );
    assert!(dd.wait().success());
    let io = bench.evidence.io(&disk.disk).unwrap();
    assert_eq!(io.total.reads - before.reads, 8);
    assert!(!io.processes.iter().any(|p| p.pid == dd.pid()));
}

/// A backup tool that nobody registered, by its process's name: a reader is let
/// go, a writer is not.
#[test]
fn a_backup_tool_is_known_by_its_name() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let folder = tempfile::tempdir().unwrap();
    let restic = folder.path().join("restic");
    std::fs::copy("/bin/dd", &restic).unwrap();
    let restic = restic.display();
    // Nobody takes what it reads.
    let reader = Child::read(&format!("exec {restic} if=$0 bs=4096 status=none"), &disk);
    let judged = bench.settles(&disk, &[], Verdict::BackupRunning);
    assert!(holder(&judged, reader.pid()).registered);
    bench.ahead(3600);
    bench.settles(&disk, &[], Verdict::BackupStale);
    let writer = Child::fed(
        &format!("exec {restic} of=$0 conv=notrunc status=none"),
        &disk,
    );
    let judged = bench.settles(&disk, &[], Verdict::Live);
    assert!(holder(&judged, writer.pid()).registered);
}

/// Where cgroup version 2 has the `io` controller, as in the VM.
#[test]
fn buffered_writes_are_counted_for_who_made_them() {
    let bench = Bench::new();
    let hierarchy = &bench.evidence.inner.hierarchy;
    if hierarchy.kind != cgroups::Kind::V2 || !hierarchy.charges_io() {
        let in_vm = std::env::var_os("DROVER_RECORD").is_some();
        assert!(!in_vm, "the VM's hierarchy: {hierarchy:?}");
        return;
    }
    let mount = hierarchy.mount.clone().unwrap();
    std::fs::write(mount.join("cgroup.subtree_control"), "+io +memory").unwrap();
    let group = bench::Group::new(&mount);
    let disk = LoopDisk::new(16);
    let mounted = bench::Mounted::ext4(&disk);
    let file = mounted.point.join("file");
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec dd if=/dev/zero of={} bs=1M count=4 status=none",
        group.path.display(),
        file.display()
    );
    assert!(Child::sh(&script, &disk).wait().success());
    let id = hierarchy.id_of(&group.path).unwrap();
    let written = || {
        let (books, _) = bench.evidence.inner.books().unwrap();
        books.groups(disk.disk.diskseq, |of| of == id).written_bytes
    };
    assert_eq!(written(), 0, "it is in memory still");
    nix::unistd::syncfs(File::open(&mounted.point).unwrap()).unwrap();
    assert!(written() >= 4 << 20, "{} of 4 MiB", written());
    mounted.unmount();
}

#[test]
fn latencies_and_counts_become_metrics() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let file = direct(&disk.path(), false);
    for i in 0..9 {
        bench::read_block(&file, i);
    }
    let label = Label {
        volume: "vol-1".parse().unwrap(),
        pvc: "data".to_owned(),
        namespace: "shop".to_owned(),
        node: "a".to_owned(),
    };
    bench
        .evidence
        .label(HashMap::from([(disk.disk.diskseq, label)]));
    let mut registry = Registry::default();
    bench.evidence.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let name = &disk.disk.name;
    let line = |metric: &str| {
        let begin = format!(
            "{metric}{{device=\"{name}\",direction=\"read\",volume=\"vol-1\",\
             pvc=\"data\",namespace=\"shop\",node=\"a\"}} "
        );
        let found = text.lines().find_map(|l| l.strip_prefix(&begin));
        found
            .unwrap_or_else(|| panic!("{begin} in {text}"))
            .parse::<u64>()
            .unwrap()
    };
    assert!(line("drover_device_io_total") >= 9);
    assert!(line("drover_device_io_bytes_total") >= 9 * 4096);
    assert!(line("drover_device_io_seconds_count") + line("drover_device_io_untimed_total") >= 9);
    let timed = line("drover_device_service_seconds_count");
    assert!(timed <= line("drover_device_io_seconds_count"));
    assert_eq!(line("drover_device_io_in_flight"), 0);
    let of = format!("drover_device_times_info{{device=\"{name}\",source=\"requests\"");
    assert!(text.contains(&of), "{of} in {text}");
    assert!(text.contains("drover_evidence_cgroup_info{kind=\""));
    assert!(text.contains("drover_evidence_lost_events_total{cause=\"io_map_full\"} 0"));
}

#[test]
fn nobody_is_quiet_and_a_disk_that_went_too() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let judged = bench.judge(&disk, &[]);
    assert_eq!(
        (judged.verdict, judged.holders),
        (Verdict::Quiet, vec![]),
        "{}",
        judged.reason
    );
    let gone = disk.disk.clone();
    drop(disk);
    let judged = bench.judge_disk(&gone, &[]);
    assert_eq!(judged.verdict, Verdict::Quiet);
    assert!(judged.reason.contains("gone"), "{}", judged.reason);
}

#[test]
fn a_live_writer_and_a_silent_one_are_live() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let mut dd = Child::fed(
        "exec dd of=$0 bs=4096 oflag=direct conv=notrunc iflag=fullblock status=none",
        &disk,
    );
    dd.feed(&[1; 4096]);
    let judged = until(|| {
        Some(bench.judge(&disk, &[])).filter(|j| j.holders.iter().any(|h| h.written_bytes >= 4096))
    });
    assert_eq!(judged.verdict, Verdict::Live);
    let writer = holder(&judged, dd.pid());
    assert!(writer.writable && writer.last_write_ms.is_some());
    assert_eq!(writer.name, "dd");
    drop(dd);

    let silent = Child::holding(&disk, true);
    bench.register(reader_of(&disk, Who::Process(silent.pid())));
    bench.ahead(3600);
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Live, "{}", judged.reason);
    let silent = holder(&judged, silent.pid());
    assert!(silent.registered && silent.last_write_ms.is_none());
}

#[test]
fn a_registered_reader_runs_hangs_and_runs_again() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    // dd stops by itself when the pipe is full.
    let mut dd = Child::read("exec dd if=$0 bs=4096 iflag=direct status=none", &disk);
    bench.has_read(&disk, dd.pid(), 16);
    let named = format!("pid {}", dd.pid());
    until(|| {
        let judged = bench.judge(&disk, &[]);
        assert_eq!(judged.verdict, Verdict::Unknown);
        judged.reason.contains(&named).then_some(())
    });

    let reader = reader_of(&disk, Who::Process(dd.pid()));
    let ticket = reader.ticket.clone();
    bench.register(reader);
    bench.settles(&disk, &[], Verdict::BackupRunning);
    dd.signal(Signal::SIGSTOP);
    bench.ahead(31);
    bench.settles(&disk, &[], Verdict::BackupStale);
    let status = bench.evidence.readers().remove(0);
    assert!(
        status.alive
            && status.last_progress_ms() >= Some(31_000)
            && status.read.bytes.0 >= 16 * 4096
    );

    dd.signal(Signal::SIGCONT);
    dd.drain(64 * 1024);
    bench.ahead(0);
    bench.settles(&disk, &[], Verdict::BackupRunning);
    bench.evidence.unregister(&ticket);
    assert_eq!(bench.judge(&disk, &[]).verdict, Verdict::Unknown);
    bench.register(reader_of(&disk, Who::Process(dd.pid())));
    dd.kill();
    let status = bench.evidence.readers().remove(0);
    assert!(!status.alive);
    bench.settles(&disk, &[], Verdict::Quiet);
}

/// The disk's bytes go over a real TCP connection; then the sink takes no more.
#[test]
fn a_stream_that_stalls_at_its_sink_is_told_from_one_that_flows() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let sink = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = sink.local_addr().unwrap().port();
    // /dev/tcp is of bash.
    let mut stream = Child::fed(
        &format!(
            "exec bash -c 'read line; \
             exec dd if=$0 bs=4096 iflag=direct status=none >/dev/tcp/127.0.0.1/{port}' $0"
        ),
        &disk,
    );
    bench.register(reader_of(&disk, Who::Process(stream.pid())));
    assert_eq!(
        bench.evidence.readers().remove(0).sent.unwrap().bytes,
        Bytes(0)
    );
    stream.feed(b"\n");
    let (mut peer, _) = sink.accept().unwrap();
    let mut taken = vec![0; 1 << 20];
    std::io::Read::read_exact(&mut peer, &mut taken).unwrap();
    let status = until(|| {
        let status = bench.evidence.readers().remove(0);
        let sent = status.sent.unwrap().bytes.0;
        (sent >= 1 << 20 && status.read.bytes.0 >= sent).then_some(status)
    });
    assert_eq!(status.motion(bench.evidence.window_ms()), Motion::Flows);
    assert_eq!(status.wrote.bytes, Bytes(0));
    // Nobody takes what it sends: it reads no more, and its lease is not renewed.
    bench.ahead(31);
    let status = bench.evidence.readers().remove(0);
    assert!(status.alive);
    assert_eq!(status.motion(bench.evidence.window_ms()), Motion::Rests);
    assert!(status.last_progress_ms() >= Some(30_000), "{status:?}");
}

#[test]
fn what_a_reader_writes_elsewhere_counts_as_progress() {
    let bench = Bench::new();
    let (disk, other) = (LoopDisk::new(16), LoopDisk::new(16));
    let mut dd = Child::fed(
        &format!(
            "read line; exec dd if=$0 of={} bs=4096 iflag=direct oflag=direct status=none",
            other.path().display()
        ),
        &disk,
    );
    bench.register(reader_of(&disk, Who::Process(dd.pid())));
    dd.feed(b"\n");
    let status = until(|| {
        let status = bench.evidence.readers().remove(0);
        (status.wrote.bytes.0 >= 64 * 4096).then_some(status)
    });
    assert_eq!(status.motion(bench.evidence.window_ms()), Motion::Flows);
    assert!(status.read.bytes.0 >= 64 * 4096);
}

#[test]
fn a_cgroup_is_a_reader_on_hosts_of_both_kinds() {
    let mut tried = 0;
    for choice in [Choice::Found, Choice::Unified] {
        let config = EvidenceConfig {
            cgroups: choice,
            ..bench::patient()
        };
        let bench = Bench::with(config);
        let Some(mount) = bench.evidence.inner.hierarchy.mount.clone() else {
            continue;
        };
        tried += 1;
        let group = bench::Group::new(&mount);
        let disk = LoopDisk::new(16);
        let script = format!(
            "echo $$ > {}/cgroup.procs; exec dd if=$0 bs=4096 iflag=direct status=none",
            group.below.display()
        );
        let dd = Child::read(&script, &disk);
        let own = bench.has_read(&disk, dd.pid(), 16);
        let path = format!("/{}", group.below.strip_prefix(&mount).unwrap().display());
        assert_eq!(own.cgroup, path, "{}", bench.evidence.describe().cgroup);
        bench.register(reader_of(&disk, Who::Cgroup(group.path.clone())));
        bench.settles(&disk, &[], Verdict::BackupRunning);
        let status = bench.evidence.readers().remove(0);
        assert!(
            status.alive && status.read.bytes.0 >= 16 * 4096,
            "{status:?}"
        );
        drop(dd);
        let status = bench.evidence.readers().remove(0);
        assert!(
            !status.alive && status.read.bytes.0 >= 16 * 4096,
            "{status:?}"
        );
    }
    assert!(tried > 0, "no cgroup hierarchy is mounted");
}

#[test]
fn descriptors_that_share_a_file_count_once() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let child = Child::sh("exec 5<$0 6<&5; sleep 1000 & exec sleep 1000", &disk);
    let judged = until(|| {
        let judged = bench.judge(&disk, &[]);
        let slept = |h: &Holder| h.name == "sleep";
        (judged.holders.len() == 2 && judged.holders.iter().all(slept)).then_some(judged)
    });
    for holder in &judged.holders {
        bench.register(reader_of(&disk, Who::Process(holder.pid)));
    }
    // Anything but a sum that adds up would be Unknown.
    bench.settles(&disk, &[], Verdict::BackupStale);
    drop(child);
}

#[test]
fn a_file_that_only_an_io_uring_holds_is_unknown() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let ring = bench::ring_holding(
        &File::options()
            .read(true)
            .write(true)
            .open(disk.path())
            .unwrap(),
    );
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Unknown);
    assert!(
        judged.reason.contains("1 more openers"),
        "{}",
        judged.reason
    );
    drop(ring);
    bench.settles(&disk, &[], Verdict::Quiet);
}

#[test]
fn a_writable_mapping_without_a_descriptor_is_live() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let mapping = bench::Mapping::of(&disk.path());
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Live, "{}", judged.reason);
    assert!(holder(&judged, std::process::id()).writable);
    drop(mapping);
    bench.settles(&disk, &[], Verdict::Quiet);
}

#[test]
fn mounts_hold_unless_they_are_drovers_own() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let mount = bench::Mounted::ext4(&disk);
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Live);
    assert!(judged.reason.contains("mount at"), "{}", judged.reason);
    let own = [mount.point.clone()];
    bench.settles(&disk, &own, Verdict::Quiet);

    // A process that could write to a file on it.
    let child = Child::writing_to(&mount.point.join("file"));
    let judged = bench.judge(&disk, &own);
    assert_eq!(judged.verdict, Verdict::Live);
    assert!(holder(&judged, child.pid()).writable);
    drop(child);

    // The same place in a namespace of its own, which no unmount here reaches.
    let child = Child::sh(
        "exec unshare --mount --propagation private sleep 1000",
        &disk,
    );
    let judged = until(|| Some(bench.judge(&disk, &own)).filter(|j| j.verdict == Verdict::Live));
    assert!(
        judged.reason.contains("namespace of process"),
        "{}",
        judged.reason
    );
    mount.unmount();
    let judged = bench.judge(&disk, &own);
    assert_eq!(judged.verdict, Verdict::Live, "{}", judged.reason);
    drop(child);
    bench.settles(&disk, &own, Verdict::Quiet);
}

#[test]
fn a_loop_device_on_the_disk_is_live() {
    let bench = Bench::new();
    let disk = LoopDisk::new(16);
    let upper = LoopDisk::over(&disk.path());
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Live, "{}", judged.reason);
    assert!(
        judged.reason.contains(&upper.disk.name),
        "{}",
        judged.reason
    );
    drop(upper);
    bench.settles(&disk, &[], Verdict::Quiet);
}

#[test]
fn openers_of_a_partition_hold_the_disk() {
    let bench = Bench::new();
    let disk = LoopDisk::partitioned();
    bench.settles(&disk, &[], Verdict::Quiet);
    let part = disk.partition();
    let one = Child::holding_path(&part.path, false);
    bench.register(reader_of(&disk, Who::Process(one.pid())));
    bench.settles(&disk, &[], Verdict::BackupStale);
    // Two openers of one partition, where kernels count the whole disk differently.
    let two = Child::holding_path(&part.path, false);
    bench.register(reader_of(&disk, Who::Process(two.pid())));
    bench.settles(&disk, &[], Verdict::BackupStale);
    // And one that nobody explains, on either.
    let ring = bench::ring_holding(&File::open(disk.path()).unwrap());
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Unknown, "{}", judged.reason);
    assert!(judged.reason.contains("openers"), "{}", judged.reason);
    drop((ring, one, two));
    // This process's own: udev may probe the disk meanwhile.
    let reads = || {
        let io = bench.evidence.io(&disk.disk).unwrap();
        let own = io.processes.iter().find(|p| p.pid == std::process::id());
        own.map_or(0, |own| own.count.reads)
    };
    let before = reads();
    bench::read_block(&direct(&part.path, false), 0);
    assert_eq!(reads(), before + 1);
    let writer = Child::holding_path(&part.path, true);
    assert_eq!(bench.judge(&disk, &[]).verdict, Verdict::Live);
    drop(writer);
}

#[test]
fn lost_events_are_unknown_until_the_window_has_passed() {
    let config = EvidenceConfig {
        processes: 1,
        ..bench::patient()
    };
    let bench = Bench::with(config);
    let disk = LoopDisk::new(16);
    let file = direct(&disk.path(), false);
    bench::read_block(&file, 0);
    let mut dd = Child::sh(
        "exec dd if=$0 of=/dev/null bs=4096 count=3 iflag=direct status=none",
        &disk,
    );
    assert!(dd.wait().success());
    drop(file);
    let judged = bench.judge(&disk, &[]);
    assert_eq!(judged.verdict, Verdict::Unknown);
    assert!(judged.reason.contains("lost"), "{}", judged.reason);
    bench.ahead(31);
    bench.settles(&disk, &[], Verdict::Quiet);
}

/// More processes than there are places, one after another: who has ended makes
/// room, and leaves nothing behind in it. Others' processes take places as well,
/// so one may find none.
#[test]
fn a_place_is_used_again_and_begins_at_nothing() {
    const PLACES: u32 = 32;
    let config = EvidenceConfig {
        processes: PLACES,
        ..bench::patient()
    };
    let bench = Bench::with(config);
    let disk = LoopDisk::new(16);
    let total = || bench.evidence.io(&disk.disk).unwrap().total;
    let (mut before, mut counted) = (total(), 0);
    until(|| {
        let dd = "exec dd if=$0 of=/dev/null bs=4096 count=3 iflag=direct status=none";
        assert!(Child::sh(dd, &disk).wait().success());
        let after = total();
        let reads = after.reads - before.reads;
        assert_eq!(after.read_bytes - before.read_bytes, reads * 4096);
        match reads {
            0 => {}
            3 => counted += 1,
            other => panic!("{other} reads of a process that made 3"),
        }
        before = after;
        (counted > PLACES).then_some(())
    });
}

#[test]
fn without_programs_every_verdict_is_unknown_and_says_why() {
    let blind = Evidence::blind("no BTF here");
    let disk = Disk {
        name: "loop0".to_owned(),
        diskseq: Diskseq(1),
    };
    let judged = bench::wait_for(blind.judge(&disk, &[]));
    assert_eq!(
        (judged.verdict, judged.reason.as_str()),
        (Verdict::Unknown, "no BTF here")
    );
    assert!(blind.io(&disk).is_err());
    assert!(blind.readers().is_empty());
    let mut registry = Registry::default();
    blind.register_metrics(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    assert!(text.contains("drover_evidence_up 0") && !text.contains("drover_device_io"));
}
