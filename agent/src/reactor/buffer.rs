//! Memory for a command's data, and the bound on it.
//!
//! A buffer is aligned to a page, so that a file opened with O_DIRECT takes
//! it. A connection keeps those it is done with and gives them out again, so that
//! nothing is allocated per command; they hold what they held before, never a
//! peer's to see, since a read fills the whole of it or is answered without data.

use std::alloc::Layout;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytemuck::{Pod, Zeroable};

/// Bytes of a page, the unit that buffers are made of.
pub const PAGE: usize = 4096;

/// Memory that O_DIRECT takes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// Whole pages, from the kernel and not from the heap: glibc puts a header before
/// each, so that an aligned page there costs two.
struct Pages {
    start: NonNull<Page>,
    count: usize,
}

// SAFETY: it alone has the memory, which is bytes and no thread's in particular.
unsafe impl Send for Pages {}
// SAFETY: it is changed through `&mut` only.
unsafe impl Sync for Pages {}

impl Pages {
    /// So many pages of zeroes.
    fn zeroed(count: usize) -> Self {
        if count == 0 {
            return Self::default();
        }
        let layout = Layout::array::<Page>(count).expect("no buffer is near 2^63 bytes");
        // SAFETY: a new mapping of its own, of a length that is not 0.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                layout.size(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        match NonNull::new(start) {
            Some(memory) if start != libc::MAP_FAILED => Self {
                start: memory.cast(),
                count,
            },
            _ => std::alloc::handle_alloc_error(layout),
        }
    }

    fn len(&self) -> usize {
        self.count
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `count` pages and lives as long as this.
        let pages = unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) };
        bytemuck::cast_slice(pages)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it.
        let pages = unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) };
        bytemuck::cast_slice_mut(pages)
    }
}

impl Default for Pages {
    fn default() -> Self {
        Self {
            start: NonNull::dangling(),
            count: 0,
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        if self.count > 0 {
            // SAFETY: the mapping is this one's, and no borrow of it is left.
            // It cannot fail for a whole mapping that was made.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * PAGE) };
        }
    }
}

/// A command's data. Its share of the budget is given back when it is dropped.
pub struct Buffer {
    pages: Pages,
    length: usize,
    budget: Option<Arc<Budget>>,
}

/// Bytes that one connection's buffers may have together.
#[derive(Debug)]
pub struct Budget {
    limit: usize,
    used: AtomicUsize,
}

/// A connection's spare buffers, by size in pages.
#[derive(Default)]
pub struct Spares {
    classes: [Vec<Pages>; CLASSES],
    /// Bytes kept.
    kept: usize,
}

/// Sizes are powers of two, from one page to 1 MiB; longer ones are not kept.
const CLASSES: usize = 9;
/// Bytes that are kept, of all sizes together.
const KEPT: usize = 1 << 20;

impl Buffer {
    /// A new buffer of zeroes, outside of every budget.
    pub fn zeroed(length: usize) -> Self {
        let pages = Pages::zeroed(length.div_ceil(PAGE));
        Self {
            pages,
            length,
            budget: None,
        }
    }

    /// Shortens it; a longer length than it has changes nothing.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Where its bytes begin in memory: aligned to a page.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pages.bytes_mut().as_mut_ptr()
    }

    fn give_back(&mut self) {
        if let Some(budget) = self.budget.take() {
            budget
                .used
                .fetch_sub(self.pages.len() * PAGE, Ordering::AcqRel);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages.bytes()[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let length = self.length;
        &mut self.pages.bytes_mut()[..length]
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicUsize::new(0),
        })
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    /// Takes `bytes`, if there are as many left. One that is larger than the
    /// whole budget is let in alone, so that it cannot wait for ever.
    fn take(&self, bytes: usize) -> bool {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                (used == 0 || used + bytes <= self.limit).then_some(used + bytes)
            })
            .is_ok()
    }
}

impl Spares {
    /// A buffer of `length` bytes with any content, on `budget`; none when
    /// that is used up.
    pub fn within(&mut self, budget: &Arc<Budget>, length: usize) -> Option<Buffer> {
        let pages = length.div_ceil(PAGE).max(1).next_power_of_two();
        if !budget.take(pages * PAGE) {
            return None;
        }
        let mut buffer = self.any(length);
        buffer.budget = Some(Arc::clone(budget));
        Some(buffer)
    }

    /// A buffer of `length` bytes with any content, outside of every budget.
    pub fn any(&mut self, length: usize) -> Buffer {
        let pages = length.div_ceil(PAGE).max(1).next_power_of_two();
        let pages = match self.class(pages).and_then(Vec::pop) {
            Some(spare) => {
                self.kept -= spare.len() * PAGE;
                spare
            }
            None => Pages::zeroed(pages),
        };
        Buffer {
            pages,
            length,
            budget: None,
        }
    }

    /// Has room to keep the buffers of so many commands.
    pub fn make_room(&mut self, commands: usize) {
        for (class, spares) in self.classes.iter_mut().enumerate() {
            spares.reserve(commands.min(KEPT / (PAGE << class)));
        }
    }

    /// Keeps a buffer's memory for the next who wants one.
    pub fn keep(&mut self, mut buffer: Buffer) {
        buffer.give_back();
        let pages = std::mem::take(&mut buffer.pages);
        let kept = self.kept + pages.len() * PAGE;
        if pages.len().is_power_of_two()
            && kept <= KEPT
            && let Some(class) = self.class(pages.len())
        {
            class.push(pages);
            self.kept = kept;
        }
    }

    fn class(&mut self, pages: usize) -> Option<&mut Vec<Pages>> {
        self.classes.get_mut(pages.trailing_zeros() as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_as_long_as_asked() {
        let mut spares = Spares::default();
        for length in [0, 1, 4096, 4097, 1 << 20, 3 << 20] {
            let mut buffer = spares.any(length);
            assert_eq!(buffer.len(), length);
            assert_eq!(buffer.as_mut_ptr() as usize % PAGE, 0);
            spares.keep(buffer);
        }
    }

    #[test]
    fn a_budget_bounds_and_is_given_back() {
        let (mut spares, budget) = (Spares::default(), Budget::new(16384));
        let first = spares.within(&budget, 8192).unwrap();
        let second = spares.within(&budget, 8000).unwrap();
        assert!(spares.within(&budget, 1).is_none());
        drop(first);
        spares.keep(second);
        assert_eq!(budget.used(), 0);
        let alone = spares.within(&budget, 1 << 20).unwrap();
        assert!(spares.within(&budget, 1).is_none());
        drop(alone);
        assert_eq!(budget.used(), 0);
    }
}
