//! NVMe/TCP hosts that have connected: admin and I/O queues, of two hosts at
//! one volume.
#![no_main]

use drover::nvme_tcp::wire::Digests;
use drover_fuzz::Input;
use drover_fuzz::nvme::Scene;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let mut scene = Scene::new(false);
    let kind = input.byte();
    let digests = Digests {
        header: kind & 1 != 0,
        data: kind & 2 != 0,
    };
    scene.host(0, digests);
    if kind & 4 != 0 {
        scene.host(1, digests);
    }
    scene.play(&mut input);
});
