//! The device on real rings, with its thread: an honest driver, and arbitrary bytes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::epoll;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::queue::QueueLayout;
use crate::virtio::{GuestRam, HostEvents, Interrupt, Virtqueue};

const SIZE: u16 = 16;
const MEMORY: usize = 1 << 20;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADERS: u64 = 0x4000;
const STATUSES: u64 = 0x5000;
const DATA: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const NAME: u32 = 8;

const SECTORS: u64 = 128;

/// A driver, its device, and the disk's file.
struct World {
    memory: GuestRam,
    epoll: Arc<OwnedFd>,
    kick: Arc<EventFd>,
    file: tempfile::NamedTempFile,
    offered: u16,
    device: Option<Box<dyn Active>>,
}

impl World {
    fn new(read_only: bool) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..SECTORS)
            .flat_map(|sector| [sector as u8; 512])
            .collect();
        std::fs::write(file.path(), content).unwrap();
        // Writable even where the disk is read-only: the device itself must refuse writes.
        let open = File::options().read(true).write(true).open(file.path());
        let disk = Disk::new(open.unwrap().into(), SECTORS * 512, 512, read_only).unwrap();
        let block = Block::new(disk, Worker::start("disk".to_owned(), || ()).unwrap());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let mut world = Self {
            memory: Arc::new(memory),
            epoll: Arc::new(epoll),
            kick: event(),
            file,
            offered: 0,
            device: None,
        };
        world.activate(Box::new(block));
        world
    }

    fn activate(&mut self, device: Box<dyn Device>) {
        let layout = QueueLayout {
            size: SIZE.into(),
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
        };
        self.memory
            .write_slice(&[0; 0x3000], GuestAddress(DESCRIPTORS))
            .unwrap();
        self.offered = 0;
        self.kick = event();
        let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let queue = Virtqueue::new(
            layout,
            QUEUE_SIZES[0],
            false,
            self.memory.clone(),
            interrupt.clone(),
            self.kick.clone(),
        );
        let active = device.activate(Activation {
            memory: self.memory.clone(),
            features: RING_FEATURES | FEATURES,
            queues: vec![Some(queue.unwrap())],
            host: HostEvents::new(self.epoll.clone(), 0),
            interrupt,
        });
        self.device = Some(active.unwrap());
    }

    fn reset(&mut self) -> Box<dyn Device> {
        self.device.take().unwrap().reset().unwrap()
    }

    fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = GuestAddress(DESCRIPTORS + 16 * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    fn offer(&mut self, head: u16) {
        let entry = AVAILABLE + 4 + 2 * u64::from(self.offered % SIZE);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        let index = GuestAddress(AVAILABLE + 2);
        self.memory.write_obj(self.offered, index).unwrap();
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Puts a request of three descriptors at `head` and offers it.
    fn put(&mut self, head: u16, kind: u32, sector: u64, length: u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let at = HEADERS + 16 * u64::from(head);
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        let status = STATUSES + u64::from(head);
        self.memory
            .write_obj(0xff_u8, GuestAddress(status))
            .unwrap();
        let direction = if kind == OUT { 0 } else { WRITE };
        self.descriptor(head, at, 16, NEXT, head + 1);
        self.descriptor(head + 1, DATA, length, NEXT | direction, head + 2);
        self.descriptor(head + 2, status, 1, WRITE, 0);
        self.offer(head);
    }

    /// Makes one request and waits for its status.
    fn ask(&mut self, kind: u32, sector: u64, length: u32) -> u8 {
        self.put(0, kind, sector, length);
        self.kick.write(1).unwrap();
        self.wait();
        self.memory.read_obj(GuestAddress(STATUSES)).unwrap()
    }

    /// Waits until every offered request is used.
    fn wait(&self) {
        let end = Instant::now() + Duration::from_secs(10);
        while self.used() != self.offered {
            assert!(Instant::now() < end, "no answer");
            sleep(Duration::from_millis(1));
        }
    }

    fn data(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let from = GuestAddress(DATA);
        self.memory.read_slice(&mut bytes, from).unwrap();
        bytes
    }

    /// The thread's end, which it reports by itself.
    fn broken(&mut self) -> DeviceError {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < end, "it still runs");
            if let Err(error) = self.device.as_mut().unwrap().ready(ENDED) {
                return error;
            }
            sleep(Duration::from_millis(1));
        }
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }

    /// How many of this process's descriptors are the disk's file; one is the test's own.
    fn descriptors(&self) -> usize {
        let open = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = open.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
        links.filter(|link| link == self.file.path()).count()
    }
}

fn event() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

#[test]
fn a_disk_is_read_and_written() {
    let mut world = World::new(false);
    assert_eq!(world.ask(IN, 3, 1024), 0);
    assert_eq!(world.data(1024), [[3; 512], [4; 512]].concat());
    world
        .memory
        .write_slice(&[0xaa; 512], GuestAddress(DATA))
        .unwrap();
    assert_eq!(world.ask(OUT, 127, 512), 0);
    assert_eq!(world.ask(FLUSH, 0, 512), 0);
    assert_eq!(world.content()[127 * 512..], [0xaa; 512]);
    assert_eq!(world.ask(NAME, 0, 20), 0);
    assert_eq!(&world.data(20)[..10], b"kata-like\0");
    assert_eq!(world.ask(OUT, 128, 512), 1);
    assert_eq!(world.ask(IN, 127, 1024), 1);
    assert_eq!(world.ask(11, 0, 16), 2);
    assert_eq!(world.content().len(), 128 * 512);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut world = World::new(true);
    let before = world.content();
    assert_eq!(world.ask(OUT, 0, 512), 1);
    assert_eq!(world.ask(IN, 9, 512), 0);
    assert_eq!(world.data(512), [9; 512]);
    assert_eq!(world.content(), before);
    let idle = world.reset();
    assert_eq!(idle.features() & FEATURE_READ_ONLY, FEATURE_READ_ONLY);
    assert_eq!(idle.config()[..8], SECTORS.to_le_bytes());
}

#[test]
fn a_host_that_fails_is_an_error_of_the_request() {
    let mut world = World::new(false);
    world.file.as_file().set_len(512).unwrap();
    assert_eq!(world.ask(IN, 0, 1024), 1);
    assert_eq!(world.ask(IN, 0, 512), 0);
}

/// If a driver breaks its rings the device asks for a reset, and works again after it.
#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    for (length, flags) in [(15, 0), (16, 0), (16, NEXT)] {
        let mut world = World::new(false);
        world.descriptor(0, HEADERS, length, flags, 0);
        world.offer(0);
        world.kick.write(1).unwrap();
        let error = world.broken();
        assert!(!matches!(error, DeviceError::Host { .. }), "{error}");
        let idle = world.reset();
        world.activate(idle);
        assert_eq!(world.ask(IN, 5, 512), 0);
        assert_eq!(world.data(512), [5; 512]);
    }
}

/// The driver resets while requests are in flight. Afterwards nothing touches guest memory, and
/// dropping the device closes the disk.
#[test]
fn a_reset_under_load_is_the_end_of_it() {
    let mut world = World::new(false);
    for round in 0..40 {
        for head in [0, 3, 6, 9, 12] {
            world.put(head, if round % 2 == 0 { IN } else { OUT }, 0, 60 << 10);
        }
        world.kick.write(1).unwrap();
        sleep(Duration::from_micros(50 * round));
        let idle = world.reset();
        world
            .memory
            .write_slice(&[round as u8; 60 << 10], GuestAddress(DATA))
            .unwrap();
        let used = world.used();
        sleep(Duration::from_millis(1));
        assert_eq!(world.used(), used);
        assert_eq!(world.data(60 << 10), [round as u8; 60 << 10]);
        world.activate(idle);
    }
    assert_eq!(world.descriptors(), 2);
    drop(world.reset());
    assert_eq!(world.descriptors(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the rings, the thread serves it or stops, and a reset brings the disk back.
    /// Its size has not changed, nor has a read-only disk's content.
    #[test]
    fn no_ring_breaks_the_device(
        small in proptest::collection::vec((0u16..18, 0u64..0x10_1000, 0u32..0x3000, 0u16..8, 0u16..18), 0..24),
        headers in proptest::collection::vec((0u32..12, 0u64..140), 8),
        requests in proptest::collection::vec((0u16..13, 0u32..12, 0u64..140, 0u32..0x3000), 0..6),
        heads in proptest::collection::vec(0u16..18, 0..8),
        ahead in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        read_only in any::<bool>(),
    ) {
        let mut world = World::new(read_only);
        let before = world.content();
        for (index, (kind, sector)) in headers.into_iter().enumerate() {
            let mut header = kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(u64::to_le_bytes(sector));
            let at = GuestAddress(HEADERS + 16 * index as u64);
            world.memory.write_slice(&header, at).unwrap();
        }
        for (head, kind, sector, length) in requests {
            world.put(head, kind, sector, length);
        }
        for (index, address, length, flags, next) in small {
            world.descriptor(index, address, length, flags, next);
        }
        for head in heads {
            world.offer(head);
        }
        let index = world.offered.wrapping_add(ahead);
        world.memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
        world.kick.write(1).unwrap();
        sleep(Duration::from_millis(1));
        if let Err(error) = world.device.as_mut().unwrap().ready(ENDED) {
            prop_assert!(!matches!(error, DeviceError::Host { .. }), "{}", error);
        }
        let idle = world.reset();
        let after = world.content();
        prop_assert_eq!(after.len(), before.len());
        prop_assert!(!read_only || after == before);
        world.activate(idle);
        prop_assert_eq!(world.ask(IN, 0, 512), 0);
    }
}
