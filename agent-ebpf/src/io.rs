//! Counts at submission, and times at completion.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::{Array, PerCpuArray};
use aya_ebpf::programs::BtfTracePointContext;
use drover_ebpf::{
    BUCKETS, DISCARD, FLUSH, IoCount, IoKey, LATENCIES, LOST_IO, LOST_LATENCY, Latency, LatencyKey,
    Lost, Place, READ, WRITE,
};

use crate::kernel::{Typed, at, cgroup_charged, diskseq_of, is_kernels, process_of};
use crate::places::Places;

// The agent makes the two for IO as long as it wants, and writes that down here.
#[map]
static IO_KEYS: Array<Place<IoKey>> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static IO: PerCpuArray<IoCount> = PerCpuArray::with_max_entries(1, 0);
#[unsafe(no_mangle)]
static IO_MASK: u32 = 0;
#[map]
static LATENCY_KEYS: Array<Place<LatencyKey>> = Array::with_max_entries(LATENCIES, BPF_F_MMAPABLE);
#[map]
static LATENCY: PerCpuArray<Latency> = PerCpuArray::with_max_entries(LATENCIES, 0);
#[map]
static LOST: PerCpuArray<Lost> = PerCpuArray::with_max_entries(2, 0);
#[map]
static CLOCK: PerCpuArray<Clock> = PerCpuArray::with_max_entries(1, 0);

/// The time of a CPU's last tick that somebody asked in.
#[repr(C)]
struct Clock {
    jiffies: u64,
    ns: u64,
}

/// When somebody last read or wrote, as far as that matters: the time in ns, not
/// older than the kernel's tick (1 to 10 ms). To read the clock for each I/O would
/// cost more than all else that counts it.
#[inline(always)]
fn about_now() -> Option<u64> {
    // SAFETY: the helper has no precondition.
    let jiffies = unsafe { bpf_jiffies64() };
    // SAFETY: this CPU's own element, and only bio_queue's, which the kernel
    // does not run twice at once on a CPU.
    let clock = unsafe { &mut *CLOCK.get_ptr_mut(0)? };
    if clock.jiffies != jiffies {
        clock.jiffies = jiffies;
        // SAFETY: the helper has no precondition.
        clock.ns = unsafe { bpf_ktime_get_ns() };
    }
    Some(clock.ns)
}

/// What an operation is. `enum req_op`: the lowest bit is the direction.
#[inline(always)]
fn direction_of(flags: u32) -> Option<u32> {
    const REQ_OP_MASK: u32 = 0xff;
    const REQ_OP_DRV_IN: u32 = 34;
    match flags & REQ_OP_MASK {
        0 => Some(READ),
        2 => Some(FLUSH),
        3 | 5 => Some(DISCARD),
        op if op >= REQ_OP_DRV_IN => None,
        op if op & 1 == 1 => Some(WRITE),
        _ => None,
    }
}

/// Called once per bio that is submitted, whatever the driver; the kernel
/// leaves out what it submits a second time (the rest of a split, and what
/// NVMe multipath passes on to a path).
#[btf_tracepoint(function = "block_bio_queue")]
fn bio_queue(ctx: BtfTracePointContext) -> i32 {
    // None: no I/O of a disk (a driver's own command), or counted as lost.
    let _ = count(Typed(ctx.arg(0)));
    0
}

#[inline(always)]
fn count(bio: Typed) -> Option<()> {
    let direction = direction_of(bio.read(at!(bio_opf)))?;
    let bytes = u64::from(bio.read::<u32>(at!(bio_size)));
    let disk = bio.follow(at!(bio_bdev))?.follow(at!(bdev_disk))?;
    let task = Typed::current();
    let process = process_of(task)?;
    // Buffered writes are submitted by a worker of the kernel's.
    let cgroup = match is_kernels(task) {
        true => cgroup_charged(bio).unwrap_or(process.cgroup),
        false => process.cgroup,
    };
    let key = IoKey {
        diskseq: diskseq_of(disk),
        cgroup,
        start_ns: process.start_ns,
        tgid: process.tgid,
        pad: 0,
    };
    let places = Places {
        keys: &IO_KEYS,
        counts: &IO,
        // SAFETY: an aligned u32; volatile, since the compiler believes it is 0.
        mask: unsafe { (&raw const IO_MASK).read_volatile() },
    };
    let Some(count) = places.of(key) else {
        lost(LOST_IO);
        return None;
    };
    // SAFETY: the pointer is this CPU's own element, which lives as long as
    // the program runs; the kernel lets no second run of it in on this CPU.
    let count = unsafe { &mut *count };
    let now = about_now()?;
    match direction {
        READ => {
            count.reads += 1;
            count.read_bytes += bytes;
            count.last_read_ns = now;
        }
        // An empty write is a flush: blkdev_issue_flush sends REQ_OP_WRITE | REQ_PREFLUSH.
        WRITE if bytes > 0 => {
            count.writes += 1;
            count.written_bytes += bytes;
            count.last_write_ns = now;
        }
        DISCARD => {
            count.discards += 1;
            count.last_write_ns = now;
        }
        _ => count.flushes += 1,
    }
    Some(())
}

/// Called whenever bytes of a request are done.
#[btf_tracepoint(function = "block_rq_complete")]
fn rq_complete(ctx: BtfTracePointContext) -> i32 {
    // None: a part of a request, no I/O of a disk, or counted as lost.
    let _ = time(Typed(ctx.arg(0)), ctx.arg(1), ctx.arg(2));
    0
}

#[inline(always)]
fn time(request: Typed, error: u32, done: u32) -> Option<()> {
    if done < request.read(at!(rq_len)) {
        return None;
    }
    let disk = request.follow(at!(rq_queue))?.follow(at!(queue_disk))?;
    let key = LatencyKey {
        diskseq: diskseq_of(disk),
        direction: direction_of(request.read(at!(rq_flags)))?,
        pad: 0,
    };
    let start: u64 = request.read(at!(rq_start));
    let places = Places {
        keys: &LATENCY_KEYS,
        counts: &LATENCY,
        mask: LATENCIES - 1,
    };
    let Some(latency) = places.of(key) else {
        lost(LOST_LATENCY);
        return None;
    };
    // SAFETY: as in `count`.
    let latency = unsafe { &mut *latency };
    // The blk_status_t of a success is 0; the register's upper bits are not its own.
    if error & 0xff != 0 {
        latency.errors += 1;
    }
    if start == 0 {
        latency.untimed += 1;
        return Some(());
    }
    // SAFETY: the helper has no precondition.
    let now = unsafe { bpf_ktime_get_ns() };
    let took = now.saturating_sub(start);
    latency.sum_ns += took;
    if let Some(bucket) = latency.buckets.get_mut(log2(took)) {
        *bucket += 1;
    }
    let issued: u64 = request.read(at!(rq_io_start));
    if issued != 0 {
        let device = now.saturating_sub(issued);
        latency.device_sum_ns += device;
        latency.queue_sum_ns += took.saturating_sub(device);
        if let Some(bucket) = latency.device_buckets.get_mut(log2(device)) {
            *bucket += 1;
        }
    }
    Some(())
}

/// The whole logarithm, at most the last bucket. BPF has no instruction for it.
#[inline(always)]
fn log2(mut value: u64) -> usize {
    let mut log = 0;
    let mut step = 32;
    while step > 0 {
        if value >> step != 0 {
            value >>= step;
            log += step;
        }
        step >>= 1;
    }
    if log < BUCKETS { log } else { BUCKETS - 1 }
}

#[inline(always)]
fn lost(what: u32) {
    if let Some(lost) = LOST.get_ptr_mut(what) {
        // SAFETY: this CPU's own element; each index belongs to one program,
        // which the kernel does not run twice at once on a CPU.
        let lost = unsafe { &mut *lost };
        lost.events += 1;
        // SAFETY: the helper has no precondition.
        lost.last_ns = unsafe { bpf_ktime_get_ns() };
    }
}
