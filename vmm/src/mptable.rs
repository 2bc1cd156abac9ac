//! The MP table: tells a guest without ACPI about its CPUs, its I/O APIC and its interrupts.
//!
//! Called by `machine`. Facts: MultiProcessor Specification 1.4, chapter 4; the kernel searches the
//! last KiB of the low 640 for the floating pointer (arch/x86/kernel/mpparse.c).

use vm_memory::{Bytes, GuestMemoryMmap};

use crate::layout::{IO_APIC, LOCAL_APIC, MAX_VCPUS, MP_TABLE, MP_TABLE_SIZE};

/// The I/O APIC's input pins; pin N is ISA interrupt N.
pub const PINS: u8 = 24;

const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const APIC_VERSION: u8 = 0x14;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const ALL_LOCAL_APICS: u8 = 0xff;

#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs: must be 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// Guest memory ends below the table.
    #[error("write the MP table to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Writes the table for `vcpus` CPUs. Their local APIC ids are 0 to `vcpus` - 1.
pub fn write(memory: &GuestMemoryMmap, vcpus: u8) -> Result<(), MpTableError> {
    if vcpus == 0 || vcpus > MAX_VCPUS {
        return Err(MpTableError::Vcpus(vcpus));
    }
    memory
        .write_slice(&table(vcpus), MP_TABLE)
        .map_err(MpTableError::Memory)
}

/// The floating pointer, and directly behind it the table.
fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus; // the first id that no CPU has
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for cpu in 0..vcpus {
        let flags = CPU_ENABLED | if cpu == 0 { CPU_BOOT } else { 0 };
        let mut entry = vec![ENTRY_PROCESSOR, cpu, APIC_VERSION, flags];
        // Signature and features of an old CPU with FPU and APIC; the kernel asks CPUID instead.
        entry.extend(0x600u32.to_le_bytes());
        entry.extend(0x201u32.to_le_bytes());
        entry.extend([0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![ENTRY_BUS, 0];
    bus.extend(b"ISA   ");
    entries.push(bus);
    let mut io_apic = vec![ENTRY_IO_APIC, io_apic_id, APIC_VERSION, 1];
    io_apic.extend(IO_APIC.to_le_bytes());
    entries.push(io_apic);
    for pin in 0..PINS {
        let kind = INTERRUPT_VECTORED;
        entries.push(vec![
            ENTRY_IO_INTERRUPT,
            kind,
            0,
            0,
            0,
            pin,
            io_apic_id,
            pin,
        ]);
    }
    for (kind, line) in [(INTERRUPT_EXTERNAL, 0), (INTERRUPT_NMI, 1)] {
        let target = ALL_LOCAL_APICS;
        entries.push(vec![ENTRY_LOCAL_INTERRUPT, kind, 0, 0, 0, 0, target, line]);
    }

    let body: Vec<u8> = entries.concat();
    let length = (HEADER_SIZE + body.len()) as u16;
    let mut header = Vec::with_capacity(HEADER_SIZE);
    header.extend(b"PCMP");
    header.extend(length.to_le_bytes());
    header.extend([4, 0]); // revision 1.4, checksum
    header.extend(b"KATALIKEmicroVM     ");
    header.extend([0; 6]); // no OEM table
    header.extend((entries.len() as u16).to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]); // no extended table
    let mut table = [header, body].concat();
    set_checksum(&mut table, 7);

    let mut pointer = Vec::with_capacity(POINTER_SIZE);
    pointer.extend(b"_MP_");
    let address = MP_TABLE.0 as u32 + POINTER_SIZE as u32;
    pointer.extend(address.to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]); // length 16, revision 1.4, checksum, no default
    set_checksum(&mut pointer, 10);
    [pointer, table].concat()
}

/// Sets byte `at`, which is 0 before, so that all bytes add up to 0.
fn set_checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = sum.wrapping_neg();
    }
}

const _: () = assert!(
    POINTER_SIZE + HEADER_SIZE + 20 * MAX_VCPUS as usize + 8 * (1 + 1 + PINS as usize + 2)
        <= MP_TABLE_SIZE as usize
);

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_and_lengths_hold_for_every_number_of_cpus() {
        for vcpus in 1..=MAX_VCPUS {
            let all = table(vcpus);
            let (pointer, table) = all.split_at(POINTER_SIZE);
            assert_eq!((&pointer[..4], sum(pointer)), (&b"_MP_"[..], 0));
            assert_eq!((&table[..4], sum(table)), (&b"PCMP"[..], 0));
            let claimed = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(claimed), table.len());
            assert!(all.len() as u64 <= MP_TABLE_SIZE);
            let boot_cpus = table[HEADER_SIZE..]
                .chunks(20)
                .take(usize::from(vcpus))
                .filter(|entry| entry[3] & CPU_BOOT != 0);
            assert_eq!(boot_cpus.count(), 1);
        }
    }

    #[test]
    fn no_cpu_and_too_many_are_refused() {
        let memory =
            GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 1 << 20)]).unwrap();
        for vcpus in [0, MAX_VCPUS + 1] {
            assert!(matches!(write(&memory, vcpus), Err(MpTableError::Vcpus(_))));
        }
        write(&memory, 1).unwrap();
    }
}
