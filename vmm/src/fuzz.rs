//! What a fuzzer may throw at the VMM: each function takes arbitrary bytes and must return.
//!
//! The crate `kata-like-fuzz` runs them. `input` turns bytes into decisions, `driver` lets them
//! write a guest's memory and rings, `devices` has the targets that work on rings. Here are the
//! others: registers, the guest's log, and the two files that a guest is booted from.

mod devices;
mod driver;
mod input;
mod vsock;

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};

use kata_like_boot::PrintkLayout;
use rustix::event::epoll::{self, CreateFlags};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::bus::Bus;
use crate::initrd::archive;
use crate::kernel;
use crate::layout::{MIN_MEMORY, MMIO_BASE, ram_ranges, slot_address};
use crate::log::GuestLog;
use crate::virtio::life::Life;
use crate::virtio::mmio::Slot;
use crate::virtio::rng::Entropy;

pub use devices::{block, net, queue};
pub use vsock::vsock;

use driver::{Driver, event};
use input::Input;

/// How many slots the bus has: the first holds a device, the others none.
const SLOTS: usize = 3;

/// Any access to any address, of any size and in any order, and a guest that fills its rings
/// meanwhile.
pub fn bus(data: &[u8]) {
    // One thread for all runs: it never ends.
    static LIFE: LazyLock<Life> = LazyLock::new(|| Life::start(|| ()).expect("start a thread"));
    let mut input = Input::new(data);
    let mut driver = Driver::new(1);
    let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC).expect("make an epoll set"));
    let slot = |index| {
        let (memory, interrupt) = (driver.memory.clone(), driver.interrupt.clone());
        let kicks = vec![Arc::new(event())];
        Arc::new(Slot::new(index, memory, interrupt, epoll.clone(), kicks))
    };
    let slots: Arc<[Arc<Slot>]> = (0..SLOTS).map(slot).collect();
    slots[0].fill(Box::new(Entropy)).expect("fill a slot");
    let bus = Bus::new(slots.clone(), LIFE.clone());
    while !input.is_empty() {
        let act = input.byte();
        let mut bytes = [0; 8];
        let part = &mut bytes[..usize::from(act >> 4) % 8 + 1];
        match act % 16 {
            0 | 1 => bus.read(address(&mut input), part),
            2..=4 => {
                let value = input.bytes(4);
                let mut bytes = [0; 4];
                bytes[..value.len()].copy_from_slice(value);
                let register = slot_address(0) + u64::from(input.byte() & !3);
                bus.write(register, &bytes).expect("write a register");
            }
            5 | 6 => {
                part.fill(input.byte());
                bus.write(address(&mut input), part).expect("write");
            }
            7 => bus.port_read(input.half(), part),
            8 => {
                part.fill(input.byte());
                let _ = bus.port_write(input.half(), part);
            }
            9 => {
                // An honest driver's way to a device at work.
                for (register, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
                    let at = slot_address(0) + register;
                    bus.write(at, &u32::to_le_bytes(value)).expect("negotiate");
                }
                let layout = driver.layout(0);
                let registers = [
                    (0x38, u64::from(layout.size)),
                    (0x80, layout.descriptors),
                    (0x90, layout.available),
                    (0xa0, layout.used),
                    (0x44, 1),
                    (0x70, 15),
                ];
                for (register, value) in registers {
                    let at = slot_address(0) + register;
                    bus.write(at, &(value as u32).to_le_bytes())
                        .expect("set up");
                }
            }
            10 | 11 => slots[usize::from(act >> 4) % SLOTS]
                .ready(input.word())
                .expect("a device's event"),
            12 => {
                let _ = slots[0].empty();
                let _ = slots[0].fill(Box::new(Entropy));
            }
            _ => driver.act(&mut input),
        }
    }
}

/// Most often one of the slots' registers.
fn address(input: &mut Input) -> u64 {
    match input.byte() % 8 {
        0 => input.long(),
        choice => MMIO_BASE + u64::from(choice) * 0x800 + u64::from(input.half() & 0x7ff),
    }
}

const RING: u64 = 0x1000;
const DESCRIPTORS: u64 = 0x2000;
const INFOS: u64 = 0x3000;
const TEXT: u64 = 0x8000;
const TEXT_MAP: u64 = 0xffff_ffff_8000_0000;

/// Rings of the kernel's log as no kernel writes them.
pub fn log(data: &[u8]) {
    let layout = PrintkLayout {
        prb: 0x800,
        desc_ring: 0,
        text_ring: 0x40,
        count_bits: 0,
        descs: 8,
        infos: 16,
        head_id: 24,
        tail_id: 32,
        size_bits: 0,
        data: 8,
        desc_size: 24,
        desc_state: 0,
        desc_begin: 8,
        desc_next: 16,
        info_size: 32,
        info_seq: 0,
        info_time: 8,
        info_text_len: 16,
        info_level: 19,
    };
    let mut input = Input::new(data);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("memory");
    let memory = Arc::new(memory);
    // Beyond the end of memory nothing is written.
    let put = |address: u64, value: u64| {
        let _ = memory.write_obj(value, GuestAddress(address));
    };
    put(0x800, TEXT_MAP + RING);
    put(RING, 3);
    put(RING + 8, TEXT_MAP + DESCRIPTORS);
    put(RING + 16, TEXT_MAP + INFOS);
    put(RING + 0x40, 8);
    put(RING + 0x48, TEXT_MAP + TEXT);
    let mut log = GuestLog::new(Some(layout), memory.clone());
    while !input.is_empty() {
        match input.byte() % 8 {
            0 => put(u64::from(input.half()), input.long()),
            1 => put(RING + u64::from(input.byte() & 0x78), input.long()),
            2 => put(RING, u64::from(input.byte() % 24)),
            3 => put(RING + 0x40, u64::from(input.byte() % 28)),
            4 | 5 => {
                let id = u64::from(input.byte());
                let (begin, length) = (u64::from(input.half()), u64::from(input.half()));
                let descriptor = DESCRIPTORS + 24 * (id % 8);
                put(descriptor, 2 << 62 | id);
                put(descriptor + 8, begin);
                put(descriptor + 16, begin + length);
                let info = INFOS + 32 * (id % 8);
                put(info, id);
                put(info + 16, u64::from(input.half()));
                put(RING + 24, id);
            }
            6 => {
                let at = TEXT + u64::from(input.half() & 0x3ff);
                let length = usize::from(input.byte());
                let _ = memory.write_slice(input.bytes(length), GuestAddress(at));
            }
            _ => look(&mut log),
        }
    }
    look(&mut log);
}

fn look(log: &mut GuestLog) {
    let news = log.news();
    assert!(news.text.len() < 40 << 10, "{} bytes", news.text.len());
    let tail = log.tail();
    assert!(tail.len() <= 20 && tail.iter().all(|line| line.len() < 1100));
    let panic = log.panic();
    assert!(panic.is_none_or(|line| line.len() <= 1024));
}

/// The kernel's file.
pub fn elf(data: &[u8]) {
    let bytes = usize::try_from(MIN_MEMORY).expect("it fits");
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
    let initrd = file(&archive(&["init"]));
    let _ = kernel::load(&memory, &ram_ranges(MIN_MEMORY), file(data), initrd);
}

/// The initrd's file.
pub fn cpio(data: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("memory");
    let data = &data[..data.len().min(0xf000)];
    let start = GuestAddress(0x1000);
    memory.write_slice(data, start).expect("write the file");
    let _ = crate::initrd::check(&memory, start.0, data.len() as u64);
}

fn file(bytes: &[u8]) -> OwnedFd {
    let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("make a file");
    let mut file = File::from(memory);
    file.write_all(bytes).expect("write a file");
    file.rewind().expect("rewind a file");
    file.into()
}
