use super::*;

/// Keys 0, 1, 2 ... 31, bound to their owners' names and not.
const BOUND: &str = "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";
const PLAIN: &str = "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:";

fn exchanged<'a>(hash: Hash, challenge: &'a [u8], shared: Option<&'a [u8]>) -> Exchanged<'a> {
    Exchanged {
        hash,
        shared,
        challenge,
        sequence: 5,
        transaction: 9,
        channel: 0,
        host: "nqn.host",
        subsystem: "nqn.sub",
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Computed by Python's hmac and hashlib, by the specification's formula.
#[test]
fn responses_are_as_another_program_computes_them() {
    let (bound, plain): (Secret, Secret) = (BOUND.parse().unwrap(), PLAIN.parse().unwrap());
    let first = Exchanged {
        sequence: 0x0102_0304,
        ..exchanged(Hash::Sha256, &[7; 32], None)
    };
    assert_eq!(
        hex(&first.of_host(&bound)),
        "8b4004e7ddde74e04ccdedc41db35ff031cc91766d0c1db4c2226d4a9ac4914b"
    );
    assert_eq!(
        hex(&exchanged(Hash::Sha384, &[8; 48], Some(&[3; 256])).of_controller(&bound)),
        "f886c882705b5b36558b824f6d1641ba6ace52474d370994bd614ee3fcf0b112643621185a8b50ab74d97e9c94551df3"
    );
    assert_eq!(
        hex(&exchanged(Hash::Sha512, &[8; 64], None).of_host(&plain)),
        "6ac4443b3b04a8957184235bb3171d36804b2899c6d036c7bd1658e1e85c444b19c3a2ed00a58e08eb07a7999b626dd506d4ddbd995b6df8d520828f932aa44a"
    );
}

#[test]
fn both_ends_of_an_exchange_share_a_secret() {
    for number in 1..=5 {
        let group = Group::of(number).unwrap();
        let (ours, theirs) = (Exchange::new(group).unwrap(), Exchange::new(group).unwrap());
        assert_eq!(
            ours.public.len(),
            [256, 384, 512, 768, 1024][usize::from(number) - 1]
        );
        assert_eq!(ours.public.len(), group.length());
        let shared = ours.shared(&theirs.public).unwrap();
        assert_eq!(theirs.shared(&ours.public).unwrap(), shared);
        assert_eq!(shared.len(), group.length());
        assert_ne!(ours.public, theirs.public);
        // Values that would give the secret away, and no values at all.
        let mut one = vec![0; group.length()];
        assert_eq!(ours.shared(&one), None);
        *one.last_mut().unwrap() = 1;
        assert_eq!(ours.shared(&one), None);
        assert_eq!(ours.shared(&vec![0xff; group.length()]), None);
        assert_eq!(ours.shared(&theirs.public[1..]), None);
    }
    assert!(Exchange::new(Group::Null).is_none());
    assert_eq!((Group::of(6), Hash::of(0), Hash::of(4)), (None, None, None));
}

/// 2 generates the group of half the order: 2^((p-1)/2) is 1, which holds for
/// no prime with a digit wrong but by chance.
#[test]
fn the_primes_are_what_they_should_be() {
    for number in 1..=2 {
        let group = Group::of(number).unwrap();
        let prime = group.prime().unwrap();
        assert!(
            prime.starts_with("FFFFFFFFFFFFFFFFADF85458A2BB4A9A")
                && prime.ends_with("FFFFFFFFFFFFFFFF")
        );
        let bits = u32::try_from(prime.len() * 4).unwrap();
        let prime = BoxedUint::from_be_hex(prime, bits).into_option().unwrap();
        let half = prime.shr_vartime(1).unwrap();
        let params = BoxedMontyParams::new(Odd::new(prime).into_option().unwrap());
        let two = BoxedUint::from_be_slice(&[2], bits).unwrap();
        let power = BoxedMontyForm::new(two, &params).pow(&half).retrieve();
        assert_eq!(power, BoxedUint::one_with_precision(bits));
    }
}

#[test]
fn a_secret_is_whole_or_none() {
    assert!(BOUND.parse::<Secret>().is_ok());
    assert_eq!(
        format!("{:?}", BOUND.parse::<Secret>().unwrap()),
        "Secret(..)"
    );
    for text in [
        "",
        "DHHC-1:01:",
        "DHHC-1:04:AAECAw==:",
        &BOUND.replace("DHHC-1:01", "DHHC-1:02"),
        &BOUND.replace("AAEC", "AAED"),
        &BOUND.replace("DHHC-1", "DHHC-2"),
        "DHHC-1:00:AAECAwQFBgc=:",
    ] {
        assert_eq!(text.parse::<Secret>(), Err(NoSecret), "{text}");
    }
    assert!(same(b"abc", b"abc") && !same(b"abc", b"abd") && !same(b"abc", b"ab"));
}
