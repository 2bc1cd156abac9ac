//! The status machine against a model, and every register against any access.

use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use rustix::event::epoll::{CreateFlags, create};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::registers::{MAGIC, VERSION};
use super::*;
use crate::virtio::RING_FEATURES;

const MEMORY: usize = 0x1_0000;

/// What happened to the device, as seen from outside.
#[derive(Default)]
struct Seen {
    activated: AtomicU32,
    reset: AtomicU32,
    notified: AtomicU32,
}

struct Dummy {
    seen: Arc<Seen>,
}

impl Device for Dummy {
    fn kind(&self) -> Kind {
        Kind::Entropy
    }
    fn features(&self) -> u64 {
        RING_FEATURES
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 4]
    }
    fn config(&self) -> &[u8] {
        b"configuration"
    }
    fn activate(self: Box<Self>, guest: Activation) -> Result<Box<dyn Active>, DeviceError> {
        assert_ne!(guest.features & FEATURE_VERSION_1, 0);
        assert_eq!(guest.features & !RING_FEATURES, 0);
        self.seen.activated.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Running { seen: self.seen }))
    }
}

struct Running {
    seen: Arc<Seen>,
}

impl Active for Running {
    fn notified(&mut self, queue: u16) -> Result<(), DeviceError> {
        self.seen.notified.fetch_add(1, Ordering::Relaxed);
        match queue {
            0 => Ok(()),
            _ => Err(DeviceError::Guest { rule: "a test" }),
        }
    }
    fn ready(&mut self, _: Token) -> Result<(), DeviceError> {
        Err(DeviceError::host("a test", "the host's failure"))
    }
    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        self.seen.reset.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Dummy { seen: self.seen }))
    }
}

/// One slot, and the driver's view of it.
struct World {
    slot: Slot,
    seen: Arc<Seen>,
}

impl World {
    fn empty() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Arc::new(Interrupt::new(irq));
        let epoll = Arc::new(create(CreateFlags::CLOEXEC).unwrap());
        let kick = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let kicks = vec![kick(), kick()];
        Self {
            slot: Slot::new(3, Arc::new(memory), interrupt, epoll, kicks),
            seen: Arc::default(),
        }
    }

    fn new() -> Self {
        let world = Self::empty();
        let seen = world.seen.clone();
        world.slot.fill(Box::new(Dummy { seen })).unwrap();
        world
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0xaa; 4];
        self.slot.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        self.write_bytes(offset, &value.to_le_bytes());
    }

    fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        if let Some(switch) = self.slot.write(offset, bytes) {
            self.slot.switch(switch).unwrap();
        }
    }

    fn negotiate(&self) {
        self.write(0x70, ACKNOWLEDGE);
        self.write(0x70, ACKNOWLEDGE | DRIVER);
        self.write(0x24, 1);
        self.write(0x20, 1); // VIRTIO_F_VERSION_1
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&self, queue: u32, size: u32, base: u32) {
        self.write(0x30, queue);
        self.write(0x38, size);
        self.write(0x80, base);
        self.write(0x90, base + 0x400);
        self.write(0xa0, base + 0x800);
        self.write(0x44, 1);
    }

    fn switch_on(&self) {
        self.negotiate();
        self.set_queue(0, 8, 0x1000);
        self.set_queue(1, 4, 0x2000);
        self.write(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn count(&self, counter: fn(&Seen) -> &AtomicU32) -> u32 {
        counter(&self.seen).load(Ordering::Relaxed)
    }
}

#[test]
fn a_driver_by_the_book_switches_the_device_on() {
    let world = World::new();
    assert_eq!(
        (world.read(0), world.read(4), world.read(8)),
        (MAGIC, VERSION, 4)
    );
    world.switch_on();
    assert_eq!(
        world.read(0x70),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    );
    assert_eq!(world.count(|seen| &seen.activated), 1);
    world.slot.ready(QUEUE_TOKENS).unwrap();
    assert_eq!(world.count(|seen| &seen.notified), 1);
    world.write(0x70, 0);
    assert_eq!((world.read(0x70), world.count(|seen| &seen.reset)), (0, 1));
    world.switch_on();
    assert_eq!(world.count(|seen| &seen.activated), 2);
}

#[test]
fn an_empty_slot_is_a_placeholder_until_it_is_filled() {
    let world = World::empty();
    assert_eq!(
        (world.read(0), world.read(4), world.read(8)),
        (MAGIC, VERSION, 0)
    );
    world.switch_on();
    assert_eq!(world.read(0x70), 0);
    let seen = world.seen.clone();
    let device = Box::new(Dummy { seen: seen.clone() });
    world.slot.fill(device).unwrap();
    assert!(matches!(
        world.slot.fill(Box::new(Dummy { seen })),
        Err(SlotError::Taken(3))
    ));
    world.switch_on();
    assert_eq!(world.count(|seen| &seen.activated), 1);
}

/// A device is taken out only when no driver holds it; the slot then serves another one.
#[test]
fn a_slot_is_emptied_when_its_driver_has_let_go() {
    let world = World::new();
    for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
        world.write(0x70, status);
    }
    assert!(matches!(world.slot.empty(), Err(SlotError::Held(3))));
    world.write(0x70, 0);
    world.switch_on();
    assert!(matches!(world.slot.empty(), Err(SlotError::Held(3))));
    world.write(0x70, 0);
    world.write(0x70, ACKNOWLEDGE); // as a bus does without a driver
    world.slot.empty().unwrap();
    assert!(world.slot.is_empty());
    assert_eq!((world.read(0x08), world.read(0x70)), (0, 0));
    assert!(matches!(world.slot.empty(), Err(SlotError::Empty(3))));
    let seen = world.seen.clone();
    world.slot.fill(Box::new(Dummy { seen })).unwrap();
    world.switch_on();
    assert_eq!(world.count(|seen| &seen.activated), 2);
}

/// All 256 values that the register may hold, with all that may be written, against the rules as
/// the standard has them: bit by bit, from what was there and what is wanted.
#[test]
fn every_write_to_every_status() {
    let world = World::new();
    let mut transport = world.slot.lock();
    for (before, value, acceptable) in (0..=255u32)
        .flat_map(|before| (0..=255u32).map(move |value| (before, value)))
        .flat_map(|(before, value)| [false, true].map(|features| (before, value, features)))
    {
        transport.status = before;
        transport.driver_features = if acceptable { FEATURE_VERSION_1 } else { 0 };
        let now = |bit, allowed: bool| before & bit != 0 || value & bit != 0 && allowed;
        let acknowledged = now(ACKNOWLEDGE, true);
        let driver = now(DRIVER, acknowledged);
        let features = now(FEATURES_OK, acknowledged && driver && acceptable);
        let before_this = before & FEATURES_OK != 0;
        let running = now(DRIVER_OK, acknowledged && driver && before_this);
        let bits = [
            (ACKNOWLEDGE, acknowledged),
            (DRIVER, driver),
            (FEATURES_OK, features),
            (DRIVER_OK, running),
            (FAILED, now(FAILED, true)),
        ];
        let lost = before & (FAILED | NEEDS_RESET) != 0;
        let set = bits.iter().filter(|(_, set)| *set && !lost);
        let wanted = set.fold(0, |all, (bit, _)| all | bit) & !before;
        let added = transport.admitted(value);
        assert_eq!(added, wanted, "{value:#x} on {before:#x}, {acceptable}");
        // An idle device is switched on by this bit, and off by nothing.
        let on = value != 0 && wanted & DRIVER_OK != 0;
        assert_eq!(transport.switches(value), on, "{value:#x} on {before:#x}");
    }
}

#[test]
fn features_are_only_accepted_if_offered_and_modern() {
    for (low, high, good) in [
        (0, 1, true),
        (1 << 28, 1, true),
        (0, 0, false),
        (1, 1, false),
        (0, 3, false),
    ] {
        let world = World::new();
        world.write(0x70, ACKNOWLEDGE);
        world.write(0x70, DRIVER);
        for (select, bits) in [(0, low), (1, high), (2, u32::MAX)] {
            world.write(0x24, select);
            world.write(0x20, bits);
        }
        world.write(0x70, FEATURES_OK);
        assert_eq!(
            world.read(0x70) & FEATURES_OK != 0,
            good,
            "{low:#x} {high:#x}"
        );
    }
}

#[test]
fn everything_is_frozen_once_the_device_is_on() {
    let world = World::new();
    world.switch_on();
    let before = world
        .slot
        .lock()
        .queues
        .iter()
        .map(|queue| queue.layout)
        .collect::<Vec<_>>();
    world.set_queue(0, 2, 0x8000);
    world.write(0x44, 0);
    world.write(0x24, 0);
    world.write(0x20, u32::MAX);
    let transport = world.slot.lock();
    let after = transport
        .queues
        .iter()
        .map(|queue| queue.layout)
        .collect::<Vec<_>>();
    assert_eq!(before, after);
    assert!(transport.queues.iter().all(|queue| queue.ready));
    assert_eq!(transport.driver_features, FEATURE_VERSION_1);
}

#[test]
fn bad_rings_never_reach_the_device() {
    let world = World::new();
    world.negotiate();
    world.set_queue(0, 8, MEMORY as u32 - 16);
    world.write(0x70, DRIVER_OK);
    assert_eq!(world.count(|seen| &seen.activated), 0);
    assert_ne!(world.read(0x70) & NEEDS_RESET, 0);
    assert_eq!(world.read(0x60), Interrupt::CONFIG);
    world.write(0x70, 0);
    assert_eq!((world.read(0x70), world.read(0x60)), (0, 0));
    world.switch_on();
    assert_eq!(world.count(|seen| &seen.activated), 1);
}

#[test]
fn a_driver_that_has_left_out_a_queue_may_try_again() {
    let world = World::new();
    for queues in 0..2 {
        world.negotiate();
        for queue in 0..queues {
            world.set_queue(queue, 4, 0x1000 * (queue + 1));
        }
        world.write(0x70, DRIVER_OK);
        assert_ne!(world.read(0x70) & NEEDS_RESET, 0);
        assert_eq!(world.count(|seen| &seen.activated), 0);
        world.write(0x70, 0);
    }
    world.switch_on();
    assert_eq!(world.count(|seen| &seen.activated), 1);
}

#[test]
fn a_driver_at_fault_must_reset_and_a_failing_host_is_told() {
    let world = World::new();
    world.switch_on();
    world.slot.ready(QUEUE_TOKENS + 1).unwrap();
    assert_ne!(world.read(0x70) & NEEDS_RESET, 0);
    assert_eq!(world.count(|seen| &seen.reset), 1);
    world.slot.ready(QUEUE_TOKENS).unwrap();
    world.slot.ready(7).unwrap(); // stale: the device is idle
    assert_eq!(world.count(|seen| &seen.notified), 1);
    world.write(0x70, 0);
    world.switch_on();
    assert!(matches!(world.slot.ready(7), Err(DeviceError::Host { .. })));
}

/// Only these two writes are more than registers, and only where they have an effect.
#[test]
fn what_switches_a_device_is_left_to_another_thread() {
    let world = World::new();
    let status = |value: u32| world.slot.write(0x70, &value.to_le_bytes());
    assert_eq!(status(0), None);
    world.negotiate();
    assert_eq!(status(FAILED | DRIVER), None);
    world.write(0x70, 0);
    world.negotiate();
    world.set_queue(0, 8, 0x1000);
    world.set_queue(1, 4, 0x2000);
    let all = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
    let on = status(all).unwrap();
    assert_eq!(on, Switch(all));
    assert_eq!(world.count(|seen| &seen.activated), 0);
    world.slot.switch(on).unwrap();
    // A switch that another vCPU has overtaken does nothing.
    world.slot.switch(on).unwrap();
    assert_eq!(world.count(|seen| &seen.activated), 1);
    assert_eq!(status(all), None);
    assert_eq!(status(0), Some(Switch(0)));
}

/// A device that is being switched has its slot's lock for as long as the host takes.
#[test]
fn the_loop_never_waits_for_a_device() {
    let world = World::new();
    world.switch_on();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let switched = world.slot.lock();
        let slot = &world.slot;
        scope.spawn(move || {
            slot.ready(QUEUE_TOKENS).unwrap();
            slot.ready(7).unwrap();
            assert!(slot.queue_states().is_empty() && !slot.is_empty());
            assert!(matches!(slot.empty(), Err(SlotError::Held(3))));
            tell.send(()).unwrap();
        });
        let went_on = told.recv_timeout(std::time::Duration::from_secs(10));
        drop(switched);
        went_on.unwrap();
    });
    assert_eq!(world.count(|seen| &seen.notified), 0);
    world.slot.ready(QUEUE_TOKENS).unwrap();
    assert_eq!(world.count(|seen| &seen.notified), 1);
}

#[test]
fn the_configuration_is_read_at_any_offset_and_size() {
    let world = World::new();
    let mut bytes = [0; 8];
    world.slot.read(0x100 + 9, &mut bytes);
    assert_eq!(&bytes, b"tion\0\0\0\0");
    let mut byte = [0];
    world.slot.read(0x100, &mut byte);
    assert_eq!(&byte, b"c");
    world.slot.read(0xfff, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn an_interrupt_is_pending_until_acknowledged() {
    let world = World::new();
    world.slot.interrupt.raise(Interrupt::USED);
    assert_eq!(world.read(0x60), 1);
    assert!(world.slot.interrupt.irq().read().is_ok());
    world.write(0x64, 1);
    assert_eq!(world.read(0x60), 0);
}

/// An access that a driver may make, mostly to registers that matter.
fn access() -> impl Strategy<Value = (u64, u32)> {
    let registers = prop::sample::select(vec![
        0x14u64, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4,
    ]);
    let values = prop_oneof![
        0u32..16,
        Just(64),
        Just(128),
        (0u32..16).prop_map(|page| page << 12),
        any::<u32>()
    ];
    (registers, values)
}

proptest! {
    /// After any sequence of writes: each status bit implies those it builds on, only a reset has
    /// cleared one, and a running device got modern features and both feature words.
    #[test]
    fn the_status_machine_keeps_its_order(writes in proptest::collection::vec(access(), 1..200)) {
        let world = World::new();
        let mut before = 0;
        for (offset, value) in writes {
            let frozen = world.slot.lock().driver_features;
            world.write(offset, value);
            let status = world.read(0x70);
            if offset == 0x70 && value == 0 {
                prop_assert_eq!(status, 0);
            } else {
                prop_assert_eq!(status & before, before, "a bit was lost");
                if before & FEATURES_OK != 0 {
                    prop_assert_eq!(world.slot.lock().driver_features, frozen);
                }
            }
            prop_assert!(status & DRIVER == 0 || status & ACKNOWLEDGE != 0);
            prop_assert!(status & FEATURES_OK == 0 || status & DRIVER != 0);
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
            let on = matches!(world.slot.lock().state, State::Active(_));
            prop_assert_eq!(on, status & DRIVER_OK != 0 && status & NEEDS_RESET == 0);
            before = status;
        }
    }

    /// No access of any size, offset or value panics, in any state.
    #[test]
    fn no_access_panics(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0u64..0x200, any::<u64>()], proptest::collection::vec(any::<u8>(), 0..9)),
            1..100,
        ),
        on in any::<bool>(),
    ) {
        let world = World::new();
        if on {
            world.switch_on();
        }
        for (write, offset, mut bytes) in accesses {
            if write {
                world.write_bytes(offset, &bytes);
            } else {
                world.slot.read(offset, &mut bytes);
            }
        }
    }
}
