//! drover's gates: they refuse I/O on the disks that the agent has closed.
//!
//! Every program asks the same: which disk is this, and is its gate closed? As
//! long as no gate is, one load of a number is all that a program costs. They
//! decide nothing; who is closed stands in maps that are pinned, as the
//! programs are, so a gate stays closed when its agent dies.
#![no_std]
#![no_main]

mod disk;
mod layers;
#[path = "../object.rs"]
mod object;
mod shut;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // SAFETY: no program has a path that panics; the verifier refuses one that has.
    unsafe { core::hint::unreachable_unchecked() }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
