//! Accesses of every size to all of the map: the registers of devices, their holes, ports.

use crate::dice::Dice;
use crate::machine::{load, port_read, port_string, port_write, store};
use crate::say;
use crate::transport::{MMIO, SLOT_SIZE, SLOTS, STATUS};

/// The hole below 4 GiB. KVM's own controllers at its end are not the VMM's.
const HOLE: (u64, u64) = (0xc000_0000, 0xfec0_0000);
const BEHIND: (u64, u64) = (0xff00_0000, 0xfff0_0000);

/// A write of this value to this port ends the VM, as it should.
const RESET: (u16, u8) = (0x64, 0xfe);

/// The longest string to or from a port: each of its bytes may be an exit.
const STRING: u64 = 32;

/// Registers, and where the configuration begins.
const NAMED: [u64; 24] = [
    0, 4, 8, 0xc, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80,
    0x84, 0x90, 0x94, 0xa0, 0xa4, 0xfc, 0x100,
];

/// `count` accesses; every second one is a write.
pub fn attack(count: u64) {
    say!("attack 0 registers: {count} accesses of all sizes");
    let mut dice = Dice::new(41);
    for round in 0..count {
        if dice.below(8) == 0 {
            port(&mut dice);
        } else {
            memory(&mut dice);
        }
        if round % 10_000 == 9_999 {
            say!("{} accesses", round + 1);
        }
    }
    for slot in 0..SLOTS {
        store(MMIO + slot * SLOT_SIZE + STATUS, 0_u32);
    }
}

fn memory(dice: &mut Dice) {
    let slot = MMIO + dice.below(SLOTS) * SLOT_SIZE;
    let at = match dice.below(8) {
        0 => HOLE.0 + dice.below(HOLE.1 - HOLE.0),
        1 => BEHIND.0 + dice.below(BEHIND.1 - BEHIND.0),
        // Over the border of two slots, and behind the last.
        2 => slot + SLOT_SIZE - 1 - dice.below(8),
        3 => slot + dice.below(SLOT_SIZE),
        4 => slot + 0x100 + dice.below(64),
        _ => slot + dice.one_of(&NAMED),
    };
    let value = dice.number();
    match (dice.below(2), dice.one_of(&[0, 1, 2, 2, 2, 2, 3])) {
        (0, 0) => drop(load::<u8>(at)),
        (0, 1) => drop(load::<u16>(at)),
        (0, 2) => drop(load::<u32>(at)),
        (0, _) => drop(load::<u64>(at)),
        (_, 0) => store(at, value as u8),
        (_, 1) => store(at, value as u16),
        (_, 2) => store(at, value as u32),
        (_, _) => store(at, value),
    }
}

fn port(dice: &mut Dice) {
    let any = dice.below(1 << 16) as u16;
    let port = dice.one_of(&[
        any, 0x60, 0x64, 0x70, 0x71, 0x3f8, 0xcf8, 0xcfc, 0x92, 0xffff,
    ]);
    let size = dice.one_of(&[1, 2, 4]);
    // KVM's own controllers: an interrupt that nobody expects would end this guest.
    if (0x20..0x24).contains(&port)
        || (0xa0..0xa4).contains(&port)
        || (0x4ce..0x4d4).contains(&port)
    {
        return;
    }
    let value = dice.number() as u32;
    match dice.below(8) {
        0 if port != RESET.0 => port_string(port, 1 + dice.below(STRING), true),
        1 => port_string(port, 1 + dice.below(STRING), false),
        2..5 => drop(port_read(port, size)),
        _ if (port, value as u8) == RESET => {}
        _ => port_write(port, size, value),
    }
}
