//! drover's eBPF programs: they count block I/O per disk and process, time
//! requests, count what watched processes send, and tell who holds a disk open.
//!
//! They decide nothing. What they cannot count they count as lost.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![expect(
    internal_features,
    reason = "the only way to the kernel's atomics, see places"
)]

mod holders;
mod io;
mod kernel;
mod object;
mod places;
mod sends;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: no program has a path that panics; the verifier refuses one that has.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
