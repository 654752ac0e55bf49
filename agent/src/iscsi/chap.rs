//! CHAP: who knows the secret, without the secret being said (RFC 1994;
//! RFC 7143, 12.1.3, and the algorithms that IANA lists).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use md5::{Digest, Md5};
use sha2::Sha256;
use sha3::Sha3_256;

/// The longest binary value of a key (RFC 7143, 12.1.3).
const LONGEST: usize = 1024;
/// Bytes of the challenges that are made here.
pub const CHALLENGE: usize = 32;

/// A name and the secret that proves it.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// CHAP_N.
    pub name: String,
    /// The secret.
    pub secret: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.name)
    }
}

/// How responses are computed (CHAP_A).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// MD5: what every initiator has.
    Md5,
    /// SHA-256.
    Sha256,
    /// SHA3-256.
    Sha3,
}

impl Algorithm {
    /// Its number in CHAP_A.
    pub fn number(self) -> u8 {
        match self {
            Self::Md5 => 5,
            Self::Sha256 => 7,
            Self::Sha3 => 8,
        }
    }

    /// The first one of an initiator's list that is known.
    pub fn choose(list: &str) -> Option<Self> {
        list.split(',').find_map(|number| match number {
            "5" => Some(Self::Md5),
            "7" => Some(Self::Sha256),
            "8" => Some(Self::Sha3),
            _ => None,
        })
    }

    /// The response to a challenge (RFC 1994, 4.1).
    pub fn response(self, identifier: u8, secret: &[u8], challenge: &[u8]) -> Vec<u8> {
        fn hash<D: Digest>(parts: [&[u8]; 3]) -> Vec<u8> {
            let mut hash = D::new();
            parts.iter().for_each(|part| hash.update(part));
            hash.finalize().to_vec()
        }
        let parts = [&[identifier][..], secret, challenge];
        match self {
            Self::Md5 => hash::<Md5>(parts),
            Self::Sha256 => hash::<Sha256>(parts),
            Self::Sha3 => hash::<Sha3_256>(parts),
        }
    }
}

/// Whether two values are equal, in a time that tells nothing of where they differ.
pub fn equal(left: &[u8], right: &[u8]) -> bool {
    let differ = left.iter().zip(right).fold(0, |all, (l, r)| all | (l ^ r));
    left.len() == right.len() && differ == 0
}

/// A binary value: hexadecimal after `0x`, base64 after `0b` (RFC 7143, 6.1).
pub fn decode(value: &str) -> Option<Vec<u8>> {
    let (prefix, digits) = value.split_at_checked(2)?;
    let bytes = match prefix {
        "0x" | "0X" => hexadecimal(digits)?,
        "0b" | "0B" => BASE64.decode(digits).ok()?,
        _ => return None,
    };
    (1..=LONGEST).contains(&bytes.len()).then_some(bytes)
}

/// A binary value in hexadecimal.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 + 2 * bytes.len());
    text.push_str("0x");
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
        }
    }
    text
}

fn hexadecimal(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16)?).ok();
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else {
        return None;
    };
    pairs
        .iter()
        .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_known_algorithm_is_taken() {
        assert_eq!(Algorithm::choose("6,7,5"), Some(Algorithm::Sha256));
        assert_eq!(Algorithm::choose("5,6,7,8"), Some(Algorithm::Md5));
        assert_eq!(Algorithm::choose("8"), Some(Algorithm::Sha3));
        for list in ["56", "", "6", "05", "5 ", "CHAP"] {
            assert_eq!(Algorithm::choose(list), None, "{list}");
        }
    }

    #[test]
    fn responses_are_those_of_the_hash_over_id_secret_challenge() {
        // printf '\x01secretchallenge' | md5sum, sha256sum, openssl sha3-256
        let known = [
            (Algorithm::Md5, "46e47770030e2b4e26a0db72a7efec00"),
            (
                Algorithm::Sha256,
                "2dfa0526f4764864b7c3c5bc6596bcead3d8dbd984f4fc1d9f330299f0beced4",
            ),
            (
                Algorithm::Sha3,
                "9444877c4dff778ed2add0f102dcd561e11944e7e948ee1b89508451a9e680ad",
            ),
        ];
        for (algorithm, expected) in known {
            let response = algorithm.response(1, b"secret", b"challenge");
            assert_eq!(encode(&response), format!("0x{expected}"));
        }
    }

    #[test]
    fn binary_values_are_hexadecimal_or_base64() {
        assert_eq!(decode("0x00fF"), Some(vec![0, 0xff]));
        assert_eq!(decode("0bAP8="), Some(vec![0, 0xff]));
        assert_eq!(decode(&encode(&[7; 16])), Some(vec![7; 16]));
        let long = format!("0x{}", "00".repeat(1025));
        for value in [
            "", "0x", "0x0", "0xg0", "00ff", "0b", "0b!", "0b====", &long,
        ] {
            assert_eq!(decode(value), None, "{value}");
        }
    }

    #[test]
    fn comparison_sees_every_difference() {
        assert!(equal(b"abc", b"abc"));
        assert!(!equal(b"abc", b"abd") && !equal(b"abc", b"ab") && !equal(b"", b"a"));
    }

    #[test]
    fn a_secret_is_not_printed() {
        let credentials = Credentials {
            name: "user".into(),
            secret: "hidden".into(),
        };
        assert!(!format!("{credentials:?}").contains("hidden"));
    }
}
