//! iSCSI connections from their first byte on: negotiation, CHAP, discovery.
#![no_main]

use drover_fuzz::Input;
use drover_fuzz::iscsi::Scene;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    Scene::new(input.byte() & 1 == 1).play(&mut input);
});
