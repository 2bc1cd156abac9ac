//! Counts the heap that a thread has, so that a target can be held to a bound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// What this thread has allocated and not freed, in bytes; what another thread frees is never
    /// taken off.
    static NOW: Cell<isize> = const { Cell::new(0) };
    /// The most since [`most_during`] has begun.
    static MOST: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that this thread has in addition to what it had before, while `work` runs.
pub fn most_during(work: impl FnOnce()) -> usize {
    let before = NOW.get();
    MOST.set(before);
    work();
    MOST.get().saturating_sub(before).unsigned_abs()
}

fn count(bytes: isize) {
    // At a thread's end there is nothing to count with any more.
    let _ = NOW.try_with(|now| {
        now.set(now.get().saturating_add(bytes));
        let _ = MOST.try_with(|most| most.set(most.get().max(now.get())));
    });
}

fn size(layout: Layout) -> isize {
    // A layout is never longer than that.
    layout.size().cast_signed()
}

// SAFETY: each call is handed on to the system's allocator as it is; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(size(layout));
        // SAFETY: the caller keeps the rules of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-size(layout));
        // SAFETY: `pointer` is from the system's allocator with this layout, as `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_freed_in_between_counts() {
        let used = most_during(|| {
            drop(std::hint::black_box(vec![1u8; 5000]));
            drop(std::hint::black_box(vec![1u8; 3000]));
        });
        assert_eq!(used, 5000);
        assert_eq!(most_during(|| ()), 0);
    }
}
