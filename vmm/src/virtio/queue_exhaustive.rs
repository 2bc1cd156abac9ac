//! A ring of four: every chain of its descriptors and every index, against a walk of our own.

use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const SIZE: u16 = 4;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const MEMORY: u64 = 0x1_0000;

/// A descriptor of one byte.
#[derive(Clone, Copy)]
struct Entry {
    write: bool,
    next: Option<u16>,
    outside: bool,
}

fn memory(bytes: u64) -> GuestRam {
    let ranges = [(GuestAddress(0), bytes as usize)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn queue(memory: &GuestRam) -> Virtqueue {
    let layout = QueueLayout {
        size: SIZE.into(),
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
    };
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(event()));
    Virtqueue::new(
        layout,
        SIZE,
        false,
        memory.clone(),
        interrupt,
        Arc::new(event()),
    )
    .unwrap()
}

/// The readable and writable bytes of the chain, if it keeps the rules.
fn walked(table: &[Entry; SIZE as usize], head: u16) -> Option<(usize, usize)> {
    let (mut seen, mut sides) = ([false; SIZE as usize], (0, 0));
    let mut next = Some(head);
    while let Some(index) = next {
        let entry = table.get(usize::from(index))?;
        if std::mem::replace(&mut seen[usize::from(index)], true) || entry.outside {
            return None;
        }
        match (entry.write, sides.1) {
            (true, _) => sides.1 += 1,
            (false, 0) => sides.0 += 1,
            (false, _) => return None,
        }
        next = entry.next;
    }
    Some(sides)
}

#[test]
fn every_chain_of_four_descriptors() {
    let mut alphabet = Vec::new();
    for write in [false, true] {
        for next in [None, Some(0), Some(1), Some(2), Some(3), Some(SIZE)] {
            alphabet.push(Entry {
                write,
                next,
                outside: false,
            });
        }
    }
    alphabet.push(Entry {
        write: false,
        next: None,
        outside: true,
    });
    let memory = memory(MEMORY);
    let letters = alphabet.len();
    let mut whole = 0;
    for word in 0..letters.pow(SIZE.into()) {
        let table: [Entry; SIZE as usize] =
            std::array::from_fn(|place| alphabet[word / letters.pow(place as u32) % letters]);
        let mut bytes = Vec::with_capacity(64);
        for entry in table {
            let address = if entry.outside { MEMORY } else { 0x8000 };
            let flags = u16::from(entry.next.is_some()) | u16::from(entry.write) << 1;
            bytes.extend(address.to_le_bytes());
            bytes.extend(1u32.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(entry.next.unwrap_or(0).to_le_bytes());
        }
        memory
            .write_slice(&bytes, GuestAddress(DESCRIPTORS))
            .unwrap();
        for head in 0..=SIZE {
            let chain = Chain::walk(memory.clone(), GuestAddress(DESCRIPTORS), SIZE, head);
            let got = chain.ok().map(|chain| (chain.readable(), chain.writable()));
            assert_eq!(got, walked(&table, head), "word {word}, head {head}");
            whole += usize::from(got.is_some());
        }
    }
    assert!(whole > 1000, "{whole} good chains");
}

#[test]
fn every_available_index() {
    let memory = memory(MEMORY);
    // One readable byte each.
    for index in 0..u64::from(SIZE) {
        let at = GuestAddress(DESCRIPTORS + 16 * index);
        memory.write_obj(0x8000u64, at).unwrap();
        memory.write_obj(1u32, GuestAddress(at.0 + 8)).unwrap();
        let entry = GuestAddress(AVAILABLE + 4 + 2 * index);
        memory.write_obj(index as u16, entry).unwrap();
    }
    let mut queue = queue(&memory);
    for taken in (0..SIZE).chain(u16::MAX - SIZE..=u16::MAX) {
        for index in 0..=u16::MAX {
            queue.ring.set_next_avail(taken);
            memory
                .write_obj(index, GuestAddress(AVAILABLE + 2))
                .unwrap();
            let ahead = index.wrapping_sub(taken);
            let got = queue
                .next_chain()
                .map(|chain| chain.map(|chain| chain.head()));
            match ahead {
                0 => assert_eq!(got.unwrap(), None),
                1..=SIZE => assert_eq!(got.unwrap(), Some(taken % SIZE)),
                _ => assert!(
                    matches!(got, Err(QueueError::Ring(_))),
                    "{index} after {taken}"
                ),
            }
        }
    }
}

/// The used index goes round, and each element stands in its place.
#[test]
fn every_used_index() {
    let memory = memory(MEMORY);
    memory
        .write_obj(0x8000u64, GuestAddress(DESCRIPTORS))
        .unwrap();
    memory
        .write_obj(1u32, GuestAddress(DESCRIPTORS + 8))
        .unwrap();
    let mut queue = queue(&memory);
    for used in 0..=u16::MAX {
        let chain = Chain::walk(memory.clone(), GuestAddress(DESCRIPTORS), SIZE, 0).unwrap();
        let place = USED + 4 + 8 * u64::from(used % SIZE);
        memory.write_obj(u64::MAX, GuestAddress(place)).unwrap();
        queue.give_back(chain).unwrap();
        let now: u16 = memory.read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(now, used.wrapping_add(1));
        assert_eq!(memory.read_obj::<u64>(GuestAddress(place)).unwrap(), 0);
    }
}

/// One system call takes 1,024 buffers (UIO_MAXIOV). However a guest splits what it gives, no call
/// gets more, and all bytes pass.
#[test]
fn no_call_gets_more_buffers_than_the_kernel_takes() {
    const TABLE: u64 = 0x10_0000;
    let memory = memory(0x20_0000);
    let null = std::fs::File::options()
        .write(true)
        .open("/dev/null")
        .unwrap();
    // How many buffers of one byte, and how many empty ones before each.
    for (count, empty) in [
        (1, 0),
        (1, 200),
        (64, 0),
        (65, 0),
        (1023, 0),
        (1024, 0),
        (4096, 0),
        (60, 67),
    ] {
        let all = count * (empty + 1);
        for index in 0..all {
            let at = TABLE + 16 * index;
            let length = u64::from(index % (empty + 1) == empty);
            let (next, more) = (index + 1, u64::from(index + 1 < all));
            memory.write_obj(0x8000u64, GuestAddress(at)).unwrap();
            let second = length | more << 32 | next << 48;
            memory.write_obj(second, GuestAddress(at + 8)).unwrap();
        }
        let walk = || Chain::walk(memory.clone(), GuestAddress(TABLE), 4096, 0).unwrap();
        let mut chain = walk();
        while chain.readable() > 0 {
            let sent = chain.read_into(&null, usize::MAX).unwrap();
            assert!(
                sent > 0,
                "stuck at {} of {count} behind {empty}",
                chain.readable()
            );
        }
        let sent = walk()
            .send_packet(&null, &[0; 12])
            .map_err(|error| error.raw_os_error());
        let wanted = if count <= 1023 {
            Ok(())
        } else {
            Err(Some(libc::EMSGSIZE))
        };
        assert_eq!(sent, wanted, "{count} behind {empty}");
    }
}
