//! What watched processes send over TCP.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use aya_ebpf::macros::{btf_tracepoint, fexit, map};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::{BtfTracePointContext, FExitContext};
use drover_ebpf::Sent;

use crate::kernel::{Typed, at};

/// By process id. The agent puts in whom it watches; nobody else is counted.
#[map]
static SENT: PerCpuHashMap<u32, Sent> = PerCpuHashMap::with_max_entries(4096, 0);

/// What a socket took, of whatever kind; since Linux 6.3.
#[btf_tracepoint(function = "sock_send_length")]
fn sock_sent(ctx: BtfTracePointContext) -> i32 {
    const IPPROTO_TCP: u16 = 6;
    let socket = Typed(ctx.arg(0));
    if socket.read::<u16>(at!(sock_protocol)) == IPPROTO_TCP {
        // None: nobody watches the process, or nothing was taken.
        let _ = count(ctx.arg(1));
    }
    0
}

/// Whatever is sent over TCP comes by here, kernel TLS and MPTCP too: the socket
/// is locked, and the result is what was taken. For kernels before the tracepoint.
#[fexit(function = "tcp_sendmsg_locked")]
fn tcp_sent(ctx: FExitContext) -> i32 {
    // As above.
    let _ = count(ctx.arg(3));
    0
}

#[inline(always)]
fn count(taken: i32) -> Option<()> {
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let sent = SENT.get_ptr_mut(tgid)?;
    let taken = u64::try_from(taken).ok()?;
    // SAFETY: this CPU's own element, which lives as long as the program runs;
    // the kernel lets no second run of it in on this CPU.
    let sent = unsafe { &mut *sent };
    sent.bytes += taken;
    // SAFETY: the helper has no precondition.
    sent.last_ns = unsafe { bpf_ktime_get_ns() };
    Some(())
}
