//! The commands that there are, and the bits of each that may be set.
//!
//! One table serves both for taking commands and for telling an initiator
//! what is taken (REPORT SUPPORTED OPERATION CODES; SPC-4, 6.35), so the two
//! cannot differ.

use super::sense::Sense;

/// A command's kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "each is the standard's name of a command")]
pub enum Kind {
    TestUnitReady,
    RequestSense,
    Read,
    Write,
    Inquiry,
    ModeSelect,
    Reserve,
    Release,
    ModeSense,
    StartStopUnit,
    ReadCapacity10,
    ReadCapacity16,
    WriteAndVerify,
    Verify,
    PreFetch,
    SynchronizeCache,
    WriteSame,
    Unmap,
    PersistentReserveIn,
    PersistentReserveOut,
    OrWrite,
    CompareAndWrite,
    GetLbaStatus,
    ReportLuns,
    ReportSupportedOpcodes,
}

impl Kind {
    /// How many kinds there are.
    pub const COUNT: usize = Self::ReportSupportedOpcodes as usize + 1;

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TestUnitReady => "test-unit-ready",
            Self::RequestSense => "request-sense",
            Self::Read => "read",
            Self::Write => "write",
            Self::Inquiry => "inquiry",
            Self::ModeSelect => "mode-select",
            Self::Reserve => "reserve",
            Self::Release => "release",
            Self::ModeSense => "mode-sense",
            Self::StartStopUnit => "start-stop-unit",
            Self::ReadCapacity10 | Self::ReadCapacity16 => "read-capacity",
            Self::WriteAndVerify => "write-and-verify",
            Self::Verify => "verify",
            Self::PreFetch => "pre-fetch",
            Self::SynchronizeCache => "synchronize-cache",
            Self::WriteSame => "write-same",
            Self::Unmap => "unmap",
            Self::PersistentReserveIn => "persistent-reserve-in",
            Self::PersistentReserveOut => "persistent-reserve-out",
            Self::OrWrite => "orwrite",
            Self::CompareAndWrite => "compare-and-write",
            Self::GetLbaStatus => "get-lba-status",
            Self::ReportLuns => "report-luns",
            Self::ReportSupportedOpcodes => "report-supported-opcodes",
        }
    }
}

/// One command, by opcode and, where it has one, service action.
#[derive(Debug)]
pub struct Form {
    /// What it is.
    pub kind: Kind,
    /// The service action, in the lower five bits of byte 1.
    pub action: Option<u8>,
    /// The opcode, and for each further byte the bits that may be set.
    pub usage: &'static [u8],
}

const fn plain(kind: Kind, usage: &'static [u8]) -> Form {
    Form {
        kind,
        action: None,
        usage,
    }
}

const fn action(kind: Kind, action: u8, usage: &'static [u8]) -> Form {
    Form {
        kind,
        action: Some(action),
        usage,
    }
}

const A: u8 = 0xff;
/// A group number, which is taken and tells nothing (SBC-3, 4.22).
const G: u8 = 0x1f;

/// All commands. DPO and FUA (byte 1, 10h and 08h) are taken, as the mode
/// parameter header's DPOFUA bit says; protection information is not.
#[rustfmt::skip]
pub const FORMS: &[Form] = &[
    plain(Kind::TestUnitReady,         &[0x00, 0, 0, 0, 0, 0]),
    plain(Kind::RequestSense,          &[0x03, 0x01, 0, 0, A, 0]),
    plain(Kind::Read,                  &[0x08, 0x1f, A, A, A, 0]),
    plain(Kind::Write,                 &[0x0a, 0x1f, A, A, A, 0]),
    plain(Kind::Inquiry,               &[0x12, 0x01, A, A, A, 0]),
    plain(Kind::ModeSelect,            &[0x15, 0x11, 0, 0, A, 0]),
    plain(Kind::Reserve,               &[0x16, 0, 0, 0, 0, 0]),
    plain(Kind::Release,               &[0x17, 0, 0, 0, 0, 0]),
    plain(Kind::ModeSense,             &[0x1a, 0x08, A, A, A, 0]),
    plain(Kind::StartStopUnit,         &[0x1b, 0x01, 0, 0, 0x05, 0]),
    plain(Kind::ReadCapacity10,        &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    plain(Kind::Read,                  &[0x28, 0x18, A, A, A, A, G, A, A, 0]),
    plain(Kind::Write,                 &[0x2a, 0x18, A, A, A, A, G, A, A, 0]),
    plain(Kind::WriteAndVerify,        &[0x2e, 0x12, A, A, A, A, G, A, A, 0]),
    plain(Kind::Verify,                &[0x2f, 0x12, A, A, A, A, G, A, A, 0]),
    plain(Kind::PreFetch,              &[0x34, 0x02, A, A, A, A, G, A, A, 0]),
    plain(Kind::SynchronizeCache,      &[0x35, 0x02, A, A, A, A, G, A, A, 0]),
    plain(Kind::WriteSame,             &[0x41, 0x08, A, A, A, A, G, A, A, 0]),
    plain(Kind::Unmap,                 &[0x42, 0, 0, 0, 0, 0, G, A, A, 0]),
    plain(Kind::ModeSelect,            &[0x55, 0x11, 0, 0, 0, 0, 0, A, A, 0]),
    plain(Kind::ModeSense,             &[0x5a, 0x18, A, A, 0, 0, 0, A, A, 0]),
    action(Kind::PersistentReserveIn, 0,  &[0x5e, 0x1f, 0, 0, 0, 0, 0, A, A, 0]),
    action(Kind::PersistentReserveIn, 1,  &[0x5e, 0x1f, 0, 0, 0, 0, 0, A, A, 0]),
    action(Kind::PersistentReserveIn, 2,  &[0x5e, 0x1f, 0, 0, 0, 0, 0, A, A, 0]),
    action(Kind::PersistentReserveIn, 3,  &[0x5e, 0x1f, 0, 0, 0, 0, 0, A, A, 0]),
    action(Kind::PersistentReserveOut, 0, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 1, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 2, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 3, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 4, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 5, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    action(Kind::PersistentReserveOut, 6, &[0x5f, 0x1f, A, 0, 0, A, A, A, A, 0]),
    plain(Kind::Read,                  &[0x88, 0x18, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::CompareAndWrite,       &[0x89, 0x18, A, A, A, A, A, A, A, A, 0, 0, 0, A, G, 0]),
    plain(Kind::Write,                 &[0x8a, 0x18, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::OrWrite,               &[0x8b, 0x18, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::WriteAndVerify,        &[0x8e, 0x12, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::Verify,                &[0x8f, 0x12, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::PreFetch,              &[0x90, 0x02, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::SynchronizeCache,      &[0x91, 0x02, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::WriteSame,             &[0x93, 0x09, A, A, A, A, A, A, A, A, A, A, A, A, G, 0]),
    action(Kind::ReadCapacity16, 0x10, &[0x9e, 0x1f, 0, 0, 0, 0, 0, 0, 0, 0, A, A, A, A, 0, 0]),
    action(Kind::GetLbaStatus, 0x12,   &[0x9e, 0x1f, A, A, A, A, A, A, A, A, A, A, A, A, 0, 0]),
    plain(Kind::ReportLuns,            &[0xa0, 0, A, 0, 0, 0, A, A, A, A, 0, 0]),
    action(Kind::ReportSupportedOpcodes, 0x0c, &[0xa3, 0x1f, 0x87, A, A, A, A, A, A, A, 0, 0]),
    plain(Kind::Read,                  &[0xa8, 0x18, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::Write,                 &[0xaa, 0x18, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::WriteAndVerify,        &[0xae, 0x12, A, A, A, A, A, A, A, A, G, 0]),
    plain(Kind::Verify,                &[0xaf, 0x12, A, A, A, A, A, A, A, A, G, 0]),
];

/// The form of a command.
///
/// # Errors
/// An opcode or a service action that there is not, or a bit that may not be set.
pub fn form(cdb: &[u8; 16]) -> Result<&'static Form, Sense> {
    let mut known = false;
    for form in FORMS {
        if form.usage[0] != cdb[0] {
            continue;
        }
        known = true;
        if form.action.is_some_and(|action| action != cdb[1] & 0x1f) {
            continue;
        }
        let mut wrong = cdb.iter().zip(form.usage).skip(1);
        let wrong = wrong.position(|(byte, usage)| byte & !usage != 0);
        return match wrong {
            None => Ok(form),
            Some(before) => Err(Sense::cdb(u16::try_from(before + 1).unwrap_or_default())),
        };
    }
    Err(if known { Sense::cdb(1) } else { Sense::OPCODE })
}

/// REPORT SUPPORTED OPERATION CODES: the parameter data, whole (SPC-4, 6.35).
///
/// # Errors
/// Reporting options that are none, or that do not fit the opcode asked about.
pub fn report(cdb: &[u8; 16]) -> Result<Vec<u8>, Sense> {
    let timeouts = cdb[2] & 0x80 != 0;
    let action = u16::from_be_bytes([cdb[4], cdb[5]]);
    let of_opcode = || FORMS.iter().filter(|form| form.usage[0] == cdb[3]);
    let has_actions = of_opcode().any(|form| form.action.is_some());
    let by_action = || of_opcode().find(|form| form.action.map(u16::from) == Some(action));
    let form = match cdb[2] & 0x07 {
        0 => return Ok(all(timeouts)),
        1 if has_actions => return Err(Sense::cdb(2)),
        1 => of_opcode().next(),
        2 if !has_actions && of_opcode().next().is_some() => return Err(Sense::cdb(2)),
        2 => by_action(),
        3 if has_actions => by_action(),
        3 if action == 0 => of_opcode().next(),
        3 => None,
        _ => return Err(Sense::cdb(2)),
    };
    Ok(one(form, timeouts))
}

/// SPC-4, 6.35.2: the all_commands parameter data format.
fn all(timeouts: bool) -> Vec<u8> {
    let mut data = vec![0; 4];
    for form in FORMS {
        let flags = u8::from(form.action.is_some()) | if timeouts { 0x02 } else { 0 };
        let action = form.action.unwrap_or_default();
        data.extend_from_slice(&[form.usage[0], 0, 0, action, 0, flags, 0]);
        data.push(length(form));
        if timeouts {
            data.extend_from_slice(&NO_TIMEOUTS);
        }
    }
    let length = u32::try_from(data.len() - 4).unwrap_or_default();
    data[..4].copy_from_slice(&length.to_be_bytes());
    data
}

/// SPC-4, 6.35.3: the one_command parameter data format.
fn one(form: Option<&Form>, timeouts: bool) -> Vec<u8> {
    let Some(form) = form else {
        // Not supported.
        return vec![0, 0x01, 0, 0];
    };
    let flags = 0x03 | if timeouts { 0x80 } else { 0 };
    let mut data = vec![0, flags, 0, length(form)];
    data.extend_from_slice(form.usage);
    if let Some(action) = form.action {
        data[5] = data[5] & !0x1f | action;
    }
    if timeouts {
        data.extend_from_slice(&NO_TIMEOUTS);
    }
    data
}

/// A timeouts descriptor that recommends nothing (SPC-4, 6.35.4).
const NO_TIMEOUTS: [u8; 12] = [0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn length(form: &Form) -> u8 {
    u8::try_from(form.usage.len()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cdb(bytes: &[u8]) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb[..bytes.len()].copy_from_slice(bytes);
        cdb
    }

    #[test]
    fn each_form_has_the_length_of_its_group() {
        for form in FORMS {
            let length = match form.usage[0] >> 5 {
                0 => 6,
                1 | 2 => 10,
                4 => 16,
                _ => 12,
            };
            assert_eq!(form.usage.len(), length, "{form:?}");
        }
    }

    #[test]
    fn what_is_reported_is_taken_and_nothing_else() {
        for form in FORMS {
            let mut most = cdb(form.usage);
            if let Some(action) = form.action {
                most[1] = action;
            }
            assert_eq!(super::form(&most).unwrap().kind, form.kind);
            for (byte, usage) in form.usage.iter().enumerate().skip(1) {
                for bit in (0..8).map(|bit| 1 << bit).filter(|bit| usage & bit == 0) {
                    let mut wrong = most;
                    wrong[byte] |= bit;
                    let sense = Sense::cdb(u16::try_from(byte).unwrap());
                    assert_eq!(super::form(&wrong).unwrap_err(), sense, "{form:?}");
                }
            }
        }
    }

    #[test]
    fn unknown_opcodes_and_service_actions_differ() {
        assert_eq!(form(&cdb(&[0x83])).unwrap_err(), Sense::OPCODE);
        assert_eq!(form(&cdb(&[0x9e, 0x13])).unwrap_err(), Sense::cdb(1));
    }

    #[test]
    fn all_commands_are_listed_with_or_without_timeouts() {
        let plain = report(&cdb(&[0xa3, 0x0c, 0x00])).unwrap();
        assert_eq!(plain.len(), 4 + 8 * FORMS.len());
        let timed = report(&cdb(&[0xa3, 0x0c, 0x80])).unwrap();
        assert_eq!(timed.len(), 4 + 20 * FORMS.len());
        assert_eq!(timed[12..14], [0, 0x0a]);
    }

    #[test]
    fn one_command_is_asked_about_as_it_is_formed() {
        let ask = |options, opcode, action| report(&cdb(&[0xa3, 0x0c, options, opcode, 0, action]));
        assert_eq!(ask(1, 0x28, 0).unwrap()[..5], [0, 3, 0, 10, 0x28]);
        assert_eq!(ask(1, 0x9e, 0x10), Err(Sense::cdb(2)));
        assert_eq!(ask(2, 0x28, 0), Err(Sense::cdb(2)));
        assert_eq!(ask(2, 0x9e, 0x10).unwrap()[..6], [0, 3, 0, 16, 0x9e, 0x10]);
        assert_eq!(ask(2, 0x9e, 0x12).unwrap()[..6], [0, 3, 0, 16, 0x9e, 0x12]);
        assert_eq!(ask(2, 0x9e, 0x13).unwrap(), [0, 1, 0, 0]);
        assert_eq!(ask(1, 0x83, 0).unwrap(), [0, 1, 0, 0]);
        assert_eq!(ask(3, 0x28, 0).unwrap()[1], 3);
        assert_eq!(ask(3, 0x28, 1).unwrap()[1], 1);
        assert_eq!(ask(3, 0x9e, 0x10).unwrap()[1], 3);
        assert_eq!(ask(4, 0x28, 0), Err(Sense::cdb(2)));
        assert_eq!(ask(0x81, 0x28, 0).unwrap()[1], 0x83);
    }
}
