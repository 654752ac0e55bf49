use proptest::prelude::*;

use super::*;

const KINDS: [Kind; 9] = [
    Kind::IcReq,
    Kind::IcResp,
    Kind::H2CTermReq,
    Kind::C2HTermReq,
    Kind::CapsuleCmd,
    Kind::CapsuleResp,
    Kind::H2CData,
    Kind::C2HData,
    Kind::R2T,
];
const BOTH: Digests = Digests {
    header: true,
    data: true,
};
const NONE: Digests = Digests {
    header: false,
    data: false,
};

fn carries_data(kind: Kind) -> bool {
    matches!(kind, Kind::CapsuleCmd | Kind::H2CData | Kind::C2HData)
}

fn digests() -> impl Strategy<Value = Digests> {
    (any::<bool>(), any::<bool>()).prop_map(|(header, data)| Digests { header, data })
}

proptest! {
    /// Whatever the eight bytes: an error, or lengths that add up to PLEN and are within the limits.
    #[test]
    fn any_common_header_is_refused_or_bounded(
        code in 0u8..12, flags in 0u8..16, header in prop_oneof![Just(24u8), Just(72), Just(128), any::<u8>()],
        pdo in any::<u8>(), plen in prop_oneof![0u32..10_000, any::<u32>()], digests in digests(),
    ) {
        let [a, b, c, d] = plen.to_le_bytes();
        let bytes = [code, flags, header, pdo, a, b, c, d];
        if let Ok(frame) = Frame::check(&bytes, digests) {
            let digest = |on: bool| if on { DIGEST } else { 0 };
            let whole = frame.header + digest(frame.header_digest) + frame.pad + frame.data
                + digest(frame.data_digest);
            prop_assert_eq!(whole, plen as usize);
            prop_assert!(frame.header <= LONGEST_HEADER && frame.pad <= LONGEST_HEADER);
            prop_assert!(frame.data <= MAX_H2C_DATA as usize);
            prop_assert!(frame.kind != Kind::CapsuleCmd || frame.data <= IN_CAPSULE as usize);
        }
    }

    #[test]
    fn what_is_written_is_what_is_read(index in 0usize..9, data in 1u32..=IN_CAPSULE, digests in digests()) {
        let kind = KINDS[index];
        let data = if carries_data(kind) { data } else { 0 };
        let frame = Frame::check(&common(kind, 0, digests, data), digests).unwrap();
        prop_assert_eq!(frame.kind, kind);
        prop_assert_eq!(frame.data, data as usize);
        prop_assert_eq!(frame.pad, 0);
        prop_assert_eq!(frame.data_digest, digests.data && data > 0);
    }

    #[test]
    fn data_headers_come_back(command: u16, tag: u16, offset: u32, length: u32) {
        let data = Data { command, tag, offset, length };
        prop_assert_eq!(Data::decode(&data.encode(common(Kind::R2T, 0, NONE, 0))), data);
    }

    #[test]
    fn completions_come_back(result: u64, sq_head: u16, command: u16, status in 0u16..0x8000) {
        let completion = Completion { result, sq_head, command, status };
        let pdu = completion.encode(BOTH);
        prop_assert_eq!(pdu.len(), 28);
        prop_assert_eq!(Completion::decode(pdu.first_chunk().unwrap()), completion);
        prop_assert_eq!(&pdu[24..], crc32c::crc32c(&pdu[..24]).to_le_bytes());
    }

    #[test]
    fn an_ic_req_is_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 128)) {
        let _ = IcReq::decode(bytes.first_chunk().unwrap());
    }
}

/// The layouts as Linux's include/linux/nvme-tcp.h has them.
#[test]
fn bytes_are_where_the_kernel_has_them() {
    let pdu = common(Kind::CapsuleCmd, 0, BOTH, 4096);
    assert_eq!(pdu, [4, 3, 72, 76, 0x50, 0x10, 0, 0]);
    assert_eq!(
        common(Kind::CapsuleResp, 0, NONE, 0),
        [5, 0, 24, 0, 24, 0, 0, 0]
    );
    assert_eq!(
        common(Kind::C2HData, FLAG_LAST, NONE, 512),
        [7, 4, 24, 24, 0x18, 2, 0, 0]
    );
    let pdu = ic_resp(BOTH);
    assert_eq!(
        pdu[..16],
        [1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0x10, 0]
    );
    let pdu = c2h_term(Flaw::HeaderField.at(4), &[6; 8]);
    assert_eq!(pdu[..14], [3, 0, 24, 0, 32, 0, 0, 0, 1, 0, 4, 0, 0, 0]);
    assert_eq!(pdu[24..], [6; 8]);
}

#[test]
fn each_bad_field_is_named() {
    let good = common(Kind::CapsuleCmd, 0, BOTH, 4096);
    let check = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        Frame::check(&bytes, BOTH).unwrap_err()
    };
    assert!(Frame::check(&good, BOTH).is_ok());
    assert_eq!(check(0, 8), Flaw::HeaderField.at(0));
    assert_eq!(check(1, 0), Flaw::HeaderField.at(1));
    assert_eq!(check(1, FLAG_HDGST), Flaw::HeaderField.at(1));
    assert_eq!(check(2, 71), Flaw::HeaderField.at(2));
    assert_eq!(check(3, 72), Flaw::HeaderField.at(3));
    assert_eq!(check(3, 77), Flaw::HeaderField.at(3));
    assert_eq!(check(5, 0x60), Flaw::TooLong.at(4));
    assert_eq!(check(7, 0xff), Flaw::TooLong.at(4));
    assert_eq!(check(5, 0), Flaw::HeaderField.at(4));
    let too_long = common(Kind::H2CData, 0, NONE, MAX_H2C_DATA + 1);
    assert_eq!(
        Frame::check(&too_long, NONE).unwrap_err(),
        Flaw::TooLong.at(4)
    );
    let empty = common(Kind::H2CData, 0, NONE, 0);
    assert_eq!(
        Frame::check(&empty, NONE).unwrap_err(),
        Flaw::HeaderField.at(4)
    );
    let undigested = common(Kind::CapsuleCmd, 0, NONE, 0);
    assert_eq!(
        Frame::check(&undigested, BOTH).unwrap_err(),
        Flaw::HeaderField.at(1)
    );
    let digested = common(Kind::CapsuleCmd, 0, BOTH, 0);
    assert_eq!(
        Frame::check(&digested, NONE).unwrap_err(),
        Flaw::HeaderField.at(1)
    );
}

#[test]
fn unsupported_parameters_are_named() {
    let mut header = [0; 128];
    assert!(IcReq::decode(&header).is_ok());
    header[8] = 1;
    assert_eq!(IcReq::decode(&header).unwrap_err(), Flaw::Unsupported.at(8));
    header[8] = 0;
    header[10] = 31;
    assert_eq!(
        IcReq::decode(&header).unwrap_err(),
        Flaw::Unsupported.at(10)
    );
    header[10] = 0;
    header[11] = 4;
    assert_eq!(
        IcReq::decode(&header).unwrap_err(),
        Flaw::HeaderField.at(11)
    );
    assert_eq!(Flaw::Unsupported.at(8).fes(), 6);
}
