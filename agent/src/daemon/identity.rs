//! Who this node is to targets: made at the first start, kept in the agent's
//! state folder, the same from then on.
//!
//! It is drover's own and not /etc/nvme/hostnqn: Linux 6.12 demands one host id
//! per host NQN, and the files of a cloned machine image are often equal.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, ensure};
use uuid::Uuid;

use crate::attach::ports::HostIdentity;

/// Reads the identity, or makes it.
///
/// # Errors
/// When the file cannot be read or written, or holds something else.
pub fn load(state_dir: &Path) -> anyhow::Result<HostIdentity> {
    let path = state_dir.join("host.json");
    let named = || format!("host identity {}", path.display());
    match fs::read(&path) {
        Ok(bytes) => {
            let host: HostIdentity = serde_json::from_slice(&bytes).with_context(named)?;
            ensure!(
                host.nqn.starts_with("nqn."),
                "{}: {:?} is no NQN",
                named(),
                host.nqn
            );
            Ok(host)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let id = Uuid::new_v4();
            let host = HostIdentity::of(format!("nqn.2014-08.org.nvmexpress:uuid:{id}"), id);
            let fresh = path.with_extension("new");
            let mut file = fs::File::create(&fresh).with_context(named)?;
            file.write_all(&serde_json::to_vec(&host)?)
                .with_context(named)?;
            file.sync_all().with_context(named)?;
            fs::rename(&fresh, &path).with_context(named)?;
            // Until its name is durable too, a crash would make the node another
            // host, whose attachments nobody knows.
            let folder = fs::File::open(state_dir).with_context(named)?;
            folder.sync_all().with_context(named)?;
            Ok(host)
        }
        Err(error) => Err(error).with_context(named),
    }
}

/// The kernel's id of this boot: which incarnation of the node this is.
///
/// # Errors
/// When procfs does not tell.
pub fn boot() -> anyhow::Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let id = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    Ok(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let first = load(folder.path()).unwrap();
        assert_eq!(load(folder.path()).unwrap(), first);
        fs::write(folder.path().join("host.json"), "{").unwrap();
        assert!(
            load(folder.path())
                .unwrap_err()
                .to_string()
                .contains("host.json")
        );
    }
}
