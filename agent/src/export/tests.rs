//! A real listener on loopback, driven by a small user-space host.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::device_for_tests::{BLOCK_BYTES, BLOCKS, Memory, metrics, reactors};
use super::host_for_tests::{Login, TestHost, command};
use super::*;
use crate::block::BLOCK;
use crate::nvme_tcp::wire::{self, Data, Digests, IN_CAPSULE, Kind, MAX_H2C_DATA};

const NONE: Digests = Digests {
    header: false,
    data: false,
};
const BOTH: Digests = Digests {
    header: true,
    data: true,
};
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host-of-tests";
const FINAL: u16 = 0x4083;
const REFUSED: u16 = 0x4184;
const BUSY: u16 = 0x181;

const WRITE: u8 = 1;
const READ: u8 = 2;

struct Target {
    exports: Arc<Exports>,
    device: Arc<Memory>,
    address: SocketAddr,
    _stop: watch::Sender<bool>,
}

impl Drop for Target {
    fn drop(&mut self) {
        self.device.hold.close();
    }
}

fn spec(name: &str) -> ExportSpec {
    ExportSpec {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(1),
        protocol: Protocol::NvmeTcp,
        name: format!("nqn.2026-01.io.drover:test:{name}"),
        unit: Uuid::from_u128(7),
        host: HostIdentity::of(HOST, Uuid::from_u128(1)),
        read_only: false,
        proof: None,
    }
}

fn login(name: &str) -> Login {
    let spec = spec(name);
    Login {
        subsystem: spec.name,
        host: spec.host.nqn,
        host_id: spec.host.id,
        controller: 0xffff,
        queue: 0,
        keep_alive: 0,
    }
}

impl Target {
    /// A target that serves export `a` of a device in memory.
    async fn start() -> Self {
        Self::with(Exports::new(reactors())).await
    }

    async fn with(exports: Arc<Exports>) -> Self {
        let device = Memory::new();
        let served = Arc::clone(&device) as Arc<dyn BlockDevice>;
        exports.open(spec("a"), served, None).unwrap();
        let listener = super::listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let serving = Arc::clone(&exports).serve(Protocol::NvmeTcp, listener, stopped);
        tokio::spawn(serving);
        Self {
            exports,
            device,
            address,
            _stop: stop,
        }
    }

    /// An enabled association of export `a`: its admin queue and I/O queue 1.
    async fn host(&self, digests: Digests) -> (TestHost, TestHost) {
        let admin = TestHost::connect(self.address, digests, &login("a")).await;
        let (mut admin, controller) = admin.expect("Connect");
        admin.enable().await;
        let io = Login {
            controller,
            queue: 1,
            ..login("a")
        };
        let io = TestHost::connect(self.address, digests, &io).await;
        (admin, io.expect("Connect of an I/O queue").0)
    }

    async fn refused(&self, login: &Login) -> u16 {
        TestHost::connect(self.address, NONE, login)
            .await
            .expect_err("a refusal")
    }

    fn metrics(&self) -> String {
        metrics(&self.exports)
    }

    fn close(&self) -> Closing {
        self.exports.close(&spec("a").name).expect("a live export")
    }
}

fn small_write(lba: u32) -> [u8; 64] {
    command(WRITE, 0x01, BLOCK as u32, [lba, 0, 0])
}

fn large_write(blocks: u32) -> [u8; 64] {
    command(WRITE, 0x5a, blocks * BLOCK as u32, [0, 0, blocks - 1])
}

fn read(lba: u32, blocks: u32) -> [u8; 64] {
    command(READ, 0x5a, blocks * BLOCK as u32, [lba, 0, blocks - 1])
}

/// Writes with and without R2T, reads, zeroes, flush, discard and verify.
async fn serves(digests: Digests) {
    let target = Target::start().await;
    let (_admin, mut io) = target.host(digests).await;
    assert_eq!(io.run(small_write(5), &[9; BLOCK_BYTES]).await.1.status, 0);

    let blocks = 64;
    let data: Vec<u8> = (0..blocks as usize * BLOCK_BYTES)
        .map(|i| (i / 7) as u8)
        .collect();
    io.send(large_write(blocks), &[]).await;
    let asked = io.r2t().await;
    assert_eq!((asked.offset, asked.length as usize), (0, data.len()));
    let half = data.len() / 2;
    let part = Data {
        length: half as u32,
        ..asked
    };
    io.send_data(part, false, &data[..half]).await;
    io.send_data(
        Data {
            offset: half as u32,
            ..part
        },
        true,
        &data[half..],
    )
    .await;
    assert_eq!(io.receive().await.unwrap().completion().status, 0);
    assert_eq!(io.run(read(0, blocks), &[]).await.0, data);
    let flushes = || target.device.flushes.load(Ordering::SeqCst);
    let before = flushes();
    let fua = command(2, 0x5a, BLOCK as u32, [0, 0, 1 << 30]);
    assert_eq!(io.run(fua, &[]).await.0, data[..BLOCK_BYTES]);
    assert_eq!(flushes(), before + 1, "FUA: from the medium");

    assert_eq!(
        io.status(command(0x08, 0x5a, 0, [0, 0, 1 << 25 | 1])).await,
        0
    );
    let mut ranges = vec![0; 4096];
    ranges[4..8].copy_from_slice(&2u32.to_le_bytes());
    ranges[8] = 10;
    assert_eq!(
        io.run(command(0x09, 0x01, 4096, [0, 4, 0]), &ranges)
            .await
            .1
            .status,
        0
    );
    let (now, _) = io.run(read(0, blocks), &[]).await;
    for (lba, (block, was)) in now
        .chunks(BLOCK_BYTES)
        .zip(data.chunks(BLOCK_BYTES))
        .enumerate()
    {
        let gone = matches!(lba, 0 | 1 | 10 | 11);
        assert!(
            if gone {
                block.iter().all(|b| *b == 0)
            } else {
                block == was
            },
            "block {lba}"
        );
    }
    assert_eq!(io.status(command(0x00, 0x5a, 0, [0; 3])).await, 0);
    assert_eq!(flushes(), before + 2);
    assert_eq!(
        io.status(command(0x0c, 0x5a, 0, [0, 0, BLOCKS as u32 - 1]))
            .await,
        0
    );
    assert!(target.exports.last_write(&spec("a").volume).is_some());
    let metrics = target.metrics();
    assert!(metrics.contains(r#"drover_nvme_commands_total{opcode="write",result="success"} 2"#));
    assert!(metrics.contains(r#"drover_nvme_data_bytes_total{direction="write"} 266240"#));
    assert!(metrics.contains("drover_nvme_connections 2"), "{metrics}");
}

#[tokio::test]
async fn a_host_reads_and_writes() {
    serves(NONE).await;
}

#[tokio::test]
async fn a_host_reads_and_writes_with_digests() {
    serves(BOTH).await;
}

#[tokio::test]
async fn commands_beyond_the_rules_get_their_status() {
    let target = Target::start().await;
    let (mut admin, mut io) = target.host(NONE).await;
    assert_eq!(io.status(read(BLOCKS as u32 - 1, 2)).await, 0x4080);
    assert_eq!(
        io.status(command(READ, 0x5a, 65 * 4096, [0, 0, 64])).await,
        0x4002
    );
    assert_eq!(
        io.status(command(READ, 0x5a, 8192, [0, 0, 0])).await,
        0x400f
    );
    assert_eq!(
        io.status(command(READ, 0x02, 4096, [0, 0, 0])).await,
        0x4011
    );
    assert_eq!(
        io.status(command(0x04, 0x5a, 4096, [0, 0, 0])).await,
        0x4001
    );
    let mut elsewhere = read(0, 1);
    elsewhere[4] = 2;
    assert_eq!(io.status(elsewhere).await, 0x400b);
    // The capsule is shorter than its descriptor says.
    assert_eq!(io.run(small_write(0), &[1; 512]).await.1.status, 0x400f);
    assert_eq!(admin.status(command(0x80, 0x5a, 0, [0; 3])).await, 0x4001);
    assert_eq!(
        admin
            .status(command(0x02, 0x5a, 512, [127 << 16 | 0x7f, 0, 0]))
            .await,
        0x4109
    );
    for _ in 0..4 {
        admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]).await;
    }
    assert_eq!(admin.status(command(0x0c, 0x5a, 0, [0; 3])).await, 0x4105);
}

#[tokio::test]
async fn a_read_only_export_refuses_writes_and_says_so() {
    let target = Target::start().await;
    let device = Arc::clone(&target.device) as Arc<dyn BlockDevice>;
    let opened = target.exports.open(
        ExportSpec {
            read_only: true,
            ..spec("ro")
        },
        device,
        None,
    );
    opened.unwrap();
    let admin = TestHost::connect(target.address, NONE, &login("ro")).await;
    let (mut admin, controller) = admin.ok().unwrap();
    admin.enable().await;
    let (page, _) = admin.run(command(0x06, 0x5a, 4096, [0, 0, 0]), &[]).await;
    assert_eq!(page[99] & 1, 1);
    let io = Login {
        controller,
        queue: 1,
        ..login("ro")
    };
    let (mut io, _) = TestHost::connect(target.address, NONE, &io)
        .await
        .ok()
        .unwrap();
    assert_eq!(
        io.run(small_write(0), &[1; BLOCK_BYTES]).await.1.status,
        0x4020
    );
    assert_eq!(io.status(command(0x08, 0x5a, 0, [0; 3])).await, 0x4020);
    assert_eq!(io.status(read(0, 1)).await, 0);
}

#[tokio::test]
async fn strangers_and_stale_identities_are_refused_each_in_its_way() {
    let target = Target::start().await;
    target.exports.remember_closed(&spec("old").name);
    assert_eq!(target.refused(&login("unknown")).await, BUSY);
    assert_eq!(target.refused(&login("old")).await, REFUSED);
    let other = Login {
        host: "nqn.2014-08.org:other".to_owned(),
        ..login("a")
    };
    assert_eq!(target.refused(&other).await, REFUSED);
    assert_eq!(
        target
            .refused(&Login {
                host_id: Uuid::from_u128(2),
                ..login("a")
            })
            .await,
        REFUSED
    );
    let no_such = Login {
        controller: 77,
        queue: 1,
        ..login("a")
    };
    assert_eq!(target.refused(&no_such).await, 0x4182);
    // A closed identity stays closed, whoever opens it.
    let opened = target.exports.open(spec("old"), Memory::new(), None);
    assert_eq!(opened, Err(OpenError::Closed(spec("old").name)));
    assert_eq!(target.refused(&login("old")).await, REFUSED);

    let (_admin, _io) = target.host(NONE).await;
    let again = Login {
        controller: 1,
        queue: 1,
        ..login("a")
    };
    assert_eq!(
        target.refused(&again).await,
        0x000c,
        "a queue is connected once"
    );
    assert_eq!(target.refused(&Login { queue: 17, ..again }).await, 0x4182);
    let metrics = target.metrics();
    assert!(
        metrics.contains(r#"refused_connects_total{reason="busy-or-unknown"} 1"#),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_resize_is_announced_once_until_it_is_read() {
    let target = Target::start().await;
    let (mut admin, _io) = target.host(NONE).await;
    admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]).await;
    admin.send(command(0x0c, 0x5a, 0, [0; 3]), &[]).await;
    assert_eq!(
        admin
            .status(command(0x09, 0x5a, 0, [0x0b, 1 << 8, 0]))
            .await,
        0
    );
    target
        .device
        .bytes
        .lock()
        .unwrap()
        .resize(2 * (BLOCKS * BLOCK) as usize, 0);
    target.exports.resized(&spec("a").volume);
    assert_eq!(
        admin.receive().await.unwrap().completion().result,
        0x0004_0002
    );
    target.exports.resized(&spec("a").volume);
    let (page, done) = admin.run(command(0x06, 0x5a, 4096, [0, 0, 0]), &[]).await;
    assert_eq!(done.status, 0, "no second event before the log was read");
    assert_eq!(wire::u64_at(&page, 0), 2 * BLOCKS);
    admin
        .run(command(0x02, 0x5a, 4096, [0x03ff_0000 | 0x04, 0, 0]), &[])
        .await;
    target.exports.resized(&spec("a").volume);
    assert_eq!(
        admin.receive().await.unwrap().completion().result,
        0x0004_0002
    );
}

#[tokio::test]
async fn a_silent_host_loses_its_association() {
    let target = Target::start().await;
    let login = Login {
        keep_alive: 1,
        ..login("a")
    };
    let (mut admin, _) = TestHost::connect(target.address, NONE, &login)
        .await
        .ok()
        .unwrap();
    assert!(admin.receive().await.is_none());
    // Without a timeout it would still be there.
    let (_admin, mut io) = target.host(NONE).await;
    assert_eq!(io.status(read(0, 1)).await, 0);
}

#[path = "fence_tests.rs"]
mod fence;
#[path = "malformed_tests.rs"]
mod malformed;
