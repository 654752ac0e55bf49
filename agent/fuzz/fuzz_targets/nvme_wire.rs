//! The NVMe/TCP decoders: whatever the bytes, a frame's lengths hold.
#![no_main]

use drover::nvme_tcp::wire::{Digests, Frame, IcReq};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((common, rest)) = bytes.split_first_chunk::<8>() else {
        return;
    };
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        if let Ok(frame) = Frame::check(common, Digests { header, data }) {
            assert!(frame.header >= 8 && frame.header <= 128);
            assert!(frame.data <= 1 << 20);
        }
    }
    if let Some(request) = rest.first_chunk::<128>() {
        let _ = IcReq::decode(request);
    }
});
