//! Ten thousand that knock and never come in, and one host that does.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Mutex, watch};

use super::device_for_tests::{Memory, metrics, reactors, until};
use super::host_for_tests::{Login, TestHost};
use super::initiator_for_tests::TestInitiator;
use super::*;
use crate::nvme_tcp::wire::{self, Digests, Kind};
use crate::reactor::HALF_OPEN;

const FLOOD: usize = 10_000;
/// So many come in each [`PACE`] at most. Who was turned away and does not close
/// keeps the other end's descriptor for a second more, this process has both
/// ends, and tests beside this one need descriptors as well.
const AT_ONCE: usize = 250;
const PACE: Duration = Duration::from_millis(100);
/// Where they come from: addresses of loopback, none of them the host's.
const SOURCES: usize = 4;
/// A host is in within this, whatever others hold open. They share two processors
/// with it, and with other tests.
const IN: Duration = Duration::from_secs(60);
/// Nobody of the flood goes by itself: who lets no host in before, lets none in.
const HANDSHAKE: Duration = Duration::from_secs(3600);

/// One flood at a time: this process has the other ends of it, too.
static ONE: Mutex<()> = Mutex::const_new(());

/// Lets this process have so many descriptors; root may raise the hard limit, too.
fn raise_limit() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let hard = hard.max(2 * FLOOD as u64);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("20000 descriptors");
}

/// Connects as number `number` of the flood and sends what it begins with.
async fn knock(address: SocketAddr, number: usize, hello: &[u8]) -> TcpStream {
    let last = u8::try_from(2 + number % SOURCES).unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    let source = IpAddr::V4(Ipv4Addr::new(127, 0, 0, last));
    socket.bind((source, 0).into()).unwrap();
    let mut stream = socket.connect(address).await.expect("a connection");
    // Nothing, a part of a first PDU, or all of it and nothing behind it. It
    // may have been closed already.
    let sent = [0, hello.len() / 2, hello.len()][number / SOURCES % 3];
    let _ = stream.write_all(&hello[..sent]).await;
    stream
}

/// Has a host come in again and again while the flood comes, and when all of it
/// is there: `evicted` says how many had to make room so far.
async fn withstands<F: Future<Output = ()>>(
    address: SocketAddr,
    hello: Vec<u8>,
    evicted: impl Fn() -> usize,
    come_in: impl Fn() -> F,
) {
    let _alone = ONE.lock().await;
    raise_limit();
    let (flooded, mut all) = watch::channel(None);
    let flood = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut held = Vec::with_capacity(FLOOD);
            for number in 0..FLOOD {
                if number % AT_ONCE == 0 {
                    tokio::time::sleep(PACE).await;
                }
                held.push(knock(address, number, &hello).await);
            }
            flooded.send_replace(Some(held.len()));
            // They hold on until the host has been served.
            flooded.closed().await;
            drop(held);
        });
    });
    let mut among = 0;
    while all.borrow_and_update().is_none() {
        let coming = tokio::time::timeout(IN, come_in());
        coming.await.expect("the host is in while others come");
        among += 1;
    }
    until(|| evicted() >= FLOOD - HALF_OPEN - 1).await;
    let mut times = Vec::new();
    for _ in 0..20 {
        let begun = Instant::now();
        tokio::time::timeout(IN, come_in())
            .await
            .expect("the host is in while others hold on");
        times.push(begun.elapsed());
    }
    drop(all);
    flood.join().unwrap();
    let longest = times.iter().max().unwrap();
    println!("{among} times in among them, and then within {longest:?}");
}

fn waits() -> Waits {
    Waits {
        handshake: HANDSHAKE,
        ..Waits::default()
    }
}

fn evicted(metrics: &str, protocol: &str) -> usize {
    let name = format!("drover_{protocol}_evicted_connections_total ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_half_open_connections_keep_no_nvme_host_out() {
    let exports = Exports::with(reactors(), waits());
    let device = Memory::new();
    let host = HostIdentity::of("nqn.2014-08.org:host", Uuid::from_u128(1));
    let spec = ExportSpec {
        protocol: Protocol::NvmeTcp,
        name: "nqn.2026-01.io.drover:test:a".to_owned(),
        proof: None,
        host: host.clone(),
        ..super::iscsi_tests::spec("a")
    };
    exports.open(spec.clone(), device, None).unwrap();
    let listener = super::listen(([127, 0, 0, 1], 0).into()).unwrap();
    let address = listener.local_addr().unwrap();
    let (_stop, stopped) = watch::channel(false);
    tokio::spawn(Arc::clone(&exports).serve(Protocol::NvmeTcp, listener, stopped));

    let none = Digests::default();
    let mut hello = [0; 128];
    hello[..8].copy_from_slice(&wire::common(Kind::IcReq, 0, none, 0));
    let login = Login {
        subsystem: spec.name,
        host: host.nqn,
        host_id: host.id,
        controller: 0xffff,
        queue: 0,
        keep_alive: 0,
    };
    let gone = || evicted(&metrics(&exports), "nvme");
    withstands(address, hello.to_vec(), gone, || async {
        let (mut admin, controller) = TestHost::connect(address, none, &login)
            .await
            .expect("Connect");
        admin.enable().await;
        let io = Login {
            controller,
            queue: 1,
            ..login.clone()
        };
        let io = TestHost::connect(address, none, &io).await;
        let flush = super::host_for_tests::command(0, 0x5a, 0, [0; 3]);
        assert_eq!(io.expect("Connect").0.status(flush).await, 0);
    })
    .await;
    until(|| metrics(&exports).contains("drover_nvme_connections 0\n")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_unfinished_logins_keep_no_initiator_out() {
    let target = super::iscsi_tests::Target::with(waits()).await;
    let mut hello = vec![0; 48];
    hello[0] = 0x43;
    hello[8] = 0x80;
    let login = target.login();
    let keys = format!(
        "InitiatorName={}\0TargetName={}\0AuthMethod=CHAP\0",
        login.initiator, target.spec.name
    );
    hello[7] = u8::try_from(keys.len()).unwrap();
    hello.extend_from_slice(keys.as_bytes());
    hello.resize(hello.len().next_multiple_of(4), 0);
    let gone = || evicted(&metrics(&target.exports), "iscsi");
    withstands(target.address, hello, gone, || async {
        let host = TestInitiator::connect(target.address, &login).await;
        let mut host = host.expect("a login");
        // The first command of a session that came again is told so.
        host.ready().await;
        assert_eq!(host.ready().await.1, 0);
    })
    .await;
    until(|| metrics(&target.exports).contains("drover_iscsi_connections 0\n")).await;
}
