//! iSCSI sessions in their full feature phase.
#![no_main]

use drover_fuzz::Input;
use drover_fuzz::iscsi::Scene;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut scene = Scene::new(false);
    let kind = input.byte();
    scene.open().log_in(1, (kind & 1 != 0, kind & 2 != 0));
    if kind & 4 != 0 {
        scene.open().log_in(2, (false, false));
    }
    scene.play(&mut input);
});
