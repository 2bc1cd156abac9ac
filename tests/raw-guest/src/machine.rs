//! The guest's memory, ports and time. All `unsafe` of the library is here.
//!
//! Nobody else is in this guest, and nothing of its own lies from [`FREE`] on. So an access there
//! is as safe as one to an array; one below may break the guest itself, which a test then sees.

use core::arch::asm;
use core::sync::atomic::{Ordering, fence};

/// Buffers.
pub const DATA: u64 = FREE + (4 << 20);

/// Where RAM ends: the VM of these tests has 64 MiB.
pub const RAM_END: u64 = 64 << 20;

/// From here on memory is for rings, buffers and the log.
pub const FREE: u64 = 3 << 20;

/// Where the bytes of a port's string are.
const STRING: u64 = 62 << 20;

/// The initial count of the local APIC's timer, and its ticks in a millisecond (KVM: 1 GHz).
const TIMER: u64 = 0xfee0_0380;
const TICKS: u32 = 1_000_000;

/// How long the device may take, in ticks of the time stamp counter: some seconds.
pub const PATIENCE: u64 = 30_000_000_000;

/// What one instruction reads or writes: 1, 2, 4 or 8 bytes.
pub trait Word: Copy {
    /// Reads below 4 GiB. The address needs no alignment.
    fn load(at: u64) -> Self;
    /// Writes below 4 GiB. The address needs no alignment.
    fn store(self, at: u64);
}

macro_rules! word {
    ($type:ty, $class:ident, $form:literal) => {
        impl Word for $type {
            fn load(at: u64) -> Self {
                let value: $type;
                // SAFETY: the first 4 GiB are mapped.
                unsafe {
                    asm!(concat!("mov {", $form, "}, [{at}]"), at = in(reg) at & BELOW_4G,
                        value = out($class) value);
                }
                value
            }

            fn store(self, at: u64) {
                // SAFETY: the first 4 GiB are mapped and writable; see the module for what lies
                // where.
                unsafe {
                    asm!(concat!("mov [{at}], {", $form, "}"), at = in(reg) at & BELOW_4G,
                        value = in($class) self);
                }
            }
        }
    };
}

const BELOW_4G: u64 = 0xffff_ffff;

word!(u8, reg_byte, "value");
word!(u16, reg, "value:x");
word!(u32, reg, "value:e");
word!(u64, reg, "value:r");

/// Reads below 4 GiB, with one instruction.
pub fn load<T: Word>(at: u64) -> T {
    T::load(at)
}

/// Writes below 4 GiB, with one instruction.
pub fn store<T: Word>(at: u64, value: T) {
    value.store(at);
}

/// Copies bytes to guest memory.
pub fn put(at: u64, bytes: &[u8]) {
    for (address, byte) in (at..).zip(bytes) {
        store(address, *byte);
    }
}

/// Fills guest memory, a multiple of 8 bytes.
pub fn fill(at: u64, count: u64, byte: u8) {
    for address in (at..at + count).step_by(8) {
        store(address, u64::from_ne_bytes([byte; 8]));
    }
}

/// Bytes that the host has put into memory before the guest began.
pub fn given(at: u64, count: usize) -> &'static [u8] {
    // SAFETY: the address is not 0, the memory is mapped, and nobody writes to it any more.
    unsafe { core::slice::from_raw_parts((at & BELOW_4G) as *const u8, count) }
}

/// Everything before is seen by the devices before everything behind.
pub fn barrier() {
    fence(Ordering::SeqCst);
}

/// Writes to a port: 1, 2 or 4 bytes.
pub fn port_write(port: u16, size: u8, value: u32) {
    // SAFETY: a port's access touches no memory of this program's.
    unsafe {
        match size {
            1 => asm!("out dx, al", in("dx") port, in("al") value as u8),
            2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value),
        }
    }
}

/// Reads a port: 1, 2 or 4 bytes.
pub fn port_read(port: u16, size: u8) -> u32 {
    let value: u32;
    // SAFETY: a port's access touches no memory of this program's.
    unsafe {
        match size {
            1 => asm!("xor eax, eax", "in al, dx", in("dx") port, out("eax") value),
            2 => asm!("xor eax, eax", "in ax, dx", in("dx") port, out("eax") value),
            _ => asm!("in eax, dx", in("dx") port, out("eax") value),
        }
    }
    value
}

/// Writes a string of `count` bytes to a port, or reads one from it.
pub fn port_string(port: u16, count: u64, write: bool) {
    // SAFETY: the string lies in the free memory.
    unsafe {
        match write {
            true => asm!("rep outsb", in("dx") port, inout("rcx") count => _,
                inout("rsi") STRING => _),
            false => asm!("rep insb", in("dx") port, inout("rcx") count => _,
                inout("rdi") STRING => _),
        }
    }
}

/// The time stamp counter.
pub fn now() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: it only reads a counter.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high) };
    u64::from(low) | u64::from(high) << 32
}

/// Sleeps for 2 ms.
pub fn rest() {
    sleep(2);
}

/// Sleeps. The timer is set for each time anew: one that goes on by itself can bury a slow host.
pub fn sleep(milliseconds: u32) {
    store(TIMER, milliseconds * TICKS);
    // SAFETY: the only interrupt is the timer's, whose handler changes no register.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Waits until `wanted`, first without a sleep; false: it was not so within [`PATIENCE`].
pub fn until(mut wanted: impl FnMut() -> bool) -> bool {
    let begun = now();
    let mut round = 0;
    while !wanted() {
        round += 1;
        if now().wrapping_sub(begun) > PATIENCE {
            return false;
        }
        match round {
            0..20 => core::hint::spin_loop(),
            _ => rest(),
        }
    }
    true
}

/// Ends the VM, by the keyboard controller's reset.
pub fn end() -> ! {
    port_write(0x64, 1, 0xfe);
    loop {
        rest();
    }
}
