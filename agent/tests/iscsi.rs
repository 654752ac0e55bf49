//! The iSCSI target over real sockets, with QEMU's tools as the initiator.

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
use drover::reactor::{Engine, Reactors, Settings};
use uuid::Uuid;

const TARGET: &str = "iqn.2026-11.io.drover:qemu";
const INITIATOR: &str = "iqn.2026-11.org.example:qemu";
const SECRET: &str = "a secret of sixteen";
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
    let secret = format!("secret,id=chap,data={SECRET}");
    let mut command = Command::new(program);
    let (verb, rest) = match program {
        "qemu-img" => words.split_at(1),
        _ => words.split_at(0),
    };
    command.args(verb).args(["--object", &secret]).args(rest);
    let output = command.output().expect("QEMU's tools are installed");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {words:?}: {said}{wrong}"
    );
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
    for (engine, digest) in [(None, "none-crc32c"), (Some(Engine::Threads), "crc32c")] {
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

// Reads of 32 KiB and more of what is not known to be allocated abort QEMU 7.2,
// if blocks are longer than 512 bytes: it asks for the status of 2 GiB - 512.
#[test]
fn writes_zeroes_discards_and_flushes_are_seen() {
    let served = Served::new(None);
    let options = served.options("crc32c");
    let said = run(
        "qemu-io",
        &[
            "--image-opts",
            "-c",
            "write -P 0xab 0 2M",
            "-c",
            "write -z 64k 64k",
            "-c",
            "discard 1M 128k",
            "-c",
            "flush",
            "-c",
            "read -P 0xab 0 16k",
            "-c",
            "read -P 0 112k 16k",
            "-c",
            "read -P 0 1M 16k",
            "-c",
            "read -P 0xab 1152k 16k",
            "-c",
            "write -f -P 0xcd 3M 4k",
            "-c",
            "read -P 0xcd 3M 4k",
            &options,
        ],
    );
    assert!(!said.contains("failed"), "{said}");
    let stored = fs::read(served.path("volume")).unwrap();
    assert_eq!(
        [stored[0], stored[64 << 10], stored[3 << 20]],
        [0xab, 0, 0xcd]
    );
    assert!(served.target.unit().last_write().is_some());
}

#[test]
fn a_wrong_secret_is_refused() {
    let served = Served::new(None);
    let options = served.options("none");
    let output = Command::new("qemu-img")
        .args([
            "info",
            "--object",
            "secret,id=chap,data=another",
            "--image-opts",
        ])
        .arg(options)
        .output()
        .expect("QEMU's tools are installed");
    assert!(!output.status.success());
    let wrong = String::from_utf8_lossy(&output.stderr);
    assert!(wrong.to_lowercase().contains("auth"), "{wrong}");
}
