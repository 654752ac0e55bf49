//! Keys and values, as they travel in login and text PDUs (RFC 7143, 6.1).

use super::wire::{DEFAULT_MAX_DATA, Flaw};

/// The longest text that is gathered over several PDUs, in bytes.
pub const LONGEST: usize = 16 << 10;
/// The longest key (RFC 7143, 6.1).
const LONGEST_KEY: usize = 63;
/// The most pairs in one text: there are some thirty keys. If none of them is
/// understood, the answer still fits one PDU of a login.
const MOST_PAIRS: usize = 96;
const _: () =
    assert!(MOST_PAIRS * (LONGEST_KEY + "=NotUnderstood0".len()) < DEFAULT_MAX_DATA - 512);

/// Takes a text apart. Each pair ends with a zero byte; more of those may follow.
///
/// # Errors
/// A pair without `=`, a key that is empty or too long, bytes that are no
/// UTF-8, more pairs than there are keys, or a key that comes twice.
pub fn parse(text: &[u8]) -> Result<Vec<(&str, &str)>, Flaw> {
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for pair in text
        .split(|byte| *byte == 0)
        .filter(|pair| !pair.is_empty())
    {
        let pair = std::str::from_utf8(pair).map_err(|_| Flaw::Text)?;
        let (key, value) = pair.split_once('=').ok_or(Flaw::Text)?;
        let sound = (1..=LONGEST_KEY).contains(&key.len()) && pairs.len() < MOST_PAIRS;
        if !sound || pairs.iter().any(|(other, _)| *other == key) {
            return Err(Flaw::Text);
        }
        pairs.push((key, value));
    }
    Ok(pairs)
}

/// The value of a key.
pub fn value<'a>(pairs: &[(&str, &'a str)], key: &str) -> Option<&'a str> {
    let pair = pairs.iter().find(|(other, _)| *other == key);
    pair.map(|(_, value)| *value)
}

/// Appends a pair.
pub fn put(text: &mut Vec<u8>, key: &str, value: &str) {
    text.extend_from_slice(key.as_bytes());
    text.push(b'=');
    text.extend_from_slice(value.as_bytes());
    text.push(0);
}

/// A number as text keys have it: decimal, or hexadecimal after `0x`.
pub fn number(value: &str) -> Option<u32> {
    let hexadecimal = value
        .strip_prefix("0x")
        .or_else(|| value.strip_prefix("0X"));
    let (digits, radix) = hexadecimal.map_or((value, 10), |digits| (digits, 16));
    let sound = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    sound.then(|| u32::from_str_radix(digits, radix).ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_taken_apart_or_refused(text in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(pairs) = parse(&text) {
                let mut again = Vec::new();
                pairs.iter().for_each(|(key, value)| put(&mut again, key, value));
                prop_assert_eq!(parse(&again), Ok(pairs));
            }
        }
    }

    #[test]
    fn pairs_end_with_a_zero() {
        let pairs = parse(b"A=1\0B=x=y\0C=\0\0\0").unwrap();
        assert_eq!(pairs, [("A", "1"), ("B", "x=y"), ("C", "")]);
        assert_eq!(value(&pairs, "B"), Some("x=y"));
        assert_eq!(value(&pairs, "D"), None);
    }

    #[test]
    fn what_is_no_list_of_pairs_is_refused() {
        let long = [b"K".repeat(64), b"=1\0".to_vec()].concat();
        for text in [&b"A\0"[..], b"=1\0", b"A=1\0A=1\0", b"A=\xff\0", &long] {
            assert_eq!(parse(text), Err(Flaw::Text));
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("262144"), Some(262_144));
        assert_eq!(number("0x1F"), Some(31));
        for text in ["", "0x", "+1", "-1", "1 ", "4294967296", "0b01"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
