//! DH-HMAC-CHAP's arithmetic: secrets, hashes, groups, responses
//! (NVM Express Base Specification 2.0, 8.13.5).

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256, Sha384, Sha512};

use super::ffdhe;

/// Bytes of a private exponent: twice the strength of the largest hash in use
/// would be 64; RFC 7919 asks for at least 50 with the largest group.
const EXPONENT: usize = 64;

/// A hash function; the numbers are the specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-256.
    Sha256 = 1,
    /// SHA-384.
    Sha384 = 2,
    /// SHA-512.
    Sha512 = 3,
}

impl Hash {
    /// The hash with this number.
    pub fn of(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Sha256),
            2 => Some(Self::Sha384),
            3 => Some(Self::Sha512),
            _ => None,
        }
    }

    /// Bytes of its digests.
    pub fn length(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    fn digest(self, data: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::digest(data).to_vec(),
            Self::Sha384 => Sha384::digest(data).to_vec(),
            Self::Sha512 => Sha512::digest(data).to_vec(),
        }
    }

    /// The HMAC of some parts, one behind the other.
    pub fn mac(self, key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
        macro_rules! mac {
            ($hash:ty) => {{
                let mut mac =
                    Hmac::<$hash>::new_from_slice(key).expect("HMAC takes keys of any length");
                parts.iter().for_each(|part| mac.update(part));
                mac.finalize().into_bytes().to_vec()
            }};
        }
        match self {
            Self::Sha256 => mac!(Sha256),
            Self::Sha384 => mac!(Sha384),
            Self::Sha512 => mac!(Sha512),
        }
    }
}

/// A Diffie-Hellman group; the numbers are the specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as RFC 7919 names them")]
pub enum Group {
    /// None: the challenge is used as it is.
    Null = 0,
    Ffdhe2048 = 1,
    Ffdhe3072 = 2,
    Ffdhe4096 = 3,
    Ffdhe6144 = 4,
    Ffdhe8192 = 5,
}

impl Group {
    /// The group with this number.
    pub fn of(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::Null,
            1 => Self::Ffdhe2048,
            2 => Self::Ffdhe3072,
            3 => Self::Ffdhe4096,
            4 => Self::Ffdhe6144,
            5 => Self::Ffdhe8192,
            _ => return None,
        })
    }

    fn prime(self) -> Option<&'static str> {
        match self {
            Self::Null => None,
            Self::Ffdhe2048 => Some(ffdhe::FFDHE2048),
            Self::Ffdhe3072 => Some(ffdhe::FFDHE3072),
            Self::Ffdhe4096 => Some(ffdhe::FFDHE4096),
            Self::Ffdhe6144 => Some(ffdhe::FFDHE6144),
            Self::Ffdhe8192 => Some(ffdhe::FFDHE8192),
        }
    }

    /// Bytes of its values; 0 for none.
    pub fn length(self) -> usize {
        self.prime().map_or(0, |prime| prime.len() / 2)
    }

    /// `base` to the power `exponent`, as long as the prime. It takes as long
    /// whatever the exponent is. None: the base is no element of the group
    /// that may be used, or there is no group.
    fn power(self, base: &[u8], exponent: &[u8]) -> Option<Vec<u8>> {
        let prime = self.prime()?;
        let bits = u32::try_from(prime.len() * 4).ok()?;
        let prime = BoxedUint::from_be_hex(prime, bits).into_option()?;
        let base = BoxedUint::from_be_slice(base, bits).ok()?;
        let one = BoxedUint::one_with_precision(bits);
        // 0, 1 and p - 1 would let the secret be known (RFC 7919, 5.1).
        if base <= one || base >= prime.wrapping_sub(&one) {
            return None;
        }
        let params = BoxedMontyParams::new(Odd::new(prime).into_option()?);
        let exponent = BoxedUint::from_be_slice(exponent, (EXPONENT * 8) as u32).ok()?;
        let power = BoxedMontyForm::new(base, &params).pow(&exponent);
        Some(power.retrieve().to_be_bytes().into_vec())
    }
}

/// A private exponent of one exchange and the value that belongs to it.
pub struct Exchange {
    group: Group,
    exponent: [u8; EXPONENT],
    /// What the peer is told.
    pub public: Vec<u8>,
}

impl Exchange {
    /// A new one. None: the group is none, or the system has no randomness.
    pub fn new(group: Group) -> Option<Self> {
        let mut exponent = [0; EXPONENT];
        getrandom::fill(&mut exponent).ok()?;
        let public = group.power(&[2], &exponent)?;
        Some(Self {
            group,
            exponent,
            public,
        })
    }

    /// The secret shared with who has `peer`. None: no value of the group.
    pub fn shared(&self, peer: &[u8]) -> Option<Vec<u8>> {
        (peer.len() == self.group.length())
            .then(|| self.group.power(peer, &self.exponent))
            .flatten()
    }
}

/// A secret of the form `DHHC-1:hash:base64:`. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    key: Vec<u8>,
    /// With which hash it is bound to its owner's name; none: used as it is.
    transform: Option<Hash>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A text is no secret; it is not shown either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a DH-HMAC-CHAP secret (DHHC-1:00 to 03, base64 of 32, 48 or 64 bytes and their CRC-32)"
)]
pub struct NoSecret;

impl FromStr for Secret {
    type Err = NoSecret;

    fn from_str(text: &str) -> Result<Self, NoSecret> {
        let rest = text.trim().strip_prefix("DHHC-1:").ok_or(NoSecret)?;
        let (number, rest) = rest.split_once(':').ok_or(NoSecret)?;
        let encoded = rest.strip_suffix(':').unwrap_or(rest);
        let transform = match number {
            "00" => None,
            "01" => Some(Hash::Sha256),
            "02" => Some(Hash::Sha384),
            "03" => Some(Hash::Sha512),
            _ => return Err(NoSecret),
        };
        let bytes = STANDARD.decode(encoded).map_err(|_| NoSecret)?;
        let (key, sum) = bytes.split_last_chunk::<4>().ok_or(NoSecret)?;
        let fits = matches!(key.len(), 32 | 48 | 64)
            && transform.is_none_or(|hash| hash.length() == key.len());
        if !fits || crc32fast::hash(key).to_le_bytes() != *sum {
            return Err(NoSecret);
        }
        let key = key.to_vec();
        Ok(Self { key, transform })
    }
}

impl Secret {
    /// The secret whose key is these bytes, used as they are; none: no key is so long.
    pub fn of_key(key: &[u8]) -> Option<Self> {
        matches!(key.len(), 32 | 48 | 64).then(|| Self {
            key: key.to_vec(),
            transform: None,
        })
    }

    /// The key that its owner, `nqn`, responds with.
    fn of_owner(&self, nqn: &str) -> Vec<u8> {
        match self.transform {
            None => self.key.clone(),
            Some(hash) => hash.mac(&self.key, &[nqn.as_bytes(), b"NVMe-over-Fabrics"]),
        }
    }
}

/// What a response is made of, beside the secret.
pub struct Exchanged<'a> {
    /// The hash in use.
    pub hash: Hash,
    /// The secret of a Diffie-Hellman exchange, where there was one.
    pub shared: Option<&'a [u8]>,
    /// The challenge that is responded to.
    pub challenge: &'a [u8],
    /// The challenge's sequence number.
    pub sequence: u32,
    /// The transaction.
    pub transaction: u16,
    /// What the host said of a secure channel (SC_C).
    pub channel: u8,
    /// The host's NQN.
    pub host: &'a str,
    /// The subsystem's NQN.
    pub subsystem: &'a str,
}

impl Exchanged<'_> {
    /// The host's response.
    pub fn of_host(&self, secret: &Secret) -> Vec<u8> {
        let key = secret.of_owner(self.host);
        self.response(&key, b"HostHost", [self.host, self.subsystem])
    }

    /// The controller's response.
    pub fn of_controller(&self, secret: &Secret) -> Vec<u8> {
        let key = secret.of_owner(self.subsystem);
        self.response(&key, b"Controller", [self.subsystem, self.host])
    }

    fn response(&self, key: &[u8], label: &[u8], [first, second]: [&str; 2]) -> Vec<u8> {
        let augmented = self
            .shared
            .map(|shared| self.hash.mac(&self.hash.digest(shared), &[self.challenge]));
        let challenge = augmented.as_deref().unwrap_or(self.challenge);
        let parts: [&[u8]; 8] = [
            challenge,
            &self.sequence.to_le_bytes(),
            &self.transaction.to_le_bytes(),
            &[self.channel],
            label,
            first.as_bytes(),
            &[0],
            second.as_bytes(),
        ];
        self.hash.mac(key, &parts)
    }
}

/// Whether two digests are the same; it takes as long wherever they differ.
pub fn same(one: &[u8], other: &[u8]) -> bool {
    let differs = one.iter().zip(other).fold(0, |all, (a, b)| all | (a ^ b));
    one.len() == other.len() && std::hint::black_box(differs) == 0
}

#[cfg(test)]
#[path = "dhchap_tests.rs"]
mod tests;
