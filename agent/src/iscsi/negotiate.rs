//! The operational keys of a login, and what comes of them (RFC 7143, 13).
//!
//! | Key | Rule | Here |
//! |---|---|---|
//! | HeaderDigest, DataDigest | first that is known | CRC32C, None |
//! | InitialR2T | Yes if one wants it | No |
//! | ImmediateData | Yes if both want it | Yes |
//! | MaxRecvDataSegmentLength | each says its own | 256 KiB |
//! | MaxBurstLength, FirstBurstLength | the smaller | 256 KiB, 64 KiB |
//! | MaxConnections, MaxOutstandingR2T | the smaller | 1 |
//! | DataPDUInOrder, DataSequenceInOrder | Yes if one wants it | Yes |
//! | DefaultTime2Wait, DefaultTime2Retain | the larger, the smaller | 2 s, 0 s |
//! | ErrorRecoveryLevel | the smaller | 0 |
//!
//! The bursts are small on purpose: unsolicited data is bounded by
//! FirstBurstLength times the command window, and memory with it.

use super::text;
use super::wire::{DEFAULT_MAX_DATA, Digests};

/// The most data that an initiator may send in one PDU once it was told so.
pub const MAX_RECEIVE: usize = 256 << 10;
const MAX_BURST: u32 = 256 << 10;
const FIRST_BURST: u32 = 64 << 10;
/// Seconds from a connection's loss until an initiator should come again.
const TIME_TO_WAIT: u32 = 2;
const LARGEST: u32 = 0xff_ffff;

/// What was agreed on for a session of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    /// The digests, from the full feature phase on.
    pub digests: Digests,
    /// Whether data beyond immediate data comes only when asked for.
    pub initial_r2t: bool,
    /// Whether commands may bring data.
    pub immediate_data: bool,
    /// The most data in a PDU that the initiator takes.
    pub max_send: usize,
    /// The most data in a PDU that the initiator may send.
    pub max_receive: usize,
    /// The most data in a sequence of data PDUs.
    pub max_burst: u32,
    /// The most unsolicited data of a command, immediate data counted.
    pub first_burst: u32,
}

/// The operational keys, each of which a login may negotiate once.
const KEYS: [&str; 18] = [
    "HeaderDigest",
    "DataDigest",
    "InitialR2T",
    "ImmediateData",
    "DataPDUInOrder",
    "DataSequenceInOrder",
    "IFMarker",
    "OFMarker",
    "MaxRecvDataSegmentLength",
    "MaxBurstLength",
    "FirstBurstLength",
    "MaxConnections",
    "MaxOutstandingR2T",
    "DefaultTime2Wait",
    "DefaultTime2Retain",
    "ErrorRecoveryLevel",
    "iSCSIProtocolLevel",
    "TaskReporting",
];

/// Which of the operational keys have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Negotiated([bool; KEYS.len()]);

impl Negotiated {
    /// Whether a key comes for the first time, or is none of those.
    pub fn first_time(&mut self, key: &str) -> bool {
        let place = KEYS.iter().position(|known| *known == key);
        place.is_none_or(|place| !std::mem::replace(&mut self.0[place], true))
    }
}

impl Default for Parameters {
    /// What holds where nothing is said.
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            initial_r2t: true,
            immediate_data: true,
            max_send: DEFAULT_MAX_DATA,
            max_receive: DEFAULT_MAX_DATA,
            max_burst: MAX_BURST,
            first_burst: FIRST_BURST,
        }
    }
}

impl Parameters {
    /// Takes one of the initiator's operational keys in. Returns the answer;
    /// none where the key is a declaration.
    pub fn take(&mut self, key: &str, offer: &str) -> Option<String> {
        let answer = match key {
            "HeaderDigest" => digest(offer, &mut self.digests.header),
            "DataDigest" => digest(offer, &mut self.digests.data),
            "InitialR2T" => boolean(offer).map(|yes| {
                self.initial_r2t = yes;
                say(yes)
            }),
            "ImmediateData" => boolean(offer).map(|yes| {
                self.immediate_data = yes;
                say(yes)
            }),
            "DataPDUInOrder" | "DataSequenceInOrder" => boolean(offer).map(|_| say(true)),
            "IFMarker" | "OFMarker" => boolean(offer).map(|_| say(false)),
            "MaxRecvDataSegmentLength" => match number(offer, 512..=LARGEST) {
                Some(bytes) => {
                    self.max_send = bytes as usize;
                    return None;
                }
                None => None,
            },
            "MaxBurstLength" => number(offer, 512..=LARGEST).map(|bytes| {
                self.max_burst = bytes.min(MAX_BURST);
                self.max_burst.to_string()
            }),
            "FirstBurstLength" => number(offer, 512..=LARGEST).map(|bytes| {
                self.first_burst = bytes.min(FIRST_BURST);
                self.first_burst.to_string()
            }),
            "MaxConnections" | "MaxOutstandingR2T" => number(offer, 1..=65535).map(|_| "1".into()),
            "DefaultTime2Wait" => {
                number(offer, 0..=3600).map(|seconds| seconds.max(TIME_TO_WAIT).to_string())
            }
            "DefaultTime2Retain" => number(offer, 0..=3600).map(|_| "0".into()),
            "ErrorRecoveryLevel" => number(offer, 0..=2).map(|_| "0".into()),
            // RFC 7143, 13.24: 1 is that standard.
            "iSCSIProtocolLevel" => number(offer, 0..=31).map(|level| level.min(1).to_string()),
            "TaskReporting" => first(offer, &["RFC3720"]).map(str::to_owned),
            _ => return Some("NotUnderstood".into()),
        };
        Some(answer.unwrap_or_else(|| "Reject".into()))
    }

    /// What holds when all keys are in.
    pub fn settle(&mut self) {
        self.first_burst = self.first_burst.min(self.max_burst);
    }
}

fn say(yes: bool) -> String {
    if yes { "Yes" } else { "No" }.to_owned()
}

fn boolean(offer: &str) -> Option<bool> {
    match offer {
        "Yes" => Some(true),
        "No" => Some(false),
        _ => None,
    }
}

fn number(offer: &str, legal: std::ops::RangeInclusive<u32>) -> Option<u32> {
    text::number(offer).filter(|number| legal.contains(number))
}

/// The initiator's first choice of those that are known.
fn first<'a>(offer: &'a str, known: &[&str]) -> Option<&'a str> {
    offer.split(',').find(|value| known.contains(value))
}

fn digest(offer: &str, on: &mut bool) -> Option<String> {
    let chosen = first(offer, &["CRC32C", "None"])?;
    *on = chosen == "CRC32C";
    Some(chosen.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(key: &str, offer: &str) -> (Option<String>, Parameters) {
        let mut parameters = Parameters::default();
        let answer = parameters.take(key, offer);
        (answer, parameters)
    }

    #[test]
    fn each_key_follows_its_rule() {
        let cases = [
            ("HeaderDigest", "CRC32C,None", "CRC32C"),
            ("DataDigest", "None,CRC32C", "None"),
            ("DataDigest", "SHA,CRC32C", "CRC32C"),
            ("HeaderDigest", "crc32c", "Reject"),
            ("InitialR2T", "No", "No"),
            ("InitialR2T", "Yes", "Yes"),
            ("ImmediateData", "No", "No"),
            ("ImmediateData", "maybe", "Reject"),
            ("MaxBurstLength", "16776192", "262144"),
            ("MaxBurstLength", "511", "Reject"),
            ("FirstBurstLength", "262144", "65536"),
            ("FirstBurstLength", "4096", "4096"),
            ("MaxConnections", "8", "1"),
            ("MaxConnections", "0", "Reject"),
            ("MaxOutstandingR2T", "16", "1"),
            ("DefaultTime2Wait", "0", "2"),
            ("DefaultTime2Wait", "5", "5"),
            ("DefaultTime2Retain", "20", "0"),
            ("ErrorRecoveryLevel", "2", "0"),
            ("ErrorRecoveryLevel", "3", "Reject"),
            ("DataPDUInOrder", "No", "Yes"),
            ("DataSequenceInOrder", "No", "Yes"),
            ("IFMarker", "Yes", "No"),
            ("OFMarker", "No", "No"),
            ("iSCSIProtocolLevel", "2", "1"),
            ("TaskReporting", "FastAbort,RFC3720", "RFC3720"),
            ("X-com.example.key", "1", "NotUnderstood"),
            ("OFMarkInt", "1~2", "NotUnderstood"),
        ];
        for (key, offer, answer) in cases {
            assert_eq!(
                taken(key, offer).0.as_deref(),
                Some(answer),
                "{key}={offer}"
            );
        }
    }

    #[test]
    fn every_key_that_is_known_is_negotiated_once() {
        let mut negotiated = Negotiated::default();
        for key in KEYS {
            assert_ne!(taken(key, "").0.as_deref(), Some("NotUnderstood"), "{key}");
            assert!(negotiated.first_time(key) && !negotiated.first_time(key));
        }
        assert!(negotiated.first_time("X-other") && negotiated.first_time("X-other"));
    }

    #[test]
    fn a_receiver_s_length_is_declared_and_not_answered() {
        let (answer, parameters) = taken("MaxRecvDataSegmentLength", "0x1000");
        assert_eq!((answer, parameters.max_send), (None, 4096));
        let (answer, parameters) = taken("MaxRecvDataSegmentLength", "16777216");
        assert_eq!(
            (answer.as_deref(), parameters.max_send),
            (Some("Reject"), 8192)
        );
    }

    #[test]
    fn the_first_burst_is_no_longer_than_a_burst() {
        let mut parameters = Parameters::default();
        parameters.take("MaxBurstLength", "4096");
        parameters.settle();
        assert_eq!(parameters.first_burst, 4096);
    }
}
