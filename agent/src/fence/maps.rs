//! The maps by which the programs are told whom to refuse.

use std::collections::HashSet;

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use drover_ebpf::gate::{Exempt, Gate, Hook, Node};

use super::{GateError, exempt};

/// Values of the shared types as they lie in a map.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Raw<T>(pub T);

macro_rules! plain {
    ($($type:ty),*) => {$(
        // SAFETY: #[repr(C)] of integers, valid for any bit pattern, without padding.
        unsafe impl aya::Pod for Raw<$type> {}
    )*};
}
plain!(Gate, Node, Exempt);

const GATES: &str = "GATES";
const NODES: &str = "NODES";
/// The map of those who may pass, and the name of its pin.
pub const EXEMPT: &str = "EXEMPT";
const ARMED: &str = "ARMED";
const REFUSED: &str = "REFUSED";

/// All of them.
pub struct Maps {
    gates: HashMap<MapData, u64, Raw<Gate>>,
    nodes: HashMap<MapData, Raw<Node>, u64>,
    exempt: HashMap<MapData, u32, Raw<Exempt>>,
    armed: Array<MapData, u32>,
    refused: PerCpuArray<MapData, u64>,
}

/// A map's error in words.
pub fn failed(map: &'static str, error: &MapError) -> GateError {
    let cause = std::error::Error::source(error).map(|e| format!(": {e}"));
    GateError::Map {
        map,
        why: format!("{error}{}", cause.unwrap_or_default()),
    }
}

fn take<T: TryFrom<Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, GateError> {
    let map = ebpf.take_map(name).ok_or_else(|| GateError::Map {
        map: name,
        why: "the object has no such map".to_owned(),
    })?;
    T::try_from(map).map_err(|e| failed(name, &e))
}

/// Removing what is not there is as good.
fn removed(map: &'static str, result: Result<(), MapError>) -> Result<(), GateError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.kind() == std::io::ErrorKind::NotFound => {
            Ok(())
        }
        Err(error) => Err(failed(map, &error)),
    }
}

impl Maps {
    /// Takes them out of a loaded object.
    pub fn take(ebpf: &mut Ebpf) -> Result<Self, GateError> {
        Ok(Self {
            gates: take(ebpf, GATES)?,
            nodes: take(ebpf, NODES)?,
            exempt: take(ebpf, EXEMPT)?,
            armed: take(ebpf, ARMED)?,
            refused: take(ebpf, REFUSED)?,
        })
    }

    /// Closes the gate of a disk: when this returns, every program refuses it.
    pub fn close(&mut self, diskseq: u64, gate: &Gate) -> Result<(), GateError> {
        self.gates
            .insert(diskseq, Raw(*gate), 0)
            .map_err(|e| failed(GATES, &e))?;
        self.arm(true)
    }

    fn arm(&mut self, armed: bool) -> Result<(), GateError> {
        self.armed
            .set(0, u32::from(armed), 0)
            .map_err(|e| failed(ARMED, &e))
    }

    /// Lets these device numbers lead to a disk.
    pub fn lead(&mut self, nodes: &[Node], diskseq: u64) -> Result<(), GateError> {
        for node in nodes {
            self.nodes
                .insert(Raw(*node), diskseq, 0)
                .map_err(|e| failed(NODES, &e))?;
        }
        Ok(())
    }

    /// Whether a disk is closed.
    pub fn is_closed(&self, diskseq: u64) -> Result<bool, GateError> {
        match self.gates.get(&diskseq, 0) {
            Ok(_) => Ok(true),
            Err(MapError::KeyNotFound) => Ok(false),
            Err(error) => Err(failed(GATES, &error)),
        }
    }

    /// Every closed disk.
    pub fn gates(&self) -> Result<Vec<(u64, Gate)>, GateError> {
        self.gates
            .iter()
            .map(|row| row.map(|(diskseq, gate)| (diskseq, gate.0)))
            .collect::<Result<_, _>>()
            .map_err(|e| failed(GATES, &e))
    }

    /// Forgets every disk but these, and processes that have ended.
    pub fn keep(&mut self, kept: &HashSet<u64>) -> Result<(), GateError> {
        // A device number is used again at once: it goes first.
        let nodes = self.nodes.iter().collect::<Result<Vec<_>, _>>();
        for (node, diskseq) in nodes.map_err(|e| failed(NODES, &e))? {
            if !kept.contains(&diskseq) {
                removed(NODES, self.nodes.remove(&node))?;
            }
        }
        for (diskseq, _) in self.gates()? {
            if !kept.contains(&diskseq) {
                removed(GATES, self.gates.remove(&diskseq))?;
            }
        }
        let exempt = self.exempt.iter().collect::<Result<Vec<_>, _>>();
        for (pid, value) in exempt.map_err(|e| failed(EXEMPT, &e))? {
            if !exempt::lives(pid, value.0) {
                removed(EXEMPT, self.exempt.remove(&pid))?;
            }
        }
        self.arm(!kept.is_empty())
    }

    /// How often each hook refused, over all CPUs.
    pub fn refused(&self) -> Result<Vec<(Hook, u64)>, GateError> {
        Hook::ALL
            .iter()
            .map(|hook| {
                let counts = self
                    .refused
                    .get(&(*hook as u32), 0)
                    .map_err(|e| failed(REFUSED, &e))?;
                Ok((*hook, counts.iter().sum()))
            })
            .collect()
    }
}
