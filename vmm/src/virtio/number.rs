//! Conversions between the widths of numbers, without `as`, which cuts silently.
//!
//! The host is a 64-bit machine: a `usize` holds every `u32`, and a `u64` every `usize`.

use std::io;

/// 32 bits of the guest as an index or a length.
pub fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// A length of this process as the wider number that files and the guest's addresses count in.
pub fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// A count that its caller keeps far below 4 Gi.
pub fn small(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A count as C has it in system calls.
pub fn int(count: usize) -> io::Result<libc::c_int> {
    libc::c_int::try_from(count).map_err(io::Error::other)
}

/// The lower half of 64 bits.
pub fn low(number: u64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_cut_but_the_upper_half() {
        assert_eq!(wide(index(u32::MAX)), u64::from(u32::MAX));
        assert_eq!((small(7), small(1 << 40)), (7, u32::MAX));
        assert_eq!(low(0x0123_4567_89ab_cdef), 0x89ab_cdef);
        assert_eq!(low(0x0123_4567_89ab_cdef >> 32), 0x0123_4567);
    }
}
