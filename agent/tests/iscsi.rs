//! The iSCSI target over real sockets, by either engine, with the tools of QEMU and
//! of libiscsi as initiators.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use drover::block::BlockDevice;
use drover::block::file::FileDevice;
use drover::ids::Bytes;
use drover::iscsi::chap::Credentials;
use drover::iscsi::connection::{Iscsi, Shared};
use drover::iscsi::metrics::Metrics;
use drover::iscsi::scsi::inquiry::Identity;
use drover::iscsi::target::{Access, Directory, Found, Spec, Target};
use drover::iscsi::unit::Unit;
use drover::reactor::{Engine, POLL, Reactors, Settings};
use uuid::Uuid;

const TARGET: &str = "iqn.2026-11.io.drover:qemu";
const INITIATOR: &str = "iqn.2026-11.org.example:qemu";
const SECRET: &str = "a-secret-of-sixteen";
/// The data path with a ring, where the kernel has one, and with threads.
const ENGINES: [Option<Engine>; 2] = [None, Some(Engine::Threads)];
const SIZE: u64 = 16 << 20;

struct One(Arc<Target>);

impl Directory for One {
    fn find(&self, target: &str) -> Found {
        if target == self.0.name() {
            Found::Live(Arc::clone(&self.0))
        } else {
            Found::Unknown
        }
    }

    fn visible(&self, _initiator: &str) -> Vec<String> {
        vec![self.0.name().to_owned()]
    }
}

/// A target on a file of its own.
struct Served {
    folder: tempfile::TempDir,
    target: Arc<Target>,
    portal: SocketAddr,
}

impl Served {
    fn new(engine: Option<Engine>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("volume");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        let file = File::options().read(true).write(true).open(&path);
        let device = FileDevice::new(file.unwrap(), &path, Bytes(SIZE)).unwrap();
        let identity = Identity {
            uuid: Uuid::new_v4(),
            target: TARGET.to_owned(),
        };
        let device = Arc::new(device) as Arc<dyn BlockDevice>;
        let unit = Unit::new(device, identity, false, None).unwrap();
        let spec = Spec {
            name: TARGET.to_owned(),
            access: vec![Access {
                initiator: INITIATOR.to_owned(),
                incoming: Some(Credentials {
                    name: "qemu".to_owned(),
                    secret: SECRET.to_owned(),
                }),
                outgoing: None,
            }],
            max_sessions: 4,
        };
        let target = Target::new(spec, unit);
        let directory = Arc::new(One(Arc::clone(&target)));
        let shared = Shared::new(directory, Metrics::default());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let portal = listener.local_addr().unwrap();
        let reactors = Reactors::start(Settings {
            threads: 1,
            engine,
            poll: POLL,
            held: Vec::new(),
        });
        let reactors = reactors.unwrap();
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                let peer = socket.peer_addr().unwrap();
                let shared = Arc::clone(&shared);
                let protocol = Iscsi::new(shared, peer, portal, None, Instant::now());
                reactors.serve(socket, Box::new(protocol)).unwrap();
            }
        });
        Self {
            folder,
            target,
            portal,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The options by which QEMU finds the target.
    fn options(&self, digest: &str) -> String {
        format!(
            "driver=iscsi,transport=tcp,portal={},target={TARGET},lun=0,initiator-name={INITIATOR},\
             user=qemu,password-secret=chap,header-digest={digest}",
            self.portal
        )
    }
}

fn run(program: &str, words: &[&str]) -> String {
    let (done, said) = attempt(program, words);
    assert!(done, "{program} {words:?}: {said}");
    said
}

/// Runs one of QEMU's tools, which knows the secret. Whether it succeeded, and
/// what it said.
fn attempt(program: &str, words: &[&str]) -> (bool, String) {
    let secret = format!("secret,id=chap,data={SECRET}");
    let (verb, rest) = match program {
        "qemu-img" => words.split_at(1),
        _ => words.split_at(0),
    };
    let mut command = Command::new(program);
    outcome(command.args(verb).args(["--object", &secret]).args(rest))
}

fn outcome(command: &mut Command) -> (bool, String) {
    let output = command
        .output()
        .expect("the initiator's tools are installed");
    let said = String::from_utf8_lossy(&output.stdout);
    let wrong = String::from_utf8_lossy(&output.stderr);
    (output.status.success(), format!("{said}{wrong}"))
}

/// Runs one of libiscsi's tools on the unit, or on the portal.
fn libiscsi(served: &Served, tool: &str, words: &[&str], unit: bool) -> String {
    let place = if unit {
        format!("/{TARGET}/0")
    } else {
        String::new()
    };
    let url = format!("iscsi://qemu%{SECRET}@{}{place}", served.portal);
    let mut command = Command::new(tool);
    command.args(["-i", INITIATOR]).args(words).arg(url);
    let (done, said) = outcome(&mut command);
    assert!(done, "{tool} {words:?}: {said}");
    said
}

fn pattern(path: &Path) {
    let bytes: Vec<u8> = (0..SIZE / 8)
        .flat_map(|word| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
        .collect();
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_image_is_copied_in_and_compared() {
    for (engine, digest) in ENGINES.into_iter().zip(["none-crc32c", "crc32c"]) {
        let served = Served::new(engine);
        let image = served.path("image");
        pattern(&image);
        let image = image.to_str().unwrap();
        let options = served.options(digest);
        let convert = ["convert", "-n", "-f", "raw", "--target-image-opts", image];
        run("qemu-img", &[&convert[..], &[&options]].concat());
        let drained = fs::read(served.path("volume")).unwrap();
        assert!(
            drained == fs::read(image).unwrap(),
            "the file has the image"
        );
        let info = run("qemu-img", &["info", "--image-opts", &options]);
        assert!(info.contains("16 MiB"), "{info}");
    }
}

// Reads of 32 KiB and more of what it does not know to be allocated abort QEMU 7.2,
// if blocks are longer than 512 bytes: it asks itself for the status of 2 GiB - 512.
#[test]
fn writes_zeroes_discards_and_flushes_are_seen() {
    for engine in ENGINES {
        let served = Served::new(engine);
        let options = served.options("crc32c");
        let commands = [
            "write -P 0xab 0 2M",
            "write -z 64k 64k",
            "discard 1M 128k",
            "flush",
            "read -P 0xab 0 16k",
            "read -P 0 112k 16k",
            "read -P 0 1M 16k",
            "read -P 0xab 1152k 16k",
            "write -f -P 0xcd 3M 4k",
            "read -P 0xcd 3M 4k",
        ];
        let commands = commands.iter().flat_map(|one| ["-c", one]);
        let words: Vec<&str> = ["--image-opts"].into_iter().chain(commands).collect();
        let said = run("qemu-io", &[&words[..], &[&options]].concat());
        assert!(!said.contains("failed"), "{said}");
        let stored = fs::read(served.path("volume")).unwrap();
        assert_eq!(
            [stored[0], stored[64 << 10], stored[3 << 20]],
            [0xab, 0, 0xcd]
        );
        assert!(served.target.unit().last_write().is_some());
    }
}

/// QEMU asks by GET LBA STATUS, and copies only what is mapped.
#[test]
fn what_is_mapped_is_found_and_copied() {
    for engine in ENGINES {
        let served = Served::new(engine);
        let options = served.options("none");
        let write = [
            "--image-opts",
            "-c",
            "write -P 7 1M 1M",
            "-c",
            "write -P 8 9M 64k",
        ];
        run("qemu-io", &[&write[..], &[&options]].concat());
        let map = ["map", "--output", "json", "--image-opts"];
        let map = run("qemu-img", &[&map[..], &[&options]].concat());
        let runs: serde_json::Value = serde_json::from_str(&map).unwrap();
        let runs: Vec<_> = runs.as_array().unwrap().iter().collect();
        let told = runs.iter().map(|run| {
            let number = |key: &str| run[key].as_u64().unwrap() >> 10;
            (number("start"), number("length"), run["zero"] == false)
        });
        let expected = [
            (0, 1024, false),
            (1024, 1024, true),
            (2048, 7168, false),
            (9216, 64, true),
            (9280, 7104, false),
        ];
        assert_eq!(told.collect::<Vec<_>>(), expected, "{map}");
        let copy = served.path("copy");
        let convert = ["convert", "--image-opts", "-O", "raw", &options];
        run(
            "qemu-img",
            &[&convert[..], &[copy.to_str().unwrap()]].concat(),
        );
        assert!(fs::read(copy).unwrap() == fs::read(served.path("volume")).unwrap());
    }
}

#[test]
fn a_wrong_secret_is_refused() {
    let served = Served::new(None);
    let options = served.options("none");
    let mut command = Command::new("qemu-img");
    command.args(["info", "--object", "secret,id=chap,data=another"]);
    let (done, said) = outcome(command.args(["--image-opts", &options]));
    assert!(!done && said.to_lowercase().contains("auth"), "{said}");
}

#[test]
fn libiscsi_s_tools_find_the_unit_and_what_it_is() {
    for engine in ENGINES {
        let served = Served::new(engine);
        let listed = libiscsi(&served, "iscsi-ls", &["-s"], false);
        let target = format!("Target:{TARGET} Portal:{},1", served.portal);
        assert!(listed.contains(&target), "{listed}");
        assert!(listed.contains("Lun:0"), "{listed}");
        let standard = libiscsi(&served, "iscsi-inq", &[], true);
        assert!(standard.contains("Vendor:DROVER"), "{standard}");
        let pages = libiscsi(&served, "iscsi-inq", &["-e", "1", "-c", "0"], true);
        for page in ["0x00", "0x80", "0x83", "0xb0", "0xb1", "0xb2"] {
            assert!(pages.to_lowercase().contains(page), "{page}: {pages}");
        }
        let size = libiscsi(&served, "iscsi-readcapacity16", &["-s"], true);
        assert_eq!(size.trim(), SIZE.to_string());
    }
}

#[test]
fn libiscsi_s_tool_protects_the_unit_from_writes() {
    for engine in ENGINES {
        let served = Served::new(engine);
        let options = served.options("none");
        let write = ["--image-opts", "-c", "write -P 1 0 64k", &options];
        libiscsi(&served, "iscsi-swp", &["--swp", "on"], true);
        let (done, said) = attempt("qemu-io", &write);
        assert!(!done || said.contains("failed"), "{said}");
        libiscsi(&served, "iscsi-swp", &["--swp", "off"], true);
        let said = run("qemu-io", &write);
        assert!(said.contains("wrote 65536"), "{said}");
    }
}
