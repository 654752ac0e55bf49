//! A real listener on loopback, driven by a small user-space initiator:
//! takeover, reset, fence and end over iSCSI.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::device_for_tests::{BLOCK_BYTES, BLOCKS, Memory, metrics, reactors, until};
use super::initiator_for_tests::{
    CHECK_CONDITION, GOOD, Login, RESERVATION_CONFLICT, TestInitiator, ten,
};
use super::*;
use crate::block::BLOCK;

const INITIATOR: &str = "iqn.2026-11.org.example:host-of-tests";
const OTHER: &str = "iqn.2026-11.org.example:other";
const AUTHENTICATION_FAILED: u16 = 0x0201;
const FORBIDDEN: u16 = 0x0202;
const NOT_FOUND: u16 = 0x0203;
const REMOVED: u16 = 0x0204;
const UNAVAILABLE: u16 = 0x0301;
const LOGICAL_UNIT_RESET: u8 = 5;

pub fn spec(name: &str) -> ExportSpec {
    let name = format!("iqn.2026-01.io.drover:test:{name}");
    let mut host = HostIdentity::of("nqn.2014-08.org:host", Uuid::from_u128(1));
    host.iqn = INITIATOR.to_owned();
    ExportSpec {
        volume: "vol-1".parse().unwrap(),
        epoch: Epoch(1),
        protocol: Protocol::Iscsi,
        proof: Some(Proof::Chap(Chap::fresh(INITIATOR, &name))),
        name,
        unit: Uuid::from_u128(7),
        host,
        read_only: false,
    }
}

/// What both sides of an export prove.
fn chap(spec: &ExportSpec) -> Option<Chap> {
    match &spec.proof {
        Some(Proof::Chap(chap)) => Some(chap.clone()),
        _ => None,
    }
}

pub struct Target {
    pub exports: Arc<Exports>,
    pub device: Arc<Memory>,
    pub address: SocketAddr,
    pub spec: ExportSpec,
    _stop: watch::Sender<bool>,
}

impl Drop for Target {
    fn drop(&mut self) {
        self.device.hold.close();
    }
}

impl Target {
    /// A target that serves export `a` of a device in memory.
    pub async fn start() -> Self {
        Self::with(Waits::default()).await
    }

    pub(super) async fn with(waits: Waits) -> Self {
        let exports = Exports::with(reactors(), waits);
        let (device, spec) = (Memory::new(), spec("a"));
        let served = Arc::clone(&device) as Arc<dyn BlockDevice>;
        exports.open(spec.clone(), served, None).unwrap();
        let listener = super::listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(Arc::clone(&exports).serve(Protocol::Iscsi, listener, stopped));
        Self {
            exports,
            device,
            address,
            spec,
            _stop: stop,
        }
    }

    pub fn login(&self) -> Login {
        Login {
            initiator: INITIATOR.to_owned(),
            target: Some(self.spec.name.clone()),
            chap: chap(&self.spec),
        }
    }

    async fn host(&self) -> TestInitiator {
        let host = TestInitiator::connect(self.address, &self.login()).await;
        let mut host = host.expect("a login");
        // The first command hears that the session is new to the unit.
        assert_eq!(host.ready().await.1, CHECK_CONDITION);
        host
    }

    async fn refused(&self, login: &Login) -> u16 {
        TestInitiator::connect(self.address, login)
            .await
            .expect_err("a refusal")
    }

    async fn discovers(&self, initiator: &str) -> Vec<String> {
        let login = Login {
            initiator: initiator.to_owned(),
            target: None,
            chap: None,
        };
        let host = TestInitiator::connect(self.address, &login).await;
        host.expect("a discovery session").targets().await
    }

    fn close(&self) -> Closing {
        self.exports.close(&self.spec.name).expect("a live export")
    }
}

#[tokio::test]
async fn an_initiator_finds_its_target_and_reads_and_writes() {
    let target = Target::start().await;
    assert_eq!(target.discovers(INITIATOR).await, [&*target.spec.name]);
    assert!(target.discovers(OTHER).await.is_empty(), "not its concern");
    let mut host = target.host().await;
    assert_eq!(host.write(5, 9).await, GOOD);
    assert_eq!(host.read(5, 1).await, (vec![9; BLOCK_BYTES], GOOD));
    let tag = host
        .command(&ten(0x2a, 8, 4), true, 4 * BLOCK_BYTES, &[])
        .await;
    let asked = host.receive().await.unwrap();
    host.send_data(&asked, &[3; 4 * BLOCK_BYTES]).await;
    assert_eq!(host.done(tag).await.1, GOOD);
    assert_eq!(host.read(8, 4).await, (vec![3; 4 * BLOCK_BYTES], GOOD));
    assert_eq!(host.run(&ten(0x35, 0, 0), false, 0).await.1, GOOD);
    assert_eq!(target.device.flushes.load(Ordering::SeqCst), 1);
    assert!(target.exports.last_write(&target.spec.volume).is_some());
    let metrics = metrics(&target.exports);
    assert!(metrics.contains("drover_iscsi_sessions 1"), "{metrics}");
    assert!(metrics.contains("drover_nvme_connections 0"), "{metrics}");
}

#[tokio::test]
async fn strangers_and_stale_identities_are_refused_each_in_its_way() {
    let target = Target::start().await;
    let old = spec("old");
    target.exports.remember_closed(&old.name);
    let to = |name: &str| Login {
        target: Some(name.to_owned()),
        ..target.login()
    };
    let unknown = to("iqn.2026-01.io.drover:unknown");
    assert_eq!(target.refused(&unknown).await, NOT_FOUND);
    assert_eq!(target.refused(&to(&old.name)).await, REMOVED);
    let other = Login {
        initiator: OTHER.to_owned(),
        ..target.login()
    };
    assert_eq!(target.refused(&other).await, FORBIDDEN);
    let nothing = Login {
        chap: None,
        ..target.login()
    };
    assert_eq!(target.refused(&nothing).await, AUTHENTICATION_FAILED);
    let wrong = Login {
        chap: chap(&spec("a")),
        ..target.login()
    };
    assert_eq!(target.refused(&wrong).await, AUTHENTICATION_FAILED);
    // A closed identity stays closed, whoever opens it.
    let opened = target.exports.open(old.clone(), Memory::new(), None);
    assert_eq!(opened, Err(OpenError::Closed(old.name.clone())));
    assert_eq!(target.refused(&to(&old.name)).await, REMOVED);
    let bare = ExportSpec {
        proof: None,
        ..spec("bare")
    };
    let opened = target.exports.open(bare.clone(), Memory::new(), None);
    assert_eq!(opened, Err(OpenError::NoSecrets(bare.name)));
}

#[tokio::test]
async fn a_new_session_waits_for_the_commands_of_the_old_one() {
    let target = Target::start().await;
    let mut old = target.host().await;
    target.device.block();
    old.begin_write(3, 1).await;
    target.device.until_waiting(1).await;

    assert_eq!(target.refused(&target.login()).await, UNAVAILABLE);
    assert!(old.receive().await.is_none(), "the old session has ended");
    assert_eq!(
        target.refused(&target.login()).await,
        UNAVAILABLE,
        "as long as it takes"
    );
    target.device.release();
    target.device.until_waiting(0).await;
    let mut new = target.host().await;
    assert_eq!(new.read(3, 1).await, (vec![1; BLOCK_BYTES], GOOD));
}

#[tokio::test]
async fn a_reset_is_answered_when_what_it_aborts_has_settled() {
    let target = Target::start().await;
    let mut host = target.host().await;
    target.device.block();
    host.begin_write(3, 1).await;
    target.device.until_waiting(1).await;
    let reset = host.manage(LOGICAL_UNIT_RESET).await;
    // Something else is answered meanwhile, and the reset is not.
    let probe = host.command(&[0; 6], false, 0, &[]).await;
    assert_eq!(host.done(probe).await.1, CHECK_CONDITION, "it was reset");
    target.device.release();
    let answer = host.receive().await.unwrap();
    assert_eq!((answer.opcode(), answer.tag()), (0x22, reset));
    assert_eq!(answer.header[2], 0, "function complete");
    assert_eq!(target.device.waiting.load(Ordering::SeqCst), 0);
    assert_eq!(host.read(3, 1).await.1, GOOD);
}

#[tokio::test]
async fn a_fence_keeps_out_settles_tells_and_ends() {
    let target = Target::start().await;
    let mut host = target.host().await;
    target.device.block();
    let inside = host.begin_write(3, 1).await;
    target.device.until_waiting(1).await;
    // This one's data is still to come: it is not inside, and will be late.
    let sending = host
        .command(&ten(0x2a, 0, 2), true, 2 * BLOCK_BYTES, &[])
        .await;
    let asked = host.receive().await.unwrap();

    let closing = target.close();
    assert_eq!(closing.inside_at_close, 1);
    assert_eq!(target.refused(&target.login()).await, REMOVED);
    assert!(target.discovers(INITIATOR).await.is_empty());
    assert_eq!(host.read(0, 1).await.1, RESERVATION_CONFLICT);
    assert_eq!(
        host.run(&ten(0x35, 0, 0), false, 0).await.1,
        RESERVATION_CONFLICT,
        "whatever it is"
    );
    assert_eq!(closing.settled(Duration::from_millis(5)).await, Err(1));
    assert_eq!(
        target.close().inside_at_close,
        1,
        "asked again, the same answer"
    );
    target.device.release();
    assert!(closing.settled(Duration::from_secs(20)).await.is_ok());
    assert_eq!(
        host.done(inside).await.1,
        GOOD,
        "it was written, so the initiator is told so"
    );
    host.send_data(&asked, &[2; 2 * BLOCK_BYTES]).await;
    assert_eq!(host.done(sending).await.1, RESERVATION_CONFLICT);
    assert_eq!(
        target.device.bytes.lock().unwrap()[0],
        0,
        "late data is not written"
    );

    let ended = closing.end().await;
    assert_eq!((ended.sessions, ended.late_refused), (1, 3));
    assert!(ended.last_write.is_some());
    for _ in 0..3 {
        assert_eq!(
            host.write(0, 1).await,
            RESERVATION_CONFLICT,
            "still told, not cut off"
        );
    }
    assert_eq!(target.refused(&target.login()).await, REMOVED);
    assert_eq!(target.exports.late_refused(&target.spec.name), 6);
    assert!(target.exports.close(&target.spec.name).is_none());
    let metrics = metrics(&target.exports);
    assert!(
        metrics.contains("drover_iscsi_late_commands_total 6"),
        "{metrics}"
    );
}

#[tokio::test]
async fn an_ended_session_stays_for_a_while_and_then_goes() {
    let target = Target::with(Waits {
        logout: Duration::from_millis(50),
        ..Waits::default()
    })
    .await;
    let mut host = target.host().await;
    target.close().end().await;
    assert!(host.receive().await.is_none(), "the connection closes");
    assert_eq!(target.refused(&target.login()).await, REMOVED);
}

#[tokio::test]
async fn the_end_answers_even_a_command_that_is_stuck_in_the_device() {
    let target = Target::start().await;
    let mut host = target.host().await;
    target.device.block();
    let stuck = host.begin_write(3, 1).await;
    target.device.until_waiting(1).await;
    let closing = target.close();
    assert_eq!(closing.settled(Duration::ZERO).await, Err(1));
    closing.end().await;
    assert_eq!(host.done(stuck).await.1, RESERVATION_CONFLICT);
    assert_eq!(host.read(0, 1).await.1, RESERVATION_CONFLICT);
}

#[tokio::test]
async fn a_stop_answers_nothing_that_is_final() {
    for _ in 0..20 {
        let target = Target::start().await;
        let mut host = target.host().await;
        for _ in 0..32 {
            host.begin_write(3, 1).await;
        }
        let side = target.exports.read().live[&target.spec.name].side.clone();
        let stop = std::thread::spawn(move || side.disconnect());
        while let Some(pdu) = host.receive().await {
            assert_eq!((pdu.opcode(), pdu.header[3]), (0x21, GOOD), "{pdu:?}");
            host.begin_write(3, 1).await;
        }
        stop.join().unwrap();
    }
}

#[tokio::test]
async fn a_resize_is_told_once() {
    let target = Target::start().await;
    let mut host = target.host().await;
    let size = 2 * (BLOCKS * BLOCK) as usize;
    target.device.bytes.lock().unwrap().resize(size, 0);
    target.exports.resized(&target.spec.volume);
    let event = host.receive().await.unwrap();
    assert_eq!((event.opcode(), event.header[36]), (0x32, 0), "SCSI event");
    let (sense, status) = host.ready().await;
    assert_eq!(status, CHECK_CONDITION);
    assert_eq!((sense[2] & 0xf, sense[12], sense[13]), (6, 0x2a, 0x09));
    assert_eq!(host.ready().await.1, GOOD);
    let (capacity, _) = host.run(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], false, 8).await;
    let last = u32::from_be_bytes(capacity[..4].try_into().unwrap());
    assert_eq!(u64::from(last), 2 * BLOCKS - 1);
}

#[tokio::test]
async fn reservations_go_on_where_they_were_kept() {
    struct Nobody;
    impl Keeper for Nobody {
        fn keep(&self, _: Option<&[u8]>) -> Result<(), String> {
            Err("there is no disk".into())
        }
    }
    let target = Target::start().await;
    let kept = |state: &str| Kept {
        keeper: Box::new(Nobody),
        state: Some(state.as_bytes().to_vec()),
    };
    let damaged = target
        .exports
        .open(spec("damaged"), Memory::new(), Some(kept("{")));
    assert!(
        matches!(&damaged, Err(OpenError::Reservations { name, .. }) if *name == spec("damaged").name),
        "{damaged:?}"
    );
    // Held by another initiator port: this one may not write.
    let other = r#"{"initiator":"iqn.o","isid":[0,0,0,0,0,1]}"#;
    let state = format!(
        r#"{{"registrants":[{{"nexus":{other},"key":5}}],
            "held":{{"kind":"WriteExclusive","holder":{other}}},"persists":true}}"#
    );
    let held = spec("held");
    let opened = target
        .exports
        .open(held.clone(), Memory::new(), Some(kept(&state)));
    opened.unwrap();
    let login = Login {
        initiator: INITIATOR.to_owned(),
        chap: chap(&held),
        target: Some(held.name),
    };
    let mut host = TestInitiator::connect(target.address, &login)
        .await
        .unwrap();
    assert_eq!(host.ready().await.1, CHECK_CONDITION, "it is new here");
    assert_eq!(host.write(0, 1).await, RESERVATION_CONFLICT);
    assert_eq!(host.read(0, 1).await.1, GOOD);
}

#[tokio::test]
async fn who_does_not_log_in_in_time_is_closed() {
    let target = Target::with(Waits {
        handshake: Duration::from_millis(50),
        ..Waits::default()
    })
    .await;
    let mut silent = TestInitiator::open(target.address).await;
    assert!(silent.receive().await.is_none());
    until(|| metrics(&target.exports).contains("drover_iscsi_connections 0")).await;
}
