//! Who may pass a closed gate: the child that shuts the file system down.

use std::fs;
use std::io;
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use drover_ebpf::gate::Exempt;

use super::maps::Raw;

/// Lets this process through as long as it lives.
pub struct Pass {
    map: HashMap<MapData, u32, Raw<Exempt>>,
    pid: u32,
}

impl Pass {
    /// Enters this process in the map that is pinned at `pin`.
    pub fn take(pin: &Path) -> io::Result<Self> {
        let data = MapData::from_pin(pin).map_err(io::Error::other)?;
        let mut map: HashMap<MapData, u32, Raw<Exempt>> = Map::HashMap(data)
            .try_into()
            .map_err(|e: aya::maps::MapError| io::Error::other(e))?;
        let pid = std::process::id();
        let own = Raw(Exempt { began: began(pid)? });
        if map.insert(pid, own, 0).is_err() {
            // It may be full of children that were killed.
            let entries: Vec<_> = map.iter().flatten().collect();
            for (pid, entry) in entries {
                if !lives(pid, entry.0) {
                    // Whether there is room then, the insert below says.
                    let _ = map.remove(&pid);
                }
            }
            map.insert(pid, own, 0).map_err(io::Error::other)?;
        }
        Ok(Self { map, pid })
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        // What a killed child leaves is void with its pid and start, and swept.
        let _ = self.map.remove(&self.pid);
    }
}

/// Field 22 of /proc/PID/stat; fields are counted from the last bracket, since
/// the name before it may hold anything.
fn began(pid: u32) -> io::Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path)?;
    let field = text
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19)?.parse().ok());
    field.ok_or_else(|| io::Error::other(format!("{path} is not as proc(5) says")))
}

/// Whether the process of an entry lives. What cannot be read counts as living.
pub fn lives(pid: u32, exempt: Exempt) -> bool {
    match began(pid) {
        Ok(found) => found == exempt.began,
        Err(e) => e.kind() != io::ErrorKind::NotFound && e.raw_os_error() != Some(libc::ESRCH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_used_again_is_not_exempt() {
        let pid = std::process::id();
        let began = began(pid).unwrap();
        assert!(lives(pid, Exempt { began }));
        assert!(!lives(pid, Exempt { began: began + 1 }));
        assert!(!lives(u32::MAX, Exempt { began }));
    }
}
