use std::sync::Arc;

use uuid::Uuid;

use super::*;
use crate::block::{BLOCK, BlockDevice, DeviceError};
use crate::ids::{Bytes, Lba};
use crate::nvme_tcp::reserve::Reservations;
use crate::nvme_tcp::subsystem::{Host, Parts, Subsystem};
use crate::nvme_tcp::wire::{IN_CAPSULE, u16_at};

/// Has a size and nothing else: no admin command touches the device.
struct Untouched;

impl BlockDevice for Untouched {
    fn size(&self) -> Bytes {
        Bytes(100 * BLOCK)
    }
    fn read(&self, _: Lba, _: &mut [u8]) -> Result<(), DeviceError> {
        unreachable!("an admin command read")
    }
    fn write(&self, _: Lba, _: &[u8], _: bool) -> Result<(), DeviceError> {
        unreachable!("an admin command wrote")
    }
    fn flush(&self) -> Result<(), DeviceError> {
        unreachable!("an admin command flushed")
    }
    fn write_zeroes(&self, _: Lba, _: u64, _: bool) -> Result<(), DeviceError> {
        unreachable!("an admin command wrote zeroes")
    }
    fn deallocate(&self, _: Lba, _: u64) -> Result<(), DeviceError> {
        unreachable!("an admin command deallocated")
    }
}

/// A command on the admin queue that brings no data.
fn handle(controller: &Controller, entry: &Entry) -> Result<Reply, Status> {
    super::handle(controller, 0, entry, &[])
}

const UUID: Uuid = Uuid::from_u128(0x0102_0304_0506_4708_890a_0b0c_0d0e_0f10);

fn controller() -> Arc<Controller> {
    let host = Host {
        nqn: "nqn.host".to_owned(),
        id: Uuid::from_u128(5),
    };
    let subsystem = Subsystem::new(Parts {
        nqn: "nqn.sub".to_owned(),
        namespace: UUID,
        host,
        read_only: false,
        device: Arc::new(Untouched),
        reservations: Reservations::volatile(),
        secrets: None,
        discovery: None,
    });
    Controller::new(3, subsystem, 0, std::time::Instant::now())
}

/// An admin command for `namespace` that reads `length` bytes.
fn entry(opcode: u8, namespace: u32, length: u32, dwords: [u32; 3]) -> Entry {
    let mut bytes = [0; 64];
    (bytes[0], bytes[1], bytes[39]) = (opcode, 0x40, 0x5a);
    bytes[4..8].copy_from_slice(&namespace.to_le_bytes());
    bytes[32..36].copy_from_slice(&length.to_le_bytes());
    for (at, dword) in dwords.into_iter().enumerate() {
        bytes[40 + 4 * at..44 + 4 * at].copy_from_slice(&dword.to_le_bytes());
    }
    Entry::new(bytes)
}

fn identify(controller: &Controller, cns: u32, namespace: u32) -> Result<Vec<u8>, Status> {
    match handle(controller, &entry(IDENTIFY, namespace, 4096, [cns, 0, 0]))? {
        Reply::Data(data) => Ok(data),
        other => panic!("{other:?}"),
    }
}

fn set(controller: &Controller, feature: u8, value: u32) -> Result<Reply, Status> {
    handle(
        controller,
        &entry(SET_FEATURES, 0, 0, [feature.into(), value, 0]),
    )
}

fn get(controller: &Controller, feature: u8) -> Result<Reply, Status> {
    handle(
        controller,
        &entry(GET_FEATURES, 0, 0, [feature.into(), 0, 0]),
    )
}

fn property(controller: &Controller, set: bool, offset: u32, value: u32) -> Result<Reply, Status> {
    let wide = u32::from(offset == PROPERTY_CAP);
    let kind = if set { PROPERTY_SET } else { PROPERTY_GET };
    handle(
        controller,
        &entry(FABRICS, kind.into(), 0, [wide, offset, value]),
    )
}

/// What Linux's drivers/nvme/host checks in core.c, fabrics.c and tcp.c.
#[test]
fn the_controller_is_as_linux_wants_it() {
    let page = identify(&controller(), 1, 0).unwrap();
    assert_eq!(page.len(), 4096);
    assert_eq!(u16_at(&page, 78), 3, "CNTLID as Connect gave it");
    assert_eq!(page[76] & 2, 2, "CMIC: a multipath head");
    assert_eq!(page[76] & 8, 0, "CMIC: no ANA, so no ANA log");
    assert_eq!(4096u32 << page[77], MAX_TRANSFER);
    assert_ne!(u16_at(&page, 320), 0, "KAS");
    assert_eq!((page[512], page[513]), (0x66, 0x44));
    assert_ne!(u16_at(&page, 514), 0, "MAXCMD");
    assert_eq!(u32_at(&page, 516), 1, "NN");
    assert_eq!(page[525] & 1, 1, "VWC");
    assert_eq!(u32_at(&page, 96) & (1 << 6), 1 << 6, "CTRATT: TBKAS");
    assert_eq!(u16_at(&page, 520), 0b1_1010_1101, "ONCS");
    assert_eq!(u16_at(&page, 522), 0, "no fused commands");
    assert_eq!(u16_at(&page, 534), 0b11, "OCFS");
    assert_ne!(u32_at(&page, 536) & 3, 0, "SGLS");
    assert_eq!(&page[768..776], b"nqn.sub\0");
    assert_eq!(u32_at(&page, 1792) * 16, 64 + IN_CAPSULE, "IOCCSZ");
    assert_eq!(u32_at(&page, 1796), 1, "IORCSZ");
    assert_eq!(
        (u16_at(&page, 1800), page[111]),
        (0, 1),
        "ICDOFF, CNTRLTYPE"
    );
}

#[test]
fn the_namespace_has_one_identity_in_both_places() {
    let controller = controller();
    let page = identify(&controller, 0, 1).unwrap();
    assert_eq!((u64_at(&page, 0), u64_at(&page, 8)), (100, 100));
    assert_eq!(
        (page[25], page[26] & 15, page[130]),
        (0, 0, 12),
        "one format, 4096 bytes"
    );
    assert_eq!(page[30], 1, "NMIC");
    assert_eq!(page[31], 0xfe, "RESCAP: all types; nobody keeps them");
    assert_eq!(
        (u16_at(&page, 74), u32_at(&page, 76), page[80]),
        (4096, 4096, 127)
    );
    assert_eq!(&page[104..120], UUID.as_bytes());
    let page = identify(&controller, 3, 1).unwrap();
    assert_eq!(
        (&page[..2], &page[4..20]),
        (&[3, 16][..], &UUID.as_bytes()[..])
    );
    assert_eq!(
        (&page[20..22], &page[24..40]),
        (&[2, 16][..], &UUID.as_bytes()[..])
    );
    assert_eq!(u32_at(&identify(&controller, 2, 0).unwrap(), 0), 1);
    assert_eq!(u32_at(&identify(&controller, 2, 1).unwrap(), 0), 0);
    assert_eq!(identify(&controller, 0, 2), Err(Status::INVALID_NAMESPACE));
    assert_eq!(identify(&controller, 3, 2), Err(Status::INVALID_NAMESPACE));
    assert_eq!(identify(&controller, 0x1c, 0), Err(Status::INVALID_FIELD));

    controller.subsystem().gate().close();
    assert!(!controller.knows_the_end());
    controller.subsystem().take_away();
    assert_eq!(identify(&controller, 2, 0).unwrap(), [0; 4096]);
    assert_eq!(identify(&controller, 0, 1).unwrap(), [0; 4096]);
    assert_eq!(identify(&controller, 3, 1), Err(Status::INVALID_NAMESPACE));
    assert!(controller.knows_the_end());
}

#[test]
fn queues_are_granted_before_they_are_used() {
    let controller = controller();
    assert_eq!(
        set(&controller, 7, 3 << 16 | 1),
        Ok(Reply::Done(1 << 16 | 1))
    );
    assert_eq!(
        set(&controller, 7, 200 << 16 | 200),
        Ok(Reply::Done(15 << 16 | 15))
    );
    assert_eq!(set(&controller, 7, 0xffff), Err(Status::INVALID_FIELD));
    assert_eq!(
        controller.connect_queue(1, true),
        Err(Status::COMMAND_SEQUENCE_ERROR),
        "not enabled"
    );
    property(&controller, true, PROPERTY_CC, 0x0046_0001).unwrap();
    assert_eq!(
        controller.connect_queue(17, true),
        Err(Status::CONNECT_INVALID_PARAMETERS)
    );
    assert_eq!(controller.connect_queue(1, true), Ok(()));
    assert_eq!(controller.connect_queue(1, true), Err(Status::QUEUE_IN_USE));
    assert_eq!(set(&controller, 7, 1), Err(Status::COMMAND_SEQUENCE_ERROR));
}

#[test]
fn features_are_what_they_were_set_to() {
    let controller = controller();
    for (feature, value) in [(6, 0), (0x0b, 1 << 8), (0x0f, 12_000)] {
        assert_eq!(set(&controller, feature, value), Ok(Reply::Done(0)));
        assert_eq!(get(&controller, feature), Ok(Reply::Done(value.into())));
    }
    assert!(!controller.write_cache());
    assert_eq!(get(&controller, 0x02), Err(Status::INVALID_FIELD));
    assert_eq!(
        set(&controller, 0x81, 0),
        Err(Status::COMMAND_SEQUENCE_ERROR)
    );
    let save = entry(SET_FEATURES, 0, 0, [1 << 31 | 6, 1, 0]);
    assert_eq!(
        handle(&controller, &save),
        Err(Status::FEATURE_NOT_SAVEABLE)
    );
    let host_id = entry(GET_FEATURES, 0, 16, [0x81, 1, 0]);
    let id = Uuid::from_u128(5).as_bytes().to_vec();
    assert_eq!(handle(&controller, &host_id), Ok(Reply::Data(id)));
}

/// What the mask keeps out is not noted; the rest is, in its order, and each
/// reading makes room for the next event.
#[test]
fn reservation_notices_are_masked_and_read_one_by_one() {
    use crate::nvme_tcp::reservation::Notice;
    let controller = controller();
    let subsystem = controller.subsystem();
    let mask = |value| handle(&controller, &entry(SET_FEATURES, 1, 0, [0x82, value, 0]));
    assert_eq!(mask(1 << 1), Ok(Reply::Done(0)));
    let read = handle(&controller, &entry(GET_FEATURES, 1, 0, [0x82, 0, 0]));
    assert_eq!(read, Ok(Reply::Done(2)));
    let elsewhere = entry(SET_FEATURES, 2, 0, [0x82, 0, 0]);
    assert_eq!(
        handle(&controller, &elsewhere),
        Err(Status::INVALID_NAMESPACE)
    );
    subsystem.note_reservation(Notice::RegistrationPreempted);
    subsystem.note_reservation(Notice::ReservationReleased);
    subsystem.note_reservation(Notice::ReservationPreempted);
    let log = |retain: u32| {
        let log = entry(GET_LOG_PAGE, 0, 64, [15 << 16 | retain << 15 | 0x80, 0, 0]);
        match handle(&controller, &log) {
            Ok(Reply::Data(page)) => (page[0], page[8], page[9]),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!([log(1), log(1)], [(1, 2, 2); 2], "retained");
    assert_eq!([log(0), log(0), log(0)], [(1, 2, 2), (2, 3, 1), (0, 0, 0)]);
}

#[test]
fn an_association_is_enabled_shut_down_and_never_enabled_again() {
    let controller = controller();
    let status = |controller: &Controller| property(controller, false, PROPERTY_CSTS, 0);
    assert_eq!(
        property(&controller, false, PROPERTY_CAP, 0),
        Ok(Reply::Done(CAPABILITIES))
    );
    assert_eq!(
        property(&controller, false, PROPERTY_VS, 0),
        Ok(Reply::Done(VERSION.into()))
    );
    let wrong_sizes = property(&controller, true, PROPERTY_CC, 0x0055_0001);
    assert_eq!(wrong_sizes, Err(Status::INVALID_FIELD));
    assert_eq!(status(&controller), Ok(Reply::Done(0)));
    assert_eq!(
        property(&controller, true, PROPERTY_CC, 0x0046_0001),
        Ok(Reply::Done(0))
    );
    assert_eq!(status(&controller), Ok(Reply::Done(1)));
    assert_eq!(
        property(&controller, true, PROPERTY_CC, 0x0046_4001),
        Ok(Reply::ShutDown)
    );
    assert_eq!(status(&controller), Ok(Reply::Done(0b0101)), "in progress");
    controller.shutdown_complete();
    assert_eq!(status(&controller), Ok(Reply::Done(0b1001)), "complete");
    assert_eq!(
        property(&controller, true, PROPERTY_CC, 0),
        Ok(Reply::Done(0))
    );
    assert!(controller.gate().is_closed() && !controller.enabled());
    let again = property(&controller, true, PROPERTY_CC, 0x0046_0001);
    assert_eq!(again, Err(Status::COMMAND_SEQUENCE_ERROR));
    assert_eq!(
        property(&controller, false, 0x30, 0),
        Err(Status::INVALID_FIELD)
    );
    assert_eq!(
        property(&controller, true, PROPERTY_VS, 0),
        Err(Status::INVALID_FIELD)
    );
}

#[test]
fn log_pages_are_read_in_parts_and_within_bounds() {
    let controller = controller();
    let log = |id: u32, dwords: u32, offset: u32| {
        let mut bytes =
            *entry(GET_LOG_PAGE, 0, dwords * 4, [(dwords - 1) << 16 | id, 0, 0]).bytes();
        bytes[48..52].copy_from_slice(&offset.to_le_bytes());
        handle(&controller, &Entry::new(bytes))
    };
    let Ok(Reply::Data(effects)) = log(5, 1024, 0) else {
        panic!("no effects log")
    };
    assert_eq!(effects.len(), 4096);
    for (opcode, effect) in crate::nvme_tcp::command::IO_OPCODES {
        assert_eq!(u32_at(&effects, 1024 + usize::from(opcode) * 4), effect);
    }
    assert_eq!(
        u32_at(&effects, 1024 + 4 * 4),
        0,
        "Write Uncorrectable is not served, so not shown"
    );
    assert_eq!(
        log(5, 256, 1024),
        Ok(Reply::Data(effects[1024..2048].to_vec()))
    );
    assert_eq!(
        log(5, 1, 4097),
        Err(Status::INVALID_FIELD),
        "beyond its end"
    );
    assert_eq!(log(0x0c, 1, 0), Err(Status::INVALID_LOG_PAGE));
    let huge = entry(GET_LOG_PAGE, 0, 0, [0xffff_0005, 0xffff, 0]);
    assert_eq!(handle(&controller, &huge), Err(Status::INVALID_FIELD));
}

#[test]
fn fused_commands_are_refused() {
    let mut bytes = *entry(IDENTIFY, 0, 4096, [1, 0, 0]).bytes();
    bytes[1] |= 1;
    assert_eq!(
        handle(&controller(), &Entry::new(bytes)),
        Err(Status::INVALID_FIELD)
    );
}
