//! What an export's hosts reserved, over a restart of the agent: a two-slot
//! file beside the volume's record, with the bytes of the export's protocol.
//!
//! The file is tagged with the export's name. Another export, of a newer epoch,
//! begins with nothing and never reads it; what it keeps replaces the file. So
//! a damaged one is an error that names it only while its own export is open,
//! and is gone with the next epoch. It is made when something is kept first.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use super::error::PoolError;
use super::slots::SlotFile;
use super::{Pool, VOLUMES};
use crate::ids::VolumeId;

const FILE: &str = "reservations";
const FRESH: &str = "reservations.new";

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    volume: VolumeId,
    /// The name of the export whose they are.
    export: String,
    /// The protocol's bytes, in base64; none: nothing is reserved.
    state: Option<String>,
}

/// Whose a volume's reservations are now.
#[derive(Debug, Default)]
pub(super) struct Holder(Mutex<Option<Held>>);

#[derive(Debug)]
struct Held {
    export: String,
    /// None: this export has kept nothing yet.
    file: Option<SlotFile<Kept>>,
}

impl Pool {
    /// Gives a volume's reservations to a new export, which has none. What
    /// another one kept is never read again.
    pub fn begin_reservations(&self, id: &VolumeId, export: &str) -> Result<(), PoolError> {
        let volume = self.volume(id)?;
        *volume.reservations.lock() = Some(Held {
            export: export.to_owned(),
            file: None,
        });
        Ok(())
    }

    /// Gives a volume's reservations to the export that is open again after a
    /// restart: what it kept before, if it did.
    ///
    /// # Errors
    /// The file is damaged: who reserved what is unknown. The volume is as it was.
    pub fn resume_reservations(
        &self,
        id: &VolumeId,
        export: &str,
    ) -> Result<Option<Vec<u8>>, PoolError> {
        let volume = self.volume(id)?;
        let mut holder = volume.reservations.lock();
        let relative = folder(id).join(FILE);
        let path = self.root.path(&relative);
        let damaged = |detail: String| PoolError::Damaged {
            path: path.clone(),
            detail,
        };
        let (mut file, mut state) = (None, None);
        if path.symlink_metadata().is_ok() {
            let (opened, kept) = SlotFile::<Kept>::open(&self.root, &relative)?;
            if kept.volume != *id {
                return Err(damaged(format!("it is of volume {}", kept.volume)));
            }
            if kept.export == export {
                let bytes = kept.state.map(|text| BASE64.decode(text)).transpose();
                state = bytes.map_err(|error| damaged(error.to_string()))?;
                file = Some(opened);
            }
        }
        *holder = Some(Held {
            export: export.to_owned(),
            file,
        });
        Ok(state)
    }

    /// Keeps an export's reservations; durable when this returns. None: there
    /// are none any more.
    ///
    /// # Errors
    /// They are another export's by now, or the disk's reason.
    pub fn keep_reservations(
        &self,
        id: &VolumeId,
        export: &str,
        state: Option<&[u8]>,
    ) -> Result<(), PoolError> {
        let volume = self.volume(id)?;
        let mut holder = volume.reservations.lock();
        let held = holder.as_mut().filter(|held| held.export == export);
        let held = held.ok_or_else(|| {
            PoolError::Conflict(format!(
                "volume {id}: the reservations of {export} ended with it"
            ))
        })?;
        let kept = Kept {
            volume: id.clone(),
            export: export.to_owned(),
            state: state.map(|bytes| BASE64.encode(bytes)),
        };
        match &mut held.file {
            Some(file) => file.put(&kept),
            None if state.is_none() => Ok(()),
            none => {
                *none = Some(self.make_reservations(id, &kept)?);
                Ok(())
            }
        }
    }

    /// Makes the file with its first content, in place of another export's.
    fn make_reservations(&self, id: &VolumeId, kept: &Kept) -> Result<SlotFile<Kept>, PoolError> {
        let (fresh, last) = (folder(id).join(FRESH), folder(id).join(FILE));
        let path = self.root.path(&fresh);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PoolError::call("remove", &path)(error));
            }
            _ => {}
        }
        SlotFile::create(&self.root, &fresh, kept)?;
        self.root.rename(&fresh, &last)?;
        Ok(SlotFile::open(&self.root, &last)?.0)
    }
}

impl Holder {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn folder(id: &VolumeId) -> PathBuf {
    Path::new(VOLUMES).join(id.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::ports::Content;
    use crate::ids::Bytes;
    use crate::pool::testing::{MIB, open};

    fn id() -> VolumeId {
        "vol-1".parse().unwrap()
    }

    fn made(folder: &Path) -> std::sync::Arc<Pool> {
        let pool = open(folder).unwrap();
        pool.create(&id(), Bytes(MIB), &Content::Empty).unwrap();
        pool
    }

    #[test]
    fn they_outlive_the_pools_owner_and_end_with_their_export() {
        let folder = tempfile::tempdir().unwrap();
        let pool = made(folder.path());
        pool.begin_reservations(&id(), "one").unwrap();
        pool.keep_reservations(&id(), "one", None).unwrap();
        let file = folder.path().join("volumes/vol-1/reservations");
        assert!(!file.exists(), "nothing was kept");
        pool.keep_reservations(&id(), "one", Some(b"a")).unwrap();
        pool.keep_reservations(&id(), "one", Some(b"ab")).unwrap();
        drop(pool);

        let pool = open(folder.path()).unwrap();
        let resumed = pool.resume_reservations(&id(), "one").unwrap();
        assert_eq!(resumed.as_deref(), Some(&b"ab"[..]));
        pool.keep_reservations(&id(), "one", Some(b"abc")).unwrap();

        // A new epoch.
        pool.begin_reservations(&id(), "two").unwrap();
        let late = pool.keep_reservations(&id(), "one", Some(b"late"));
        assert!(late.unwrap_err().to_string().contains("one"));
        drop(pool);
        let pool = open(folder.path()).unwrap();
        assert_eq!(pool.resume_reservations(&id(), "two").unwrap(), None);
        pool.keep_reservations(&id(), "two", Some(b"z")).unwrap();
        pool.keep_reservations(&id(), "two", None).unwrap();
        drop(pool);
        let pool = open(folder.path()).unwrap();
        assert_eq!(pool.resume_reservations(&id(), "two").unwrap(), None);
        assert_eq!(pool.resume_reservations(&id(), "one").unwrap(), None);
    }

    #[test]
    fn a_damaged_file_is_named_and_gone_with_the_next_export() {
        let folder = tempfile::tempdir().unwrap();
        let pool = made(folder.path());
        pool.begin_reservations(&id(), "one").unwrap();
        pool.keep_reservations(&id(), "one", Some(b"a")).unwrap();
        drop(pool);
        let file = folder.path().join("volumes/vol-1/reservations");
        let length = fs::metadata(&file).unwrap().len();
        fs::write(&file, vec![7; usize::try_from(length).unwrap()]).unwrap();

        let pool = open(folder.path()).unwrap();
        let error = pool.resume_reservations(&id(), "one").unwrap_err();
        assert!(
            error.to_string().contains("volumes/vol-1/reservations"),
            "{error}"
        );
        assert!(pool.volume(&id()).is_ok(), "the volume is not lost");
        assert!(pool.keep_reservations(&id(), "one", Some(b"b")).is_err());
        pool.begin_reservations(&id(), "two").unwrap();
        pool.keep_reservations(&id(), "two", Some(b"c")).unwrap();
        drop(pool);
        let pool = open(folder.path()).unwrap();
        let resumed = pool.resume_reservations(&id(), "two").unwrap();
        assert_eq!(resumed.as_deref(), Some(&b"c"[..]));
    }

    #[test]
    fn what_a_crash_left_half_made_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let pool = made(folder.path());
        fs::write(folder.path().join("volumes/vol-1/reservations.new"), "x").unwrap();
        pool.begin_reservations(&id(), "one").unwrap();
        pool.keep_reservations(&id(), "one", Some(b"a")).unwrap();
        let resumed = pool.resume_reservations(&id(), "one").unwrap();
        assert_eq!(resumed.as_deref(), Some(&b"a"[..]));
    }
}
