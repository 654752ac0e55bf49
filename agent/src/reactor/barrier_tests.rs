//! The exit barrier: a write that a killed process had in the kernel's hands
//! lands before a successor owns the pool.
//!
//! The pool's XFS is on a loop device whose backing file system can be frozen,
//! so that the write waits in the block layer, below everything of drover's.

use std::fs::TryLockError;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use super::*;
use crate::ids::VolumeId;
use crate::pool::testing::{Mounted, node};
use crate::pool::{Pool, PoolConfig, PoolError};

/// Names the pool and the engine to a child that is this test binary again.
const POOL: &str = "DROVER_TEST_BARRIER_POOL";
const ENGINE: &str = "DROVER_TEST_BARRIER_ENGINE";
const MIB: u64 = 1 << 20;

fn volume(id: &str) -> VolumeId {
    id.parse().unwrap()
}

fn pool(dir: &std::path::Path, wait: Duration) -> Result<Arc<Pool>, PoolError> {
    let config = PoolConfig {
        lock_wait: wait,
        ..crate::pool::testing::config()
    };
    Pool::open(dir, &node("a"), config)
}

/// Not a test by itself: the process that is killed.
#[test]
fn serves_a_pool_until_it_is_killed() {
    let Ok(dir) = std::env::var(POOL) else {
        return;
    };
    let engine = match std::env::var(ENGINE).as_deref() {
        Ok("Uring") => Engine::Uring,
        _ => Engine::Threads,
    };
    let pool = pool(dir.as_ref(), Duration::from_secs(20)).unwrap();
    let open: crate::pool::device::OpenBacking =
        Arc::new(|file, path, size| Ok(Arc::new(FileDevice::new(file, path, size)?) as Arc<_>));
    let device = pool.device(&volume("vol-1"), &open).unwrap();
    let lock = pool.lock().file().try_clone().unwrap();
    let bench = Bench::holding(engine, device, vec![lock.into()]);
    println!("\nserving {}", bench.listener.local_addr().unwrap());
    let _served = bench.accept(None);
    std::thread::sleep(Duration::from_secs(120));
}

struct Victim(Child);

impl Victim {
    fn start(dir: &std::path::Path, engine: Engine) -> (Self, TcpStream) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "--nocapture",
                "reactor::tests::barrier::serves_a_pool_until_it_is_killed",
            ])
            .env(POOL, dir)
            .env(ENGINE, format!("{engine:?}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let victim = Self(child);
        let address = output
            .lines()
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("serving ").map(str::to_owned))
            .expect("the child serves");
        let host = TcpStream::connect(address).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        (victim, host)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // It has been killed and collected already, when all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn write(host: &mut TcpStream, lba: u32, fill: u8) {
    host.write_all(&request(WRITE, lba, 1)).unwrap();
    host.write_all(&[fill; BLOCK as usize]).unwrap();
}

#[test]
fn a_successor_owns_the_pool_only_when_the_dead_one_s_last_write_has_landed() {
    for engine in engines() {
        let below = Mounted::ext4();
        let disk = Mounted::xfs_in(&below.dir());
        let dir = disk.pool();
        std::fs::create_dir(&dir).unwrap();
        let pool = {
            let made = self::pool(&dir, Duration::from_secs(20)).unwrap();
            made.create(
                &volume("vol-1"),
                crate::ids::Bytes(MIB),
                &crate::attach::ports::Content::Empty,
            )
            .unwrap();
            let path = made.volume_path(&volume("vol-1")).unwrap();
            drop(made);
            path
        };
        let (mut victim, mut host) = Victim::start(&dir, engine);
        write(&mut host, 1, 1);
        assert_eq!(answer(&mut host, 1), [1]);

        let frozen = below.freeze();
        write(&mut host, 1, 2);
        until(|| disk.in_flight() > 0);
        victim.0.kill().unwrap();
        // Looked at by hand: an open pool would be written to, and that waits too.
        let lock = std::fs::File::open(dir.join("lock")).unwrap();
        std::thread::sleep(Duration::from_secs(2));
        assert!(
            matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
            "{engine:?}: the pool is the dead one's until its write has landed"
        );
        drop(lock);
        drop(frozen);
        let successor = self::pool(&dir, Duration::from_secs(30)).unwrap();
        victim.0.wait().unwrap();
        // What the successor finds is what it keeps: nothing lands any more.
        let bytes = std::fs::read(&pool).unwrap();
        assert!(
            bytes[BLOCK as usize..2 * BLOCK as usize]
                .iter()
                .all(|byte| *byte == 2),
            "{engine:?}: the write had landed"
        );
        drop(successor);
    }
}
