//! What a host discovers, and how it is told of changes.

use std::sync::Arc;
use std::time::Duration;

use super::bench_for_tests::*;
use super::wire::{u32_at, u64_at};

fn log(bytes: u32, offset: u32) -> [u8; 64] {
    let mut entry = command(2, 0x5a, bytes, [(bytes / 4 - 1) << 16 | 0x70, 0, 0]);
    entry[48..52].copy_from_slice(&offset.to_le_bytes());
    entry
}

#[test]
fn a_host_sees_what_is_its_own_and_hears_of_changes() {
    let bench = Bench::new();
    bench.discovery.listens_on(4421);
    bench.discovery.show("nqn.test:a", "nqn.host:1");
    bench.discovery.show("nqn.test:b", "nqn.host:2");
    let address = [192, 0, 2, 7].into();
    let me = bench.discovery.subsystem(bench.a.host(), address);
    let mut host = bench.open();
    host.agree(NONE);
    assert_eq!(host.connect(&me, 0, 0xffff, 0).status, 0);
    assert_eq!(host.status(property(true, 0x14, 0x0046_0001)), 0);
    let (page, _) = host.run(command(6, 0x5a, 4096, [1, 0, 0]), &[]);
    assert_eq!(
        (page[111], u32_at(&page, 92), u32_at(&page, 516)),
        (2, 1 << 31, 0)
    );
    assert_eq!(
        host.status(command(6, 0x5a, 4096, [2, 0, 0])),
        0x4002,
        "no namespaces"
    );
    assert_eq!(
        host.status(command(2, 0x5a, 512, [127 << 16 | 2, 0, 0])),
        0x4109
    );

    let (page, _) = host.run(log(4096, 0), &[]);
    assert_eq!(
        (u64_at(&page, 0), u64_at(&page, 8)),
        (3, 1),
        "generation, records"
    );
    let record = &page[1024..2048];
    assert_eq!(&record[..4], [3, 1, 2, 2]);
    assert_eq!(&record[32..37], b"4421 ");
    assert_eq!(&record[256..267], b"nqn.test:a\0");
    assert_eq!(&record[512..522], b"127.0.0.1 ");
    assert_eq!(host.run(log(1024, 1024), &[]).0, record, "from an offset");

    // A change is told once, until the log is read.
    let event = host.send(command(0x0c, 0x5a, 0, [0; 3]), &[]);
    assert_eq!(host.status(command(9, 0x5a, 0, [0x0b, 1 << 31, 0])), 0);
    bench.discovery.hide("nqn.test:b");
    host.wait(Duration::ZERO);
    assert!(host.answers.is_empty(), "another host's");
    bench.discovery.hide("nqn.test:a");
    host.wait(Duration::ZERO);
    let told = host.answer().completion();
    assert_eq!((told.command, told.result), (event, 0x0070_f002));
    let (page, _) = host.run(log(1024, 0), &[]);
    assert_eq!((u64_at(&page, 0), u64_at(&page, 8)), (5, 0));

    let mut io = bench.open();
    io.agree(NONE);
    assert_eq!(
        io.connect(&me, 1, 1, 0).status,
        0x4182,
        "it has no I/O queues"
    );
    assert_eq!(host.status(command(9, 0x5a, 0, [7, 0, 0])), 0x4002);
}

#[test]
fn nothing_is_left_of_a_host_that_has_discovered() {
    let bench = Bench::new();
    let before = Arc::strong_count(&bench.discovery);
    for _ in 0..3 {
        let me = bench
            .discovery
            .subsystem(bench.a.host(), [127, 0, 0, 1].into());
        let mut host = bench.open();
        host.agree(NONE);
        assert_eq!(host.connect(&me, 0, 0xffff, 0).status, 0);
        assert_eq!(Arc::strong_count(&bench.discovery), before + 2);
        host.inline.close();
    }
    assert_eq!(Arc::strong_count(&bench.discovery), before);
}
