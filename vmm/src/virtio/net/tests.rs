//! The device on real rings, with its thread: an honest driver, and arbitrary bytes. A socket that
//! keeps frames apart takes the tap's place, except in the one test of a real tap, which needs
//! root.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::features::FEATURE_MAC;
use super::header::{MAX_FRAME, SIZE};
use super::*;

mod world;

use world::{DATA, NEXT, PATIENCE, QUEUES, RING, WRITE, World};

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

const ALL: u64 = RING_FEATURES | FEATURES;

#[test]
fn frames_go_out_with_what_their_header_may_ask_for() {
    let mut world = World::new(ALL);
    world.send([0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &frame(60));
    assert_eq!(world.sent(), [vec![0; SIZE], frame(60)].concat());
    // A TCP segment to be cut, of the greatest length.
    let header = [1, 1, 54, 0, 168, 5, 34, 0, 16, 0, 0, 0];
    world.send(header, &frame(MAX_FRAME));
    let sent = world.sent();
    assert_eq!((&sent[..SIZE], sent.len()), (&header[..], SIZE + MAX_FRAME));
    assert!(sent[SIZE..] == frame(MAX_FRAME));
    // A frame that can't be sent is lost; the next one is not.
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

/// A driver without mergeable buffers and long segments gets whole frames of its MTU, one per
/// buffer.
#[test]
fn plain_buffers_hold_a_frame_each() {
    let mut world = World::new(RING_FEATURES | FEATURE_MAC);
    world.give(4, 1600);
    for length in [60, 1514] {
        world.arrive(&frame(length));
        assert_eq!(world.receive(1600).len(), SIZE + length);
    }
    // Longer than the MTU: the frame is lost, and costs no buffer.
    world.arrive(&frame(3000));
    world.arrive(&frame(61));
    assert_eq!(world.receive(1600).len(), SIZE + 61);
    assert_eq!(world.used(0), 3);
}

/// Frames for which the driver has no room stay where they are, and no thread spins meanwhile.
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

/// The driver resets while frames pass both ways. Afterwards nothing touches guest memory.
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
    assert_eq!(idle.kind().id(), 1);
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
    kata_like_linux::tun::attach(&tun, name, flags).unwrap();
    tun.into()
}

/// A tap takes its settings, carries frames, and may be deleted under the device, which then rests.
#[test]
fn a_real_tap_serves_until_it_is_deleted() {
    let test = || {
        kata_like_linux::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let tap = attach("tap0", flags);
        kata_like_linux::tun::set_header_size(&tap, 12).unwrap();
        rustix::io::ioctl_fionbio(&tap, true).unwrap();
        let tap = Tap::new(tap);
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
        // The driver computes its checksum: UDP's, at 6 behind 34 bytes of headers.
        assert_eq!(got[..SIZE], [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 1, 0]);
        assert_eq!(got[SIZE..SIZE + 6], [2, 0, 0, 0, 0, 9]);
        // The frame back, turned round by hand.
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

    /// Whatever is in the rings, the thread serves it or stops, never by a failure of the host's
    /// side, and after a reset frames pass again.
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
