//! The tests' own driver, the memory that it shares with the device, and the far end of the tap.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::*;
use crate::virtio::net::header::SIZE;
use crate::virtio::queue::QueueLayout;
use crate::virtio::{GuestRam, HostEvents, Interrupt, Virtqueue};

pub const RING: u16 = 64;
const MEMORY: usize = 1 << 20;
/// Receive and transmit: descriptors, 0x800 on the available ring, 0xc00 on the used one.
pub const QUEUES: [u64; 2] = [0x1000, 0x2000];
pub const DATA: [u64; 2] = [0x1_0000, 0x8_0000];

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

pub const PATIENCE: Duration = Duration::from_secs(10);

/// A driver, its device, and the far end of the tap.
pub struct World {
    pub memory: GuestRam,
    epoll: Arc<OwnedFd>,
    pub kicks: [Arc<EventFd>; 2],
    pub offered: [u16; 2],
    /// Used elements that the driver has looked at.
    pub seen: [u16; 2],
    pub far: UnixDatagram,
    pub device: Option<Box<dyn Active>>,
    thread: String,
}

impl World {
    pub fn new(features: u64) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        Self::over(Tap::of_socket(near.into()), far, features)
    }

    pub fn over(tap: Tap, far: UnixDatagram, features: u64) -> Self {
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        let thread = format!("net{}", far_name(&far));
        let worker = Worker::start(thread.clone(), || ()).unwrap();
        let net = Net::new(tap, [2, 0, 0, 0, 0, 9], 1500, worker);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let mut world = Self {
            memory: Arc::new(memory),
            epoll: Arc::new(epoll),
            kicks: [event(), event()],
            offered: [0; 2],
            seen: [0; 2],
            far,
            device: None,
            thread,
        };
        world.activate(Box::new(net), features);
        world
    }

    pub fn activate(&mut self, device: Box<dyn Device>, features: u64) {
        let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        self.kicks = [event(), event()];
        (self.offered, self.seen) = ([0; 2], [0; 2]);
        let queue = |index: usize| {
            let at = QUEUES[index];
            let zeros = [0; 0x1000];
            self.memory.write_slice(&zeros, GuestAddress(at)).unwrap();
            let layout = QueueLayout {
                size: RING.into(),
                descriptors: at,
                available: at + 0x800,
                used: at + 0xc00,
            };
            let queue = Virtqueue::new(
                layout,
                QUEUE_SIZES[index],
                features & crate::virtio::FEATURE_EVENT_IDX != 0,
                self.memory.clone(),
                interrupt.clone(),
                self.kicks[index].clone(),
            );
            Some(queue.unwrap())
        };
        let queues = vec![queue(0), queue(1)];
        let active = device.activate(Activation {
            memory: self.memory.clone(),
            features,
            queues,
            host: HostEvents::new(self.epoll.clone(), 0),
            interrupt,
        });
        self.device = Some(active.unwrap());
    }

    pub fn reset(&mut self) -> Box<dyn Device> {
        self.device.take().unwrap().reset().unwrap()
    }

    pub fn descriptor(
        &self,
        queue: usize,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = GuestAddress(QUEUES[queue] + 16 * u64::from(index));
        self.memory.write_slice(&bytes, at).unwrap();
    }

    pub fn offer(&mut self, queue: usize, head: u16) {
        let available = QUEUES[queue] + 0x800;
        let entry = available + 4 + 2 * u64::from(self.offered[queue] % RING);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        let index = GuestAddress(available + 2);
        self.memory.write_obj(self.offered[queue], index).unwrap();
    }

    pub fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Gives `count` receive buffers of `length` bytes each, in two pieces, from descriptor 0 on.
    pub fn give(&mut self, count: u16, length: u32) {
        for number in 0..count {
            let (head, at) = (2 * number, DATA[0] + u64::from(number) * u64::from(length));
            self.descriptor(0, head, at, 20, WRITE | NEXT, head + 1);
            self.descriptor(0, head + 1, at + 20, length - 20, WRITE, 0);
            self.offer(0, head);
        }
        self.kick(0);
    }

    /// Sends a frame as a header, and its bytes in two pieces.
    pub fn send(&mut self, header: [u8; SIZE], frame: &[u8]) {
        let at = DATA[1];
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        self.memory
            .write_slice(frame, GuestAddress(at + 0x100))
            .unwrap();
        let half = frame.len() as u32 / 2;
        let rest = frame.len() as u32 - half;
        self.descriptor(1, 0, at, SIZE as u32, NEXT, 1);
        self.descriptor(1, 1, at + 0x100, half, NEXT, 2);
        self.descriptor(1, 2, at + 0x100 + u64::from(half), rest, 0, 0);
        self.offer(1, 0);
        self.kick(1);
        self.wait_used(1, self.offered[1]);
    }

    pub fn used(&self, queue: usize) -> u16 {
        let index = GuestAddress(QUEUES[queue] + 0xc02);
        self.memory.read_obj(index).unwrap()
    }

    pub fn wait_used(&self, queue: usize, wanted: u16) {
        let end = Instant::now() + PATIENCE;
        while self.used(queue) != wanted {
            assert!(Instant::now() < end, "{} used", self.used(queue));
            sleep(Duration::from_millis(1));
        }
    }

    /// The next frame that has come, with its header. The driver's buffers are `length` bytes long.
    pub fn receive(&mut self, length: u64) -> Vec<u8> {
        let end = Instant::now() + PATIENCE;
        while self.used(0) == self.seen[0] {
            assert!(Instant::now() < end, "no frame");
            sleep(Duration::from_millis(1));
        }
        let mut frame = Vec::new();
        let mut left = 1;
        while left > 0 {
            assert_ne!(self.used(0), self.seen[0], "a frame in part");
            let entry = QUEUES[0] + 0xc04 + 8 * u64::from(self.seen[0] % RING);
            let [id, count]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
            self.seen[0] = self.seen[0].wrapping_add(1);
            let mut bytes = vec![0; count as usize];
            let at = DATA[0] + u64::from(id / 2) * length;
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            if frame.is_empty() {
                left = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            frame.extend(bytes);
            left -= 1;
        }
        frame
    }

    pub fn arrive(&self, frame: &[u8]) {
        self.far.send(&[&[0; SIZE], frame].concat()).unwrap();
    }

    pub fn sent(&self) -> Vec<u8> {
        let mut bytes = vec![0; 80_000];
        let count = self.far.recv(&mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    pub fn broken(&mut self) -> DeviceError {
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "it still runs");
            if let Err(error) = self.device.as_mut().unwrap().ready(ENDED) {
                return error;
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// The processor time of the device's thread. The thread gives itself its name, on a busy
    /// machine late.
    pub fn busy(&self) -> Duration {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
                let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
                if name.trim_end() == self.thread {
                    let times = fs::read_to_string(task.path().join("schedstat")).unwrap();
                    let spent = times.split(' ').next().unwrap().parse().unwrap();
                    return Duration::from_nanos(spent);
                }
            }
            sleep(Duration::from_millis(1));
        }
        panic!("no thread {}", self.thread);
    }
}

fn event() -> Arc<EventFd> {
    Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
}

/// A name for the thread that no other test uses.
fn far_name(far: &UnixDatagram) -> u64 {
    let about = rustix::fs::fstat(far).unwrap();
    about.st_ino % 1_000_000_000
}
