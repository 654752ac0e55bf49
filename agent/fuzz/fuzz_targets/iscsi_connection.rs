//! A whole iSCSI connection in its full feature phase.
#![no_main]

use drover_fuzz::{Input, iscsi};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut connection = iscsi::connection(&iscsi::target(false));
    iscsi::log_in(&mut connection);
    assert!(connection.end().is_none(), "{:?}", connection.end());
    iscsi::play(&mut connection, &mut Input(bytes));
});
