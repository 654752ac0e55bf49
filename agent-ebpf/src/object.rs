//! Checked reads of kernel memory.

use aya_ebpf::helpers::bpf_probe_read_kernel;

/// A kernel structure, by address. May be stale or wrong: reads are checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Object(pub *const u8);

impl Object {
    /// Reads a field at `offset` bytes.
    #[inline(always)]
    pub fn read<T: Copy>(self, offset: usize) -> Option<T> {
        // SAFETY: bpf_probe_read_kernel refuses addresses that cannot be read.
        unsafe { bpf_probe_read_kernel(self.0.wrapping_add(offset).cast::<T>()) }.ok()
    }

    /// Follows a pointer at `offset` bytes; none when it is null.
    #[inline(always)]
    pub fn follow(self, offset: usize) -> Option<Object> {
        let to: *const u8 = self.read(offset)?;
        if to.is_null() { None } else { Some(Object(to)) }
    }
}
