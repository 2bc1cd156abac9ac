//! What is left of a PC: the keyboard controller's reset line.
//!
//! A guest without ACPI asks for a reset there (`reboot=k`; the kernel's `mach_reboot` waits until
//! status bit 1 is clear, then sends command 0xfe). Called by `bus`. There is no serial port, RTC
//! or PIT: their ports read as all ones.

const KEYBOARD_COMMAND: u16 = 0x64;
const RESET_CPU: u8 = 0xfe;
const STATUS_IDLE: u8 = 0;
const NOTHING_THERE: u8 = 0xff;

/// What an access of the guest does beyond changing a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    /// The guest asks for a reset of the machine.
    Reset,
}

/// The byte that a read of the port gives.
pub fn read(port: u16) -> u8 {
    match port {
        KEYBOARD_COMMAND => STATUS_IDLE,
        _ => NOTHING_THERE,
    }
}

/// A write of one, two or four bytes, or a string of them.
pub fn write(port: u16, data: &[u8]) -> Effect {
    match (port, data) {
        (KEYBOARD_COMMAND, [RESET_CPU, ..]) => Effect::Reset,
        _ => Effect::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        assert_eq!(write(KEYBOARD_COMMAND, &[RESET_CPU]), Effect::Reset);
        for (port, data) in [
            (KEYBOARD_COMMAND, &[0xd1][..]),
            (KEYBOARD_COMMAND, &[]),
            (0x60, &[RESET_CPU]),
        ] {
            assert_eq!(write(port, data), Effect::None);
        }
        assert_eq!(read(KEYBOARD_COMMAND) & 2, 0);
    }
}
