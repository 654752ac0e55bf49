//! An iSCSI connection from its first byte on, with and without CHAP.
#![no_main]

use drover_fuzz::{Input, iscsi};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut connection = iscsi::connection(&iscsi::target(input.byte() & 1 == 1));
    iscsi::play(&mut connection, &mut input);
});
