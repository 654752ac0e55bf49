//! Status and sense data: how a command ended, and why (SPC-4, 4.5; SAM-5, 5.3).

/// A command's status (SAM-5, 5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It did what it was to do.
    Good,
    /// It did not; sense data says why.
    CheckCondition,
    /// Somebody else's reservation, or a fence, keeps it out.
    ReservationConflict,
    /// There is no room for it now.
    TaskSetFull,
}

impl Status {
    /// Its code on the wire.
    pub fn code(self) -> u8 {
        match self {
            Self::Good => 0x00,
            Self::CheckCondition => 0x02,
            Self::ReservationConflict => 0x18,
            Self::TaskSetFull => 0x28,
        }
    }

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::CheckCondition => "check-condition",
            Self::ReservationConflict => "reservation-conflict",
            Self::TaskSetFull => "task-set-full",
        }
    }
}

/// The longest sense data that is made here, in bytes.
pub const LONGEST: usize = 8 + 12 + 8;

/// Why a command ended with CHECK CONDITION.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sense {
    key: u8,
    asc: u8,
    ascq: u8,
    /// The byte that is wrong, and whether it is the CDB's or the parameter list's.
    field: Option<(u16, bool)>,
    information: Option<u64>,
}

impl Sense {
    /// Nothing is wrong: the answer to REQUEST SENSE.
    pub const NONE: Self = Self::new(0x0, 0x00, 0x00);
    /// The medium, or what is beneath, failed on reading.
    pub const READ_ERROR: Self = Self::new(0x3, 0x11, 0x00);
    /// The medium, or what is beneath, failed on writing.
    pub const WRITE_ERROR: Self = Self::new(0x3, 0x0c, 0x00);
    /// A flush failed once: nothing later can be promised.
    pub const TARGET_FAILURE: Self = Self::new(0x4, 0x44, 0x00);
    /// The pool has no room (SBC-3, 4.7.3.6: the resource may come back).
    pub const SPACE_ALLOCATION: Self = Self::new(0x7, 0x27, 0x07);
    /// The data to be written was longer than the command said that it would be.
    pub const DATA_LENGTH: Self = Self::new(0x5, 0x0e, 0x03);
    /// Data came that nobody had asked for.
    pub const UNEXPECTED_DATA: Self = Self::new(0xb, 0x0c, 0x0c);
    /// Data was missing, or out of order.
    pub const INCORRECT_DATA: Self = Self::new(0xb, 0x0c, 0x0d);
    /// There is no such command.
    pub const OPCODE: Self = Self::new(0x5, 0x20, 0x00);
    /// Blocks beyond the end.
    pub const LBA_RANGE: Self = Self::new(0x5, 0x21, 0x00);
    /// There is no such logical unit.
    pub const NO_UNIT: Self = Self::new(0x5, 0x25, 0x00);
    /// A parameter list of the wrong length.
    pub const LIST_LENGTH: Self = Self::new(0x5, 0x1a, 0x00);
    /// A release of a persistent reservation that does not fit it.
    pub const INVALID_RELEASE: Self = Self::new(0x5, 0x26, 0x04);
    /// No room for one more registration.
    pub const REGISTRATION_RESOURCES: Self = Self::new(0x5, 0x55, 0x04);
    /// Mode parameters are not saved.
    pub const SAVING: Self = Self::new(0x5, 0x39, 0x00);
    /// A task attribute that is not taken (SAM-5, 8.6).
    pub const ATTRIBUTE: Self = Self::new(0x5, 0x49, 0x00);
    /// The export is read-only.
    pub const WRITE_PROTECTED: Self = Self::new(0x7, 0x27, 0x01);
    /// The control mode page's SWP bit is set.
    pub const SOFTWARE_WRITE_PROTECTED: Self = Self::new(0x7, 0x27, 0x02);
    /// Unit attention: the unit began anew; it knows nothing of before.
    pub const POWER_ON: Self = Self::new(0x6, 0x29, 0x00);
    /// Unit attention: a logical unit reset.
    pub const RESET: Self = Self::new(0x6, 0x29, 0x03);
    /// Unit attention: the session before was lost.
    pub const NEXUS_LOST: Self = Self::new(0x6, 0x29, 0x07);
    /// Unit attention: another initiator changed mode parameters.
    pub const MODE_CHANGED: Self = Self::new(0x6, 0x2a, 0x01);
    /// Unit attention: a reservation was preempted.
    pub const RESERVATIONS_PREEMPTED: Self = Self::new(0x6, 0x2a, 0x03);
    /// Unit attention: a reservation was released.
    pub const RESERVATIONS_RELEASED: Self = Self::new(0x6, 0x2a, 0x04);
    /// Unit attention: a registration was preempted.
    pub const REGISTRATIONS_PREEMPTED: Self = Self::new(0x6, 0x2a, 0x05);
    /// Unit attention: the size has changed.
    pub const CAPACITY_CHANGED: Self = Self::new(0x6, 0x2a, 0x09);
    /// Unit attention: another initiator aborted commands.
    pub const COMMANDS_CLEARED: Self = Self::new(0x6, 0x2f, 0x00);

    const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Self {
            key,
            asc,
            ascq,
            field: None,
            information: None,
        }
    }

    /// A value that the CDB may not have, at this byte of it.
    pub const fn cdb(byte: u16) -> Self {
        Self {
            field: Some((byte, true)),
            ..Self::new(0x5, 0x24, 0x00)
        }
    }

    /// A value that the parameter list may not have, at this byte of it.
    pub const fn parameter(byte: u16) -> Self {
        Self {
            field: Some((byte, false)),
            ..Self::new(0x5, 0x26, 0x00)
        }
    }

    /// What was to be compared differs, first at this byte.
    pub const fn miscompare(at: u64) -> Self {
        Self {
            information: Some(at),
            ..Self::new(0xe, 0x1d, 0x00)
        }
    }

    /// Key, additional code and its qualifier.
    pub fn code(&self) -> (u8, u8, u8) {
        (self.key, self.asc, self.ascq)
    }

    /// Its bytes, in descriptor or in fixed format, and how many they are.
    pub fn encode(&self, descriptor: bool) -> ([u8; LONGEST], usize) {
        if descriptor {
            self.descriptors()
        } else {
            (self.fixed(), 18)
        }
    }

    /// SPC-4, 4.5.3.
    fn fixed(&self) -> [u8; LONGEST] {
        let mut bytes = [0; LONGEST];
        bytes[0] = 0x70;
        bytes[2] = self.key;
        bytes[7] = 10;
        bytes[12] = self.asc;
        bytes[13] = self.ascq;
        if let Some(information) = self.information.and_then(|at| u32::try_from(at).ok()) {
            bytes[0] |= 0x80;
            bytes[3..7].copy_from_slice(&information.to_be_bytes());
        }
        if let Some(specific) = self.specific() {
            bytes[15..18].copy_from_slice(&specific);
        }
        bytes
    }

    /// SPC-4, 4.5.2.
    fn descriptors(&self) -> ([u8; LONGEST], usize) {
        let mut bytes = [0; LONGEST];
        let mut end = 8;
        bytes[..4].copy_from_slice(&[0x72, self.key, self.asc, self.ascq]);
        if let Some(information) = self.information {
            bytes[end..end + 3].copy_from_slice(&[0x00, 0x0a, 0x80]);
            bytes[end + 4..end + 12].copy_from_slice(&information.to_be_bytes());
            end += 12;
        }
        if let Some(specific) = self.specific() {
            bytes[end..end + 2].copy_from_slice(&[0x02, 0x06]);
            bytes[end + 4..end + 7].copy_from_slice(&specific);
            end += 8;
        }
        bytes[7] = u8::try_from(end - 8).unwrap_or_default();
        (bytes, end)
    }

    /// The sense key specific field: which byte is wrong (SPC-4, 4.5.2.4.2).
    fn specific(&self) -> Option<[u8; 3]> {
        let (byte, in_cdb) = self.field?;
        let [high, low] = byte.to_be_bytes();
        Some([if in_cdb { 0xc0 } else { 0x80 }, high, low])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_sense_says_which_byte_of_the_cdb_is_wrong() {
        let (bytes, length) = Sense::cdb(2).encode(false);
        assert_eq!(length, 18);
        assert_eq!(
            bytes[..18],
            [
                0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 0, 2
            ]
        );
    }

    #[test]
    fn descriptor_sense_says_where_data_differs() {
        let (bytes, length) = Sense::miscompare(513).encode(true);
        assert_eq!(length, 20);
        assert_eq!(bytes[..8], [0x72, 0xe, 0x1d, 0, 0, 0, 0, 12]);
        assert_eq!(bytes[8..20], [0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 2, 1]);
        let (bytes, _) = Sense::miscompare(513).encode(false);
        assert_eq!((bytes[0], &bytes[3..7]), (0xf0, &[0, 0, 2, 1][..]));
    }

    #[test]
    fn a_wrong_parameter_is_told_from_a_wrong_cdb() {
        let (bytes, length) = Sense::parameter(7).encode(true);
        assert_eq!((length, bytes[7]), (16, 8));
        assert_eq!(bytes[8..16], [2, 6, 0, 0, 0x80, 0, 7, 0]);
    }
}
