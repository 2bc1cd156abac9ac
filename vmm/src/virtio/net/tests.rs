//! The device on real rings, its thread included: an honest driver, and whatever bytes there may be. A
//! socket that keeps frames apart stands in for the tap, but for the one test of a real one, which needs root.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::epoll;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::header::{MAX_FRAME, SIZE};
use super::*;
use crate::virtio::queue::QueueLayout;
use crate::virtio::{GuestRam, HostEvents, Interrupt, Virtqueue};

const RING: u16 = 64;
const MEMORY: usize = 1 << 20;
/// Receive and transmit: descriptors, 0x800 on the available ring, 0xc00 on the used one.
const QUEUES: [u64; 2] = [0x1000, 0x2000];
const DATA: [u64; 2] = [0x1_0000, 0x8_0000];

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const PATIENCE: Duration = Duration::from_secs(10);

/// A driver, its device, and the far end of the tap.
struct World {
    memory: GuestRam,
    epoll: Arc<OwnedFd>,
    kicks: [Arc<EventFd>; 2],
    offered: [u16; 2],
    /// Used elements that the driver has looked at.
    seen: [u16; 2],
    far: UnixDatagram,
    device: Option<Box<dyn Active>>,
    thread: String,
}

impl World {
    fn new(features: u64) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        Self::over(Tap::of_socket(near.into()), far, features)
    }

    fn over(tap: Tap, far: UnixDatagram, features: u64) -> Self {
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        let thread = format!("net{}", far_name(&far));
        let worker = Worker::start(thread.clone()).unwrap();
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

    fn activate(&mut self, device: Box<dyn Device>, features: u64) {
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

    fn reset(&mut self) -> Box<dyn Device> {
        self.device.take().unwrap().reset().unwrap()
    }

    fn descriptor(
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

    fn offer(&mut self, queue: usize, head: u16) {
        let available = QUEUES[queue] + 0x800;
        let entry = available + 4 + 2 * u64::from(self.offered[queue] % RING);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        let index = GuestAddress(available + 2);
        self.memory.write_obj(self.offered[queue], index).unwrap();
    }

    fn kick(&self, queue: usize) {
        self.kicks[queue].write(1).unwrap();
    }

    /// Gives `count` receive buffers of `length` bytes each, in two pieces, from descriptor 0 on.
    fn give(&mut self, count: u16, length: u32) {
        for number in 0..count {
            let (head, at) = (2 * number, DATA[0] + u64::from(number) * u64::from(length));
            self.descriptor(0, head, at, 20, WRITE | NEXT, head + 1);
            self.descriptor(0, head + 1, at + 20, length - 20, WRITE, 0);
            self.offer(0, head);
        }
        self.kick(0);
    }

    /// Sends a frame as a header, and its bytes in two pieces.
    fn send(&mut self, header: [u8; SIZE], frame: &[u8]) {
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

    fn used(&self, queue: usize) -> u16 {
        let index = GuestAddress(QUEUES[queue] + 0xc02);
        self.memory.read_obj(index).unwrap()
    }

    fn wait_used(&self, queue: usize, wanted: u16) {
        let end = Instant::now() + PATIENCE;
        while self.used(queue) != wanted {
            assert!(Instant::now() < end, "{} used", self.used(queue));
            sleep(Duration::from_millis(1));
        }
    }

    /// The next frame that has come, with its header: what the driver's buffers `length` long hold.
    fn receive(&mut self, length: u64) -> Vec<u8> {
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

    fn arrive(&self, frame: &[u8]) {
        self.far.send(&[&[0; SIZE], frame].concat()).unwrap();
    }

    fn sent(&self) -> Vec<u8> {
        let mut bytes = vec![0; 80_000];
        let count = self.far.recv(&mut bytes).unwrap();
        bytes.truncate(count);
        bytes
    }

    fn broken(&mut self) -> DeviceError {
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "it still runs");
            if let Err(error) = self.device.as_mut().unwrap().ready(ENDED) {
                return error;
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// Processor time of the device's thread, which gives itself its name: on a busy machine not at once.
    fn busy(&self) -> Duration {
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

/// A name for the thread that no other test's has.
fn far_name(far: &UnixDatagram) -> u64 {
    let about = rustix::fs::fstat(far).unwrap();
    about.st_ino % 1_000_000_000
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

const ALL: u64 = RING_FEATURES | FEATURES;

#[test]
fn frames_go_out_with_what_their_header_may_ask_for() {
    let mut world = World::new(ALL);
    world.send([0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &frame(60));
    assert_eq!(world.sent(), [vec![0; SIZE], frame(60)].concat());
    // A TCP segment to be cut, as long as there may be.
    let header = [1, 1, 54, 0, 168, 5, 34, 0, 16, 0, 0, 0];
    world.send(header, &frame(MAX_FRAME));
    let sent = world.sent();
    assert_eq!((&sent[..SIZE], sent.len()), (&header[..], SIZE + MAX_FRAME));
    assert!(sent[SIZE..] == frame(MAX_FRAME));
    // What can't be sent is lost, and the next one is not.
    world.send(header, &frame(MAX_FRAME + 1));
    world.send([0; SIZE], &frame(13));
    world.send([1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame(60));
    world.send([0; SIZE], &frame(61));
    assert_eq!(world.sent().len(), SIZE + 61);
}

#[test]
fn frames_come_in_over_as_many_buffers_as_they_need() {
    let mut world = World::new(ALL);
    world.give(32, 4096);
    for length in [60, 1514, 4084, 4085, 9014, 65_549] {
        world.arrive(&frame(length));
        let got = world.receive(4096);
        let count = (SIZE + length).div_ceil(4096) as u16;
        assert_eq!(got[..10], [0; 10]);
        assert_eq!(got[10..SIZE], count.to_le_bytes());
        assert!(got[SIZE..] == frame(length), "{length}");
        // The ring is refilled behind the frame, in its order.
        for _ in 0..count {
            let entry = QUEUES[0] + 0xc04 + 8 * u64::from((world.seen[0] - count) % RING);
            let head: u32 = world.memory.read_obj(GuestAddress(entry)).unwrap();
            world.offer(0, head as u16);
        }
        if length == 65_549 {
            break;
        }
        world.kick(0);
    }
}

/// A driver without mergeable buffers and long segments has whole frames of its MTU, one a buffer.
#[test]
fn plain_buffers_hold_a_frame_each() {
    let mut world = World::new(RING_FEATURES | FEATURE_MAC);
    world.give(4, 1600);
    for length in [60, 1514] {
        world.arrive(&frame(length));
        assert_eq!(world.receive(1600).len(), SIZE + length);
    }
    // Longer than was agreed: lost, and no buffer with it.
    world.arrive(&frame(3000));
    world.arrive(&frame(61));
    assert_eq!(world.receive(1600).len(), SIZE + 61);
    assert_eq!(world.used(0), 3);
}

/// Frames that the driver has no room for stay where they are, and nobody spins meanwhile.
#[test]
fn a_full_ring_costs_no_processor_and_loses_nothing() {
    for features in [ALL, ALL & !crate::virtio::FEATURE_EVENT_IDX] {
        let mut world = World::new(features);
        world.give(3, 4096);
        world.arrive(&frame(100));
        world.arrive(&frame(200));
        sleep(Duration::from_millis(20));
        let before = world.busy();
        sleep(Duration::from_millis(200));
        let spent = world.busy() - before;
        assert!(spent < Duration::from_millis(20), "{spent:?}");
        assert_eq!(world.used(0), 0);
        for head in (6..40).step_by(2) {
            let at = DATA[0] + u64::from(head / 2) * 4096;
            world.descriptor(0, head, at, 4096, WRITE, 0);
            world.offer(0, head);
        }
        world.kick(0);
        assert_eq!(world.receive(4096).len(), SIZE + 100);
        assert_eq!(world.receive(4096).len(), SIZE + 200);
    }
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let breaks: [fn(&mut World); 5] = [
        |world| world.descriptor(1, 0, DATA[1], 11, 0, 0), // half a header
        |world| world.descriptor(1, 0, u64::MAX - 20, 100, 0, 0),
        |world| world.descriptor(1, 0, DATA[1], 100, NEXT, 0), // a loop
        |world| world.descriptor(0, 0, DATA[0], 11, WRITE, 0), // no room for a header
        |world| world.descriptor(0, 0, DATA[0], 100, WRITE | NEXT, 99),
    ];
    for (number, break_it) in breaks.into_iter().enumerate() {
        let mut world = World::new(ALL);
        let queue = usize::from(number < 3);
        break_it(&mut world);
        world.offer(queue, 0);
        world.kick(queue);
        if queue == 0 {
            world.kick(1); // whichever it waits for
        }
        let error = world.broken();
        assert!(!matches!(error, DeviceError::Host { .. }), "{error}");
        let idle = world.reset();
        world.activate(idle, ALL);
        world.send([0; SIZE], &frame(60));
        assert_eq!(world.sent().len(), SIZE + 60);
    }
}

/// Frames pass both ways when the driver resets: nothing of the guest's is touched afterwards.
#[test]
fn a_reset_under_load_is_the_end_of_it() {
    let mut world = World::new(ALL);
    world.far.set_nonblocking(true).unwrap();
    for round in 0..40 {
        world.give(30, 4096);
        for _ in 0..20 {
            let _ = world.far.send(&[0; SIZE + 3000]);
        }
        sleep(Duration::from_micros(50 * round));
        let idle = world.reset();
        let all = vec![round as u8; 30 * 4096];
        world
            .memory
            .write_slice(&all, GuestAddress(DATA[0]))
            .unwrap();
        let used = world.used(0);
        let _ = world.far.send(&[0xff; SIZE + 3000]);
        sleep(Duration::from_millis(1));
        assert_eq!(world.used(0), used);
        let mut now = vec![0; all.len()];
        world
            .memory
            .read_slice(&mut now, GuestAddress(DATA[0]))
            .unwrap();
        assert!(now == all);
        world.activate(idle, ALL);
    }
}

#[test]
fn the_driver_is_told_address_and_mtu() {
    let mut world = World::new(ALL);
    let idle = world.reset();
    assert_eq!(idle.config(), [2, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0xdc, 5]);
    assert_eq!(idle.kind() as u32, 1);
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status();
    assert!(done.unwrap().success(), "ip {arguments}");
}

fn attach(name: &str, flags: libc::c_int) -> OwnedFd {
    let tun = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    let tun = tun.unwrap();
    // SAFETY: `ifreq` is plain data, of which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, whose live and exclusive address it gets.
    let set = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    tun.into()
}

/// A tap takes what is set, carries frames, and may be deleted under the device, which then rests.
#[test]
fn a_real_tap_serves_until_it_is_deleted() {
    let test = || {
        // SAFETY: the flag concerns the calling thread alone, and what it opens or starts later.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let null = fs::File::open("/dev/null").unwrap().into();
        assert!(matches!(Tap::new(null), Err(BadTap::NoTap(_))));
        for wrong in [
            flags & !libc::IFF_VNET_HDR,
            flags | libc::IFF_MULTI_QUEUE,
            flags & !libc::IFF_TAP | libc::IFF_TUN,
        ] {
            let refused = Tap::new(attach("wrong", wrong));
            assert!(matches!(refused, Err(BadTap::Flags(_))), "{refused:?}");
        }
        let tap = Tap::new(attach("tap0", flags)).unwrap();
        ip("address add 10.1.0.1/24 dev tap0");
        ip("link set tap0 up");
        ip("neighbour add 10.1.0.2 lladdr 02:00:00:00:00:09 dev tap0 nud permanent");
        let mut world = World::over(tap, UnixDatagram::unbound().unwrap(), ALL);
        world.give(32, 4096);
        let udp = UdpSocket::bind("10.1.0.1:9").unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        udp.send_to(b"pong", "10.1.0.2:9").unwrap();
        let got = loop {
            let got = world.receive(4096);
            if got.ends_with(b"pong") {
                break got; // the kernel's own neighbour discovery may come first
            }
        };
        // Its checksum is left to the driver: UDP's, at 6 behind 34 bytes of headers.
        assert_eq!(got[..SIZE], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0]);
        assert_eq!(got[SIZE..SIZE + 6], [2, 0, 0, 0, 0, 9]);
        // Back, turned round by hand.
        let mut frame = got[SIZE..].to_vec();
        let (to, from): ([u8; 6], [u8; 6]) = (
            got[12..18].try_into().unwrap(),
            got[18..24].try_into().unwrap(),
        );
        frame[..6].copy_from_slice(&from);
        frame[6..12].copy_from_slice(&to);
        frame[26..34].rotate_left(4);
        world.send(got[..SIZE].try_into().unwrap(), &frame);
        let mut bytes = [0; 10];
        let (count, peer) = udp.recv_from(&mut bytes).unwrap();
        assert_eq!(
            (&bytes[..count], peer.to_string()),
            (&b"pong"[..], "10.1.0.2:9".into())
        );

        ip("link delete tap0");
        world.send([0; SIZE], &frame);
        sleep(Duration::from_millis(20));
        let before = world.busy();
        sleep(Duration::from_millis(200));
        let spent = world.busy() - before;
        assert!(spent < Duration::from_millis(20), "{spent:?}");
        drop(world.reset());
    };
    std::thread::spawn(test).join().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in the rings: the thread serves it or stops, never by a failure of the host's side, and
    /// after a reset frames pass again.
    #[test]
    fn no_ring_breaks_the_device(
        descriptors in proptest::collection::vec(
            (0usize..2, 0u16..66, 0u64..0x10_1000, 0u32..0x3000, 0u16..8, 0u16..66), 0..60),
        heads in proptest::collection::vec((0usize..2, 0u16..66), 0..40),
        ahead in prop_oneof![9 => Just(0u16), 1 => any::<u16>()],
        arriving in proptest::collection::vec(0usize..5000, 0..6),
        features in any::<u64>(),
    ) {
        let mut world = World::new(features & ALL);
        world.far.set_nonblocking(true).unwrap();
        for (queue, index, address, length, flags, next) in descriptors {
            world.descriptor(queue, index.min(63), address, length, flags, next);
        }
        for (queue, head) in heads {
            world.offer(queue, head);
        }
        for queue in [0, 1] {
            let index = world.offered[queue].wrapping_add(ahead);
            let at = GuestAddress(QUEUES[queue] + 0x802);
            world.memory.write_obj(index, at).unwrap();
            world.kick(queue);
        }
        for length in arriving {
            let _ = world.far.send(&frame(length));
        }
        sleep(Duration::from_millis(1));
        if let Err(error) = world.device.as_mut().unwrap().ready(ENDED) {
            prop_assert!(!matches!(error, DeviceError::Host { .. }), "{}", error);
        }
        let idle = world.reset();
        world.activate(idle, ALL);
        while world.far.recv(&mut [0; 80_000]).is_ok() {}
        world.far.set_nonblocking(false).unwrap();
        world.send([0; SIZE], &frame(60));
        prop_assert_eq!(world.sent(), [vec![0; SIZE], frame(60)].concat());
    }
}
