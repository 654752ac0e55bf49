//! The running kernel's own description of its types (BTF), as far as offsets need it.
//!
//! A pure reader over bytes (Documentation/bpf/btf.rst). It checks every length
//! before it uses it and refuses a kind it does not know, since it could not
//! tell where the next type begins.

use std::collections::HashMap;

/// Why the kernel's description could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The bytes are no BTF.
    #[error("BTF at byte {at}: {what}")]
    Malformed {
        /// Where.
        at: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// The kernel has no such structure, or it has no such member.
    #[error("the kernel's BTF has no {0}")]
    Missing(String),
}

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const ENUM64: u32 = 19;
/// Kinds whose only content is the type they refer to: typedef, volatile, const, restrict, type tag.
const TRANSPARENT: [u32; 5] = [8, 9, 10, 11, 18];

struct Kind {
    name: u32,
    info: u32,
    size_or_type: u32,
    /// Where the kind's own records begin.
    data: usize,
}

impl Kind {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn records(&self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Whether member offsets carry a bit-field's size in their upper byte.
    fn has_bitfields(&self) -> bool {
        self.info >> 31 == 1
    }
}

/// The types of a kernel.
pub struct Types<'a> {
    bytes: &'a [u8],
    strings: usize,
    /// By type id less one; id 0 is void.
    types: Vec<Kind>,
    /// Structures by name; a name can stand for several.
    structures: HashMap<&'a [u8], Vec<usize>>,
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map(u32::from_le_bytes)
        .ok_or(BtfError::Malformed {
            at,
            what: "ends in the middle of a type",
        })
}

impl<'a> Types<'a> {
    /// Reads the whole of `/sys/kernel/btf/vmlinux`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        const MAGIC: u32 = 0xeb9f;
        if word(bytes, 0)? & 0xffff != MAGIC {
            let what = "no BTF of this machine's byte order";
            return Err(BtfError::Malformed { at: 0, what });
        }
        let header = word(bytes, 4)? as usize;
        let begin = header.saturating_add(word(bytes, 8)? as usize);
        let end = begin.saturating_add(word(bytes, 12)? as usize);
        let strings = header.saturating_add(word(bytes, 16)? as usize);
        let mut this = Self {
            bytes,
            strings,
            types: Vec::new(),
            structures: HashMap::new(),
        };
        let mut at = begin;
        while at < end {
            let kind = Kind {
                name: word(bytes, at)?,
                info: word(bytes, at + 4)?,
                size_or_type: word(bytes, at + 8)?,
                data: at + 12,
            };
            at = kind.data
                + match kind.kind() {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    STRUCT | UNION | 15 | ENUM64 => 12 * kind.records(),
                    ENUM | FUNC_PROTO => 8 * kind.records(),
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => {
                        let what = "a kind of type that drover does not know";
                        return Err(BtfError::Malformed { at, what });
                    }
                };
            if kind.kind() == STRUCT {
                let name = this.string(kind.name);
                this.structures
                    .entry(name)
                    .or_default()
                    .push(this.types.len());
            }
            this.types.push(kind);
        }
        Ok(this)
    }

    fn string(&self, at: u32) -> &'a [u8] {
        let from = self.strings.saturating_add(at as usize);
        let text = self.bytes.get(from..).unwrap_or_default();
        text.split(|&b| b == 0).next().unwrap_or_default()
    }

    /// Follows typedefs and qualifiers to what they stand for.
    fn resolve(&self, mut id: u32) -> Option<&Kind> {
        // No real chain is this long; a circle in a broken file must end.
        for _ in 0..32 {
            let kind = self.types.get(id.checked_sub(1)? as usize)?;
            if !TRANSPARENT.contains(&kind.kind()) {
                return Some(kind);
            }
            id = kind.size_or_type;
        }
        None
    }

    /// The offset in bits of a member and its type, looked for in unnamed members too.
    fn member(&self, of: &Kind, name: &[u8], depth: u32) -> Option<(u32, u32)> {
        if depth == 0 || !matches!(of.kind(), STRUCT | UNION) {
            return None;
        }
        for i in 0..of.records() {
            let at = of.data + 12 * i;
            let member = self.string(word(self.bytes, at).ok()?);
            let id = word(self.bytes, at + 4).ok()?;
            let mut bits = word(self.bytes, at + 8).ok()?;
            if of.has_bitfields() {
                bits &= 0x00ff_ffff;
            }
            if member == name {
                return Some((bits, id));
            }
            if member.is_empty()
                && let Some(inner) = self.resolve(id)
                && let Some((more, id)) = self.member(inner, name, depth - 1)
            {
                return Some((bits + more, id));
            }
        }
        None
    }

    /// The offset in bytes of `path` in `structure`; a path with a dot goes
    /// into the member's own structure.
    pub fn offset(&self, structure: &str, path: &str) -> Result<u32, BtfError> {
        let found = self.structures.get(structure.as_bytes());
        for &index in found.into_iter().flatten() {
            let mut kind = Some(&self.types[index]);
            let mut bits = Some(0);
            for name in path.split('.') {
                let step = kind.and_then(|k| self.member(k, name.as_bytes(), 8));
                bits = bits.zip(step).map(|(sum, (more, _))| sum + more);
                kind = step.and_then(|(_, id)| self.resolve(id));
            }
            if let Some(bits) = bits {
                return Ok(bits / 8);
            }
        }
        Err(BtfError::Missing(format!("struct {structure}.{path}")))
    }

    /// How many parameters a function has; none: the kernel has no such function.
    pub fn parameters(&self, function: &str) -> Option<usize> {
        let is_it =
            |kind: &&Kind| kind.kind() == FUNC && self.string(kind.name) == function.as_bytes();
        let found = self.types.iter().find(is_it)?;
        let prototype = self
            .types
            .get(found.size_or_type.checked_sub(1)? as usize)?;
        (prototype.kind() == FUNC_PROTO).then(|| prototype.records())
    }

    /// The value of an enumerator, whatever its enumeration.
    pub fn enumerator(&self, name: &str) -> Result<u32, BtfError> {
        for kind in &self.types {
            let width = match kind.kind() {
                ENUM => 8,
                ENUM64 => 12,
                _ => continue,
            };
            for i in 0..kind.records() {
                let at = kind.data + width * i;
                if self.string(word(self.bytes, at)?) == name.as_bytes() {
                    return word(self.bytes, at + 4);
                }
            }
        }
        Err(BtfError::Missing(format!("enumerator {name}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Vec<u8> {
        std::fs::read("/sys/kernel/btf/vmlinux").expect("this kernel has BTF")
    }

    #[test]
    fn members_are_found_at_any_depth() {
        let bytes = kernel();
        let types = Types::parse(&bytes).unwrap();
        let iter = types.offset("bio", "bi_iter").unwrap();
        let size = types.offset("bvec_iter", "bi_size").unwrap();
        assert_eq!(types.offset("bio", "bi_iter.bi_size").unwrap(), iter + size);
        // In an unnamed union since long.
        assert!(types.offset("page", "mapping").is_ok());
    }

    #[test]
    fn what_is_not_there_is_named() {
        let bytes = kernel();
        let types = Types::parse(&bytes).unwrap();
        let error = types.offset("bio", "bi_nothing").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the kernel's BTF has no struct bio.bi_nothing"
        );
        assert!(types.enumerator("no_such_cgrp_id").is_err());
        assert_eq!(types.parameters("no_such_function"), None);
    }

    #[test]
    fn parameters_of_a_function_are_counted() {
        let bytes = kernel();
        let types = Types::parse(&bytes).unwrap();
        assert_eq!(types.parameters("vfs_read"), Some(4));
    }

    #[test]
    fn broken_bytes_are_refused_wherever_they_end() {
        let bytes = kernel();
        assert!(Types::parse(b"").is_err());
        assert!(Types::parse(&[0; 64]).is_err());
        for len in [4, 20, 24, 25, 40, 1000] {
            assert!(Types::parse(&bytes[..len]).is_err(), "{len} bytes");
        }
    }
}
