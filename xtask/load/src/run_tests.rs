//! Whole runs against the servers of this crate, over real sockets.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use clap::Parser;

use super::*;
use crate::inbox::Receiver;
use crate::raw::serve::{Engine, Served};
use crate::{pattern, serve};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

/// A server of any number of connections; it ends with the tests.
fn serving(serve: impl Fn(&TcpStream) -> Result<()> + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Arc::new(serve);
    thread::spawn(move || {
        for socket in listener.incoming().map_while(Result::ok) {
            let serve = Arc::clone(&serve);
            thread::spawn(move || serve(&socket));
        }
    });
    address
}

fn null<T: Receiver + Default>() -> SocketAddr {
    serving(|socket| serve::answer(&mut T::default(), socket))
}

/// A short run; a longer one where the machine is too busy for any command to
/// end in it.
fn load(wire: &str, address: SocketAddr, more: &str) -> Result<Report> {
    let attempt = |seconds: f64| {
        let line = format!(
            "load --wire {wire} --address {address} --target t --seconds {seconds} --warm-up 0.05 \
             {more}"
        );
        run(&Line::try_parse_from(line.split_whitespace())
            .unwrap()
            .arguments)
    };
    let starved = |error: &anyhow::Error| error.to_string().contains("no command ended");
    match attempt(0.2) {
        Err(error) if starved(&error) => attempt(20.0),
        outcome => outcome,
    }
}

/// Every mix and size that takes another way through a protocol: data with the
/// command, data that is asked for, data in several pieces.
fn every_way(wire: &str, address: SocketAddr, sessions: &str) {
    for mix in ["read", "write", "mixed"] {
        for size in [4096, 131_072, 1 << 20] {
            let more = format!("--mix {mix} --size {size} --depth 4 {sessions}");
            let report = load(wire, address, &more).unwrap_or_else(|e| panic!("{more}: {e:#}"));
            assert!(report.commands > 0 && report.iops > 0.0, "{more}");
            assert!(report.p50_us <= report.p99_us && report.p99_us <= report.p999_us);
        }
    }
}

#[test]
fn iscsi_against_the_null_target() {
    every_way("iscsi", null::<iscsi::null::NullTarget>(), "--sessions 2");
}

#[test]
fn nvme_against_the_null_target() {
    every_way(
        "nvme",
        null::<nvme::null::NullTarget>(),
        "--sessions 2 --queues 2",
    );
}

/// A file of 4 MiB in a folder, filled or not; it goes when dropped.
struct File(PathBuf);

impl File {
    fn new(folder: &str, name: &str, filled: bool) -> Self {
        let path = PathBuf::from(format!("{folder}/load-test-{name}-{}", std::process::id()));
        let bytes = if filled {
            pattern::filled(0, 4 << 20)
        } else {
            vec![0; 4 << 20]
        };
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn raw(file: &File, engine: Engine) -> SocketAddr {
    let served = Served::open(&file.0, engine).unwrap();
    serving(move |socket| served.serve(socket))
}

#[test]
fn raw_reads_and_writes_what_belongs_in_each_place() {
    for (engine, name) in [(Engine::Sync, "sync"), (Engine::Uring, "uring")] {
        let file = File::new("/dev/shm", name, true);
        every_way("raw", raw(&file, engine), "--sessions 2");
        let bytes = std::fs::read(&file.0).unwrap();
        assert_eq!(pattern::check(0, &bytes), Ok(()), "{name}");
        let written = bytes
            .chunks(4096)
            .any(|block| block[8..16] == pattern::FILLER.to_le_bytes());
        assert!(written, "{name} wrote nothing");
    }
}

#[test]
fn data_that_is_not_the_places_own_fails_the_run() {
    let file = File::new("/dev/shm", "wrong", false);
    let error = load("raw", raw(&file, Engine::Sync), "").unwrap_err();
    assert!(format!("{error:#}").contains("wrong data"), "{error:#}");
}

#[test]
fn a_size_that_is_no_whole_blocks_is_refused() {
    let address = null::<iscsi::null::NullTarget>();
    let error = load("iscsi", address, "--size 512").unwrap_err();
    assert!(error.to_string().contains("no whole blocks"), "{error:#}");
}

#[test]
fn a_host_identifier_is_read_with_or_without_hyphens() {
    let plain = host_id("0000000000004000800000000000000a").unwrap();
    assert_eq!(host_id("00000000-0000-4000-8000-00000000000a"), Ok(plain));
    assert_eq!((plain[6], plain[15]), (0x40, 0x0a));
    assert!(host_id("xyz").is_err());
}
