//! The iSCSI and SCSI decoders, each by itself.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| drover::doors::iscsi(bytes));
