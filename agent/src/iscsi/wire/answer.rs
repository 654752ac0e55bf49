//! The headers that a target sends (RFC 7143, 11).

use super::{BHS, DIGEST, Digests, NO_TAG};

/// The numbers that each answer carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Numbers {
    /// This answer's status number, or the next one's where it has none.
    pub status: u32,
    /// The command number that is expected next.
    pub expected: u32,
    /// The highest command number that is taken.
    pub maximum: u32,
}

/// How much less, or more, was transferred than the initiator expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residual {
    /// As much as it expected.
    None,
    /// So many bytes less.
    Under(u32),
    /// It expected so many bytes too few.
    Over(u32),
}

impl Residual {
    /// What remains when `expected` bytes were and `wanted` would be transferred.
    pub fn of(expected: u32, wanted: u64) -> Self {
        let clamp = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
        match u64::from(expected) {
            equal if equal == wanted => Self::None,
            more if more > wanted => Self::Under(clamp(more - wanted)),
            less => Self::Over(clamp(wanted - less)),
        }
    }

    fn flags(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Under(_) => 0x02,
            Self::Over(_) => 0x04,
        }
    }

    fn count(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Under(bytes) | Self::Over(bytes) => bytes,
        }
    }
}

/// A header that a target sends, in the making.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer([u8; BHS]);

/// The status part of a login response: class and detail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoginAnswer {
    /// Agreed to leave the stage.
    pub transit: bool,
    /// The text goes on in the next response.
    pub goes_on: bool,
    /// The stage it is in.
    pub current: u8,
    /// The stage that is next, with `transit`.
    pub next: u8,
    /// The initiator's part of the session's id.
    pub isid: [u8; 6],
    /// The target's part.
    pub tsih: u16,
    /// The task tag.
    pub task: u32,
    /// Class in the upper byte, detail in the lower.
    pub status: u16,
}

/// A part of a read's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataIn {
    /// The last of its sequence.
    pub is_final: bool,
    /// The command's GOOD status comes with it.
    pub good: Option<Residual>,
    /// The task.
    pub task: u32,
    /// Its number within the command.
    pub number: u32,
    /// Where in the command's data it belongs.
    pub offset: u32,
    /// Its length, below 2^24.
    pub length: u32,
}

/// Asks for data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadyToTransfer {
    /// The LUN field of the command.
    pub lun: u64,
    /// The task.
    pub task: u32,
    /// What names this transfer.
    pub transfer: u32,
    /// Its number within the command.
    pub number: u32,
    /// Where in the command's data the wanted part begins.
    pub offset: u32,
    /// How long that part is.
    pub length: u32,
}

impl Answer {
    /// A header of nothing but the opcode and the F bit.
    fn new(opcode: u8) -> Self {
        let mut bytes = [0; BHS];
        bytes[0] = opcode;
        bytes[1] = 0x80;
        Self(bytes)
    }

    fn put(mut self, at: usize, word: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&word.to_be_bytes());
        self
    }

    fn flags(mut self, flags: u8) -> Self {
        self.0[1] = flags;
        self
    }

    fn byte(mut self, at: usize, byte: u8) -> Self {
        self.0[at] = byte;
        self
    }

    fn lun(mut self, lun: u64) -> Self {
        self.0[8..16].copy_from_slice(&lun.to_be_bytes());
        self
    }

    fn numbers(self, numbers: Numbers) -> Self {
        self.put(24, numbers.status)
            .put(28, numbers.expected)
            .put(32, numbers.maximum)
    }

    /// The same header, with the length of the data that follows it.
    pub fn data(mut self, length: usize) -> Self {
        let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        self.0[5..8].copy_from_slice(&length[1..]);
        self
    }

    /// Its bytes, with a digest behind them where headers have one.
    pub fn seal(&self, digests: Digests) -> ([u8; BHS + DIGEST], usize) {
        let mut sealed = [0; BHS + DIGEST];
        sealed[..BHS].copy_from_slice(&self.0);
        if !digests.header {
            return (sealed, BHS);
        }
        let digest = crc32c::crc32c(&self.0);
        sealed[BHS..].copy_from_slice(&digest.to_le_bytes());
        (sealed, BHS + DIGEST)
    }

    /// A ping's answer (its task tag), or a ping of the target's own (its
    /// transfer tag).
    pub fn nop_in(task: u32, transfer: u32, lun: u64, numbers: Numbers) -> Self {
        Self::new(0x20)
            .lun(lun)
            .put(16, task)
            .put(20, transfer)
            .numbers(numbers)
    }

    /// A command's end.
    pub fn scsi(task: u32, status: u8, residual: Residual, numbers: Numbers) -> Self {
        Self::new(0x21)
            .flags(0x80 | residual.flags())
            .byte(3, status)
            .put(16, task)
            .put(20, 0)
            .numbers(numbers)
            .put(44, residual.count())
    }

    /// How many data and R2T PDUs a command had, in its end.
    pub fn data_count(self, count: u32) -> Self {
        self.put(36, count)
    }

    /// A task management function's end.
    pub fn management(task: u32, response: u8, numbers: Numbers) -> Self {
        Self::new(0x22)
            .byte(2, response)
            .put(16, task)
            .numbers(numbers)
    }

    /// A step of the login.
    pub fn login(answer: &LoginAnswer, numbers: Numbers) -> Self {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        let flags = bit(answer.transit, 0x80) | bit(answer.goes_on, 0x40);
        let mut this = Self::new(0x23)
            .flags(flags | (answer.current & 3) << 2 | answer.next & 3)
            .put(16, answer.task)
            .numbers(numbers);
        this.0[8..14].copy_from_slice(&answer.isid);
        this.0[14..16].copy_from_slice(&answer.tsih.to_be_bytes());
        this.0[36..38].copy_from_slice(&answer.status.to_be_bytes());
        this
    }

    /// Text, which may go on in the next answer; `transfer` is [`NO_TAG`] when
    /// the exchange ends with it.
    pub fn text(task: u32, transfer: u32, goes_on: bool, lun: u64, numbers: Numbers) -> Self {
        let last = if transfer == NO_TAG { 0x80 } else { 0 };
        Self::new(0x24)
            .flags(last | if goes_on { 0x40 } else { 0 })
            .lun(lun)
            .put(16, task)
            .put(20, transfer)
            .numbers(numbers)
    }

    /// A part of a read's data.
    pub fn data_in(part: &DataIn, numbers: Numbers) -> Self {
        let residual = part.good.unwrap_or(Residual::None);
        let last = if part.is_final { 0x80 } else { 0 };
        let status = if part.good.is_some() { 0x01 } else { 0 };
        // Only a PDU with status has a status number.
        let numbers = Numbers {
            status: if part.good.is_some() {
                numbers.status
            } else {
                0
            },
            ..numbers
        };
        Self::new(0x25)
            .flags(last | residual.flags() | status)
            .put(16, part.task)
            .put(20, NO_TAG)
            .numbers(numbers)
            .put(36, part.number)
            .put(40, part.offset)
            .put(44, residual.count())
            .data(part.length as usize)
    }

    /// The answer to a logout: 0 when it closes the session.
    pub fn logout(task: u32, response: u8, numbers: Numbers) -> Self {
        Self::new(0x26)
            .byte(2, response)
            .put(16, task)
            .numbers(numbers)
    }

    /// Asks for data.
    pub fn ready_to_transfer(asked: &ReadyToTransfer, numbers: Numbers) -> Self {
        Self::new(0x31)
            .lun(asked.lun)
            .put(16, asked.task)
            .put(20, asked.transfer)
            .numbers(numbers)
            .put(36, asked.number)
            .put(40, asked.offset)
            .put(44, asked.length)
    }

    /// A SCSI event (0); its data is sense data, as of a command's end.
    pub fn scsi_event(lun: u64, numbers: Numbers) -> Self {
        Self::new(0x32).lun(lun).put(16, NO_TAG).numbers(numbers)
    }

    /// Refuses a PDU; its data is that PDU's header.
    pub fn reject(reason: u8, numbers: Numbers) -> Self {
        Self::new(0x3f)
            .byte(2, reason)
            .put(16, NO_TAG)
            .numbers(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: Numbers = Numbers {
        status: 0x0102_0304,
        expected: 5,
        maximum: 6,
    };

    #[test]
    fn residuals_are_exact() {
        assert_eq!(Residual::of(4096, 4096), Residual::None);
        assert_eq!(Residual::of(10_000, 4096), Residual::Under(5904));
        assert_eq!(Residual::of(200, 4096), Residual::Over(3896));
        assert_eq!(Residual::of(0, u64::MAX), Residual::Over(u32::MAX));
    }

    #[test]
    fn a_read_s_last_data_brings_its_status() {
        let part = DataIn {
            is_final: true,
            good: Some(Residual::Under(7)),
            task: 9,
            number: 1,
            offset: 4096,
            length: 0x01_0203,
        };
        let Answer(bytes) = Answer::data_in(&part, NUMBERS);
        assert_eq!(bytes[..2], [0x25, 0x83]);
        assert_eq!(bytes[5..8], [1, 2, 3]);
        assert_eq!(bytes[24..28], [1, 2, 3, 4]);
        assert_eq!(bytes[44..], [0, 0, 0, 7]);
        let more = DataIn { good: None, ..part };
        let Answer(bytes) = Answer::data_in(&more, NUMBERS);
        assert_eq!((bytes[1], &bytes[24..28]), (0x80, &[0; 4][..]));
    }

    #[test]
    fn a_header_s_digest_follows_it() {
        let answer = Answer::logout(1, 0, NUMBERS);
        let (bytes, length) = answer.seal(Digests::default());
        assert_eq!((bytes[0], length), (0x26, 48));
        let digests = Digests {
            header: true,
            data: false,
        };
        let (bytes, length) = answer.seal(digests);
        assert_eq!(length, 52);
        assert_eq!(bytes[48..], crc32c::crc32c(&bytes[..48]).to_le_bytes());
    }
}
