//! What this guest is to do: the first file of its initrd, `CASE FROM COUNT`.
//!
//! The VMM fixes the kernel's command line, so the test says it in the initrd, a cpio archive
//! (Linux Documentation/driver-api/early-userspace/buffer-format.rst). PVH's start info tells where
//! that lies (Xen's `arch-x86/hvm/start_info.h`).

use crate::machine::{given, load};

/// In `struct hvm_start_info`.
const MODULES: u64 = 16;

const CPIO_HEADER: u64 = 110;

/// A case, and how much of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    /// The name of the case.
    pub case: &'static str,
    /// The attack to begin with, from 0.
    pub from: u64,
    /// How often to do what is done many times.
    pub count: u64,
}

impl Command {
    /// Finds the command by the start info at this address.
    pub fn find(start_info: u64) -> Option<Self> {
        let module: u64 = load(load::<u64>(start_info + MODULES));
        let header = given(module, CPIO_HEADER as usize);
        let (name, size) = (digits(header, 94)?, digits(header, 54)?);
        let content = (module + CPIO_HEADER + name).next_multiple_of(4);
        Self::parse(core::str::from_utf8(given(content, size as usize)).ok()?)
    }

    fn parse(text: &'static str) -> Option<Self> {
        let mut words = text.split(' ');
        Some(Self {
            case: words.next()?,
            from: words.next()?.parse().ok()?,
            count: words.next()?.parse().ok()?,
        })
    }
}

/// Eight hexadecimal digits.
fn digits(header: &[u8], at: usize) -> Option<u64> {
    let text = core::str::from_utf8(header.get(at..at + 8)?).ok()?;
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_three_words() {
        let wanted = Command {
            case: "net",
            from: 3,
            count: 40,
        };
        assert_eq!(Command::parse("net 3 40"), Some(wanted));
        assert_eq!(Command::parse("net 3"), None);
        assert_eq!(digits(b"xx0000001Fyy", 2), Some(31));
    }
}
