//! A whole NVMe/TCP connection: before it has connected, as an admin queue, and
//! as an I/O queue.
#![no_main]

use drover_fuzz::{Input, nvme};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let target = nvme::target();
    let mut admin = nvme::connection(&target);
    match input.byte() % 4 {
        0 => {
            admin.send(input.0);
        }
        1 => nvme::play(&mut admin, &mut input),
        2 => {
            nvme::connect(&mut admin, 0, 0xffff).expect("the host may connect");
            nvme::enable(&mut admin);
            nvme::play(&mut admin, &mut input);
        }
        _ => {
            let controller = nvme::connect(&mut admin, 0, 0xffff).expect("the host may connect");
            nvme::enable(&mut admin);
            let mut io = nvme::connection(&target);
            nvme::connect(&mut io, 1, controller).expect("the queue may connect");
            nvme::play(&mut io, &mut input);
        }
    }
});
