//! Raw rings against the queue: whatever a hostile driver may write into them.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::DeviceError;
use crate::virtio::chain::Malformed;

const SIZE: u16 = 8;
const MEMORY: usize = 0x1_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const BUFFERS: u64 = 0x4000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Plays the driver.
struct Driver {
    memory: GuestRam,
    available: u16,
}

impl Driver {
    fn new() -> (Self, Virtqueue) {
        Self::with(layout())
    }

    fn with(layout: QueueLayout) -> (Self, Virtqueue) {
        let driver = Self {
            memory: memory(),
            available: 0,
        };
        let queue = driver.queue(layout).unwrap();
        (driver, queue)
    }

    fn queue(&self, layout: QueueLayout) -> Result<Virtqueue, QueueError> {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(event()));
        let kick = Arc::new(event());
        Virtqueue::new(layout, SIZE, false, self.memory.clone(), interrupt, kick)
    }

    fn descriptor_at(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = GuestAddress(table + 16 * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(DESCRIPTORS, index, address, length, flags, next);
    }

    fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(self.available);
    }

    fn set_available(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(AVAILABLE + 2))
            .unwrap();
    }

    fn used(&self) -> (u16, u32, u32) {
        let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let last = USED + 4 + 8 * u64::from(index.wrapping_sub(1) % SIZE);
        (index, read(last), read(last + 4))
    }
}

fn memory() -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
}

fn layout() -> QueueLayout {
    QueueLayout {
        size: SIZE.into(),
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
    }
}

/// The queue's error for the one chain that `prepare` has put at descriptor 0.
fn malformed(prepare: impl FnOnce(&Driver)) -> Malformed {
    let (mut driver, mut queue) = Driver::new();
    prepare(&driver);
    driver.offer(0);
    match queue.next_chain() {
        Err(QueueError::Chain(malformed)) => malformed,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_request_is_read_answered_and_given_back() {
    let (mut driver, mut queue) = Driver::new();
    driver
        .memory
        .write_slice(b"question", GuestAddress(BUFFERS))
        .unwrap();
    driver.descriptor(2, BUFFERS, 3, NEXT, 4);
    driver.descriptor(4, BUFFERS + 3, 5, NEXT, 0);
    driver.descriptor(0, BUFFERS + 0x100, 2, WRITE | NEXT, 7);
    driver.descriptor(7, BUFFERS + 0x200, 10, WRITE, 0);
    driver.offer(2);
    let mut chain = queue.next_chain().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (8, 12));
    let mut question = [0; 8];
    chain.read_exact(&mut question).unwrap();
    assert_eq!(&question, b"question");
    assert!(matches!(
        chain.read_exact(&mut [0]),
        Err(Malformed::Short { wanted: 1, held: 0 })
    ));
    chain.write_all(b"answer").unwrap();
    assert!(chain.write_all(&[0; 7]).is_err());
    queue.give_back(chain).unwrap();
    queue.signal().unwrap();
    assert_eq!(driver.used(), (1, 2, 6));
    let mut answer = [0; 4];
    driver
        .memory
        .read_slice(&mut answer, GuestAddress(BUFFERS + 0x200))
        .unwrap();
    assert_eq!(&answer, b"swer");
    assert!(queue.next_chain().unwrap().is_none());
}

#[test]
fn a_chain_put_back_comes_again() {
    let (mut driver, mut queue) = Driver::new();
    driver.descriptor(3, BUFFERS, 1, 0, 0);
    driver.offer(3);
    let chain = queue.next_chain().unwrap().unwrap();
    queue.undo(chain);
    assert_eq!(queue.next_chain().unwrap().unwrap().head(), 3);
}

/// Chains given back at once raise one interrupt if the driver waits for any of them.
#[test]
fn several_chains_are_given_back_at_once() {
    let (mut driver, _) = Driver::new();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(event()));
    let (memory, kick) = (driver.memory.clone(), Arc::new(event()));
    let made = Virtqueue::new(layout(), SIZE, true, memory, interrupt.clone(), kick);
    let mut queue = made.unwrap();
    // The driver waits for the used element of this index, the middle one of the second three.
    let waits_for = GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE));
    driver.memory.write_obj(4u16, waits_for).unwrap();
    for round in 1..=4u16 {
        let mut chains = Vec::new();
        for head in 0..3 {
            driver.descriptor(head, BUFFERS, 10, WRITE, 0);
            driver.offer(head);
            let mut chain = queue.next_chain().unwrap().unwrap();
            chain.write_all(&[7; 4]).unwrap();
            chains.push(chain);
        }
        queue.give_back_all(chains).unwrap();
        assert_eq!(driver.used(), (3 * round, 2, 4));
        queue.signal().unwrap();
        assert_eq!(interrupt.irq().read().is_ok(), round == 2, "{round}");
    }
}

#[test]
fn an_indirect_table_is_followed() {
    let (mut driver, mut queue) = Driver::new();
    driver.descriptor(0, BUFFERS, 32, INDIRECT, 0);
    driver.descriptor_at(BUFFERS, 0, BUFFERS + 0x100, 4, NEXT, 1);
    driver.descriptor_at(BUFFERS, 1, BUFFERS + 0x200, 6, WRITE, 0);
    driver.offer(0);
    let chain = queue.next_chain().unwrap().unwrap();
    assert_eq!((chain.readable(), chain.writable()), (4, 6));
}

#[test]
fn bytes_pass_between_a_chain_and_a_socket() {
    use std::io::{Read, Write};
    let (mut driver, mut queue) = Driver::new();
    driver
        .memory
        .write_slice(b"to the host", GuestAddress(BUFFERS))
        .unwrap();
    driver.descriptor(0, BUFFERS, 3, NEXT, 1);
    driver.descriptor(1, BUFFERS + 3, 8, NEXT, 2);
    driver.descriptor(2, BUFFERS + 0x100, 4, WRITE | NEXT, 3);
    driver.descriptor(3, BUFFERS + 0x200, 100, WRITE, 0);
    driver.offer(0);
    let mut chain = queue.next_chain().unwrap().unwrap();
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(chain.read_into(&ours, 6).unwrap(), 6);
    assert_eq!(chain.read_into(&ours, 100).unwrap(), 5);
    let mut got = [0; 11];
    theirs.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"to the host");
    theirs.write_all(b"to the guest").unwrap();
    assert_eq!(chain.write_from(&ours, 9).unwrap(), 9);
    assert_eq!(chain.write_from(&ours, 100).unwrap(), 3);
    assert_eq!((chain.written(), chain.writable()), (12, 92));
    drop(theirs);
    assert_eq!(chain.write_from(&ours, 100).unwrap(), 0);
}

#[test]
fn a_loop_is_an_error() {
    let found = malformed(|driver| {
        driver.descriptor(0, BUFFERS, 1, NEXT, 1);
        driver.descriptor(1, BUFFERS, 1, NEXT, 0);
    });
    assert_eq!(found, Malformed::Loop(SIZE));
}

#[test]
fn an_index_outside_of_its_table_is_an_error() {
    let found = malformed(|driver| driver.descriptor(0, BUFFERS, 1, NEXT, SIZE));
    assert_eq!(
        found,
        Malformed::Index {
            index: SIZE,
            size: SIZE
        }
    );
    let (mut driver, mut queue) = Driver::new();
    driver.offer(u16::MAX);
    assert!(matches!(
        queue.next_chain(),
        Err(QueueError::Chain(Malformed::Index { .. }))
    ));
}

#[test]
fn a_buffer_outside_of_memory_is_an_error() {
    for (address, length) in [
        (MEMORY as u64, 1),
        (MEMORY as u64 - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
        (0, u32::MAX),
    ] {
        let found = malformed(|driver| driver.descriptor(0, address, length, 0, 0));
        assert_eq!(found, Malformed::Outside { address, length });
    }
}

#[test]
fn bad_indirect_tables_are_errors() {
    let nested = malformed(|driver| {
        driver.descriptor(0, BUFFERS, 16, INDIRECT, 0);
        driver.descriptor_at(BUFFERS, 0, BUFFERS, 16, INDIRECT, 0);
    });
    assert_eq!(nested, Malformed::Indirect(16));
    for length in [0, 15, 17, 16 * (u32::from(SIZE) + 1), u32::MAX] {
        let found = malformed(|driver| driver.descriptor(0, BUFFERS, length, INDIRECT, 0));
        assert_eq!(found, Malformed::Indirect(length));
    }
    let with_next = malformed(|driver| driver.descriptor(0, BUFFERS, 16, INDIRECT | NEXT, 1));
    assert_eq!(with_next, Malformed::Indirect(16));
    let outside = malformed(|driver| driver.descriptor(0, u64::MAX - 8, 32, INDIRECT, 0));
    assert!(matches!(outside, Malformed::Outside { .. }));
}

#[test]
fn readable_after_writable_is_an_error() {
    let found = malformed(|driver| {
        driver.descriptor(0, BUFFERS, 1, WRITE | NEXT, 1);
        driver.descriptor(1, BUFFERS, 1, 0, 0);
    });
    assert_eq!(found, Malformed::Order);
}

#[test]
fn an_available_index_too_far_ahead_is_an_error() {
    for index in [SIZE + 1, u16::MAX] {
        let (driver, mut queue) = Driver::new();
        driver.set_available(index);
        assert!(
            matches!(queue.next_chain(), Err(QueueError::Ring(_))),
            "{index}"
        );
    }
}

#[test]
fn rings_outside_of_memory_or_misaligned_are_refused() {
    let (driver, _) = Driver::new();
    let end = MEMORY as u64;
    for bad in [
        QueueLayout {
            size: 0,
            ..layout()
        },
        QueueLayout {
            size: 3,
            ..layout()
        },
        QueueLayout {
            size: 16,
            ..layout()
        },
        QueueLayout {
            size: 1 << 16,
            ..layout()
        },
        QueueLayout {
            descriptors: DESCRIPTORS + 8,
            ..layout()
        },
        QueueLayout {
            descriptors: end - 16,
            ..layout()
        },
        QueueLayout {
            available: AVAILABLE + 1,
            ..layout()
        },
        QueueLayout {
            available: 0,
            ..layout()
        },
        QueueLayout {
            available: u64::MAX - 1,
            ..layout()
        },
        QueueLayout {
            used: USED + 2,
            ..layout()
        },
        QueueLayout {
            used: end - 4,
            ..layout()
        },
    ] {
        assert!(driver.queue(bad).is_err(), "{bad:?}");
    }
}

/// A driver that never stops offering gets its turn, and not the thread.
#[test]
fn one_turn_is_bounded() {
    let (mut driver, mut queue) = Driver::new();
    driver.descriptor(0, BUFFERS, 1, WRITE, 0);
    driver.offer(0);
    let mut served = 0;
    let result: Result<(), DeviceError> = queue.serve(|chain| {
        served += 1;
        driver.offer(0);
        Ok(Served::Done(chain))
    });
    result.unwrap();
    assert_eq!(served, SIZE);
    assert!(queue.kick().read().is_ok(), "the rest has its turn later");
}

proptest! {
    /// Whatever bytes are in the rings, the queue gives chains that lie in memory, or an error. It
    /// never panics, gives more chains than the ring has entries, or touches a byte outside the
    /// buffers.
    #[test]
    fn no_ring_breaks_the_queue(
        rings in proptest::collection::vec(any::<u8>(), 0x3000),
        small in proptest::collection::vec((0u16..12, 0u64..0x1_1000, 0u32..0x2000, 0u16..8, 0u16..10), 0..20),
        heads in proptest::collection::vec(0u16..10, 0..12),
        noise in any::<bool>(),
    ) {
        let (mut driver, mut queue) = Driver::new();
        if noise {
            driver.memory.write_slice(&rings, GuestAddress(DESCRIPTORS)).unwrap();
        }
        for (index, address, length, flags, next) in small {
            driver.descriptor(index, address, length, flags, next);
        }
        for head in heads {
            driver.offer(head);
        }
        let mut taken = 0;
        while let Ok(Some(mut chain)) = queue.next_chain() {
            taken += 1;
            prop_assert!(taken <= SIZE);
            prop_assert!(chain.readable() <= usize::from(SIZE) * MEMORY);
            let mut bytes = vec![0; chain.readable()];
            chain.read_exact(&mut bytes).unwrap();
            if queue.give_back(chain).is_err() || queue.signal().is_err() {
                break;
            }
        }
    }
}
