//! Decoders take anything and panic at nothing.

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn any_header_is_decoded_or_refused(bytes in prop::array::uniform32(any::<u8>()), rest in prop::array::uniform16(any::<u8>()), max in 0_usize..1 << 24) {
        let mut all = [0; BHS];
        all[..32].copy_from_slice(&bytes);
        all[32..].copy_from_slice(&rest);
        let header = Header::new(all);
        let digests = Digests { header: true, data: true };
        if let Ok(frame) = header.frame(digests, max) {
            prop_assert!(frame.data <= max && frame.ahs <= MAX_AHS);
            prop_assert_eq!((frame.data + frame.padding()) % 4, 0);
            prop_assert!(frame.trailer() <= 3 + DIGEST);
            prop_assert_eq!(frame.head() % 4, 0);
        }
        let _ = header.opcode();
        let _ = ScsiCommand::decode(&header);
        let _ = DataOut::decode(&header);
        let _ = LoginRequest::decode(&header);
        let _ = TaskManagement::decode(&header);
    }
}

#[test]
fn lengths_beyond_what_was_agreed_are_refused() {
    let mut bytes = [0; BHS];
    bytes[5..8].copy_from_slice(&[0, 0x20, 1]);
    let header = Header::new(bytes);
    assert_eq!(header.frame(Digests::default(), 8192), Err(Flaw::TooLong));
    let frame = header.frame(Digests::default(), 8193).unwrap();
    assert_eq!(
        (frame.data, frame.padding(), frame.trailer(), frame.head()),
        (8193, 3, 3, 48)
    );
    bytes[4] = 65;
    assert_eq!(
        Header::new(bytes).frame(Digests::default(), 1 << 20),
        Err(Flaw::TooLong)
    );
}

#[test]
fn no_digest_follows_no_data() {
    let digests = Digests {
        header: true,
        data: true,
    };
    let frame = Header::new([0; BHS]).frame(digests, 0).unwrap();
    assert_eq!((frame.head(), frame.trailer()), (52, 0));
}

#[test]
fn a_command_s_fields_are_where_the_standard_says() {
    let mut bytes = [0; BHS];
    bytes[0] = 0x41;
    bytes[1] = 0x80 | 0x20 | 1;
    bytes[9] = 3;
    bytes[16..20].copy_from_slice(&7_u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&4096_u32.to_be_bytes());
    bytes[24..28].copy_from_slice(&11_u32.to_be_bytes());
    bytes[32] = 0x2a;
    let header = Header::new(bytes);
    assert!(header.immediate());
    assert_eq!(header.opcode(), Ok(Opcode::ScsiCommand));
    assert_eq!((header.task(), header.command_number()), (7, 11));
    assert_eq!(header.lun(), 3 << 48);
    let command = ScsiCommand::decode(&header);
    assert!(command.is_final && command.writes && !command.reads);
    assert_eq!((command.attribute, command.length), (1, 4096));
    assert_eq!(command.cdb[0], 0x2a);
}
