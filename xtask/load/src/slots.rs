//! The commands in flight of one connection, by the number they go by on the wire.

use anyhow::{Context, Result, bail};

use crate::pattern;

/// One command for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Io {
    /// Whether it writes.
    pub write: bool,
    /// Where, in bytes.
    pub offset: u64,
    /// How much, in bytes.
    pub len: u32,
}

struct Active {
    io: Io,
    received: u32,
}

/// Commands in flight and those that ended since somebody looked.
pub struct Slots {
    active: Vec<Option<Active>>,
    done: Vec<u16>,
}

impl Slots {
    /// Room for `depth` commands, numbered from 0.
    pub fn new(depth: u16) -> Self {
        Self {
            active: (0..depth).map(|_| None).collect(),
            done: Vec::with_capacity(usize::from(depth)),
        }
    }

    /// A command is on its way.
    pub fn begin(&mut self, slot: u16, io: Io) {
        self.active[usize::from(slot)] = Some(Active { io, received: 0 });
    }

    /// The command that goes by this number.
    pub fn io(&self, slot: u16) -> Result<Io> {
        let active = self.active.get(usize::from(slot)).and_then(Option::as_ref);
        let active = active
            .with_context(|| format!("an answer to command {slot}, which is not in flight"))?;
        Ok(active.io)
    }

    /// Takes a piece of what a read asked for, and checks what it says. Pieces
    /// must come in order, as each of the wires promises.
    pub fn data(&mut self, slot: u16, at: u32, piece: &[u8]) -> Result<()> {
        let io = self.io(slot)?;
        let Some(Some(active)) = self.active.get_mut(usize::from(slot)) else {
            bail!("no command {slot}");
        };
        let len = u32::try_from(piece.len())?;
        if io.write || at != active.received || len > io.len - at {
            bail!(
                "{len} bytes of data at {at} of {io:?}, {} expected next",
                active.received
            );
        }
        active.received += len;
        let offset = io.offset + u64::from(at);
        if let Err((block, word)) = pattern::check(offset, piece) {
            bail!(
                "the block at {block} begins with {word:#018x}, not with {:#018x}: wrong data, or \
                 a file that `load fill` did not write",
                pattern::stamp(block)
            );
        }
        Ok(())
    }

    /// A command ended well.
    pub fn end(&mut self, slot: u16) -> Result<()> {
        let io = self.io(slot)?;
        let active = self.active[usize::from(slot)].take();
        let received = active.map_or(0, |active| active.received);
        if !io.write && received != io.len {
            bail!("{io:?} was answered with {received} bytes");
        }
        self.done.push(slot);
        Ok(())
    }

    /// The numbers of commands that ended, to be taken out.
    pub fn done(&mut self) -> &mut Vec<u16> {
        &mut self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_must_bring_all_its_bytes_in_order_and_the_right_ones() {
        let io = Io {
            write: false,
            offset: 8192,
            len: 8192,
        };
        let bytes = pattern::filled(8192, 8192);
        let begun = || {
            let mut slots = Slots::new(2);
            slots.begin(1, io);
            slots
        };
        let mut slots = begun();
        slots.data(1, 0, &bytes[..5000]).unwrap();
        assert!(slots.data(1, 0, &bytes[..10]).is_err(), "twice");
        slots.data(1, 5000, &bytes[5000..]).unwrap();
        slots.end(1).unwrap();
        assert_eq!(slots.done(), &[1]);
        assert!(slots.end(1).is_err(), "ended twice");
        assert!(begun().end(1).is_err(), "short");
        assert!(begun().data(0, 0, &bytes).is_err(), "not in flight");
        assert!(begun().data(1, 0, &[0; 8192]).is_err(), "other data");
        assert!(begun().data(1, 0, &[1; 8193]).is_err(), "too much");
    }

    #[test]
    fn a_write_is_answered_without_data() {
        let mut slots = Slots::new(1);
        let io = Io {
            write: true,
            offset: 0,
            len: 4096,
        };
        slots.begin(0, io);
        assert!(slots.data(0, 0, &pattern::filled(0, 4096)).is_err());
        slots.end(0).unwrap();
    }
}
