//! The device on real rings: a driver's memory, its notifications, its interrupts.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::epoll;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::packet::{Header, Operation, Ports};
use super::*;
use crate::virtio::queue::QueueLayout;
use crate::virtio::{GuestRam, Interrupt};

const SIZE: u16 = 16;
const PAGE: u64 = 4096;

/// A driver's side of one queue: descriptors one after the other; each chain is one buffer.
struct Ring {
    base: u64,
    memory: GuestRam,
    added: u16,
    taken: u16,
}

impl Ring {
    fn new(base: u64, memory: &GuestRam) -> Self {
        Self {
            base,
            memory: memory.clone(),
            added: 0,
            taken: 0,
        }
    }

    fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: SIZE.into(),
            descriptors: self.base,
            available: self.base + PAGE,
            used: self.base + 2 * PAGE,
        }
    }

    fn buffer(&self, index: u16) -> GuestAddress {
        GuestAddress(self.base + (4 + u64::from(index)) * PAGE)
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        let address = GuestAddress(self.base + at);
        self.memory.write_obj(value, address).unwrap();
    }

    fn add(&mut self, length: u32, writable: bool) {
        let index = self.added % SIZE;
        let at = u64::from(index);
        self.put(16 * at, self.buffer(index).0);
        self.put(16 * at + 8, length);
        self.put(16 * at + 12, if writable { 2_u16 } else { 0 });
        self.put(PAGE + 4 + 2 * at, index);
        self.added += 1;
        self.put(PAGE + 2, self.added);
    }

    fn send(&mut self, bytes: &[u8]) {
        let buffer = self.buffer(self.added % SIZE);
        self.memory.write_slice(bytes, buffer).unwrap();
        self.add(bytes.len() as u32, false);
    }

    /// The next used buffer's bytes.
    fn take(&mut self) -> Option<Vec<u8>> {
        let at = |offset: u64| GuestAddress(self.base + 2 * PAGE + offset);
        let used: u16 = self.memory.read_obj(at(2)).unwrap();
        if used == self.taken {
            return None;
        }
        let entry = 4 + 8 * u64::from(self.taken % SIZE);
        let index: u32 = self.memory.read_obj(at(entry)).unwrap();
        let length: u32 = self.memory.read_obj(at(entry + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        let buffer = self.buffer(index as u16);
        self.memory.read_slice(&mut bytes, buffer).unwrap();
        self.taken += 1;
        Some(bytes)
    }
}

struct World {
    device: Box<dyn Active>,
    receive: Ring,
    transmit: Ring,
    agent: UnixStream,
    memory: GuestRam,
    epoll: Arc<OwnedFd>,
    interrupt: Arc<Interrupt>,
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (ours, agent) = UnixStream::pair().unwrap();
        let device = Vsock::new(Endpoints {
            agent_port: 1024,
            stream_port: 1025,
            agent: ours.into(),
            streams: UnixListener::bind(folder.path().join("s")).unwrap().into(),
            on_agent: Box::new(|| {}),
        });
        let range = (GuestAddress(0), 1 << 20);
        let memory: GuestRam = Arc::new(GuestMemoryMmap::from_ranges(&[range]).unwrap());
        let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        let device = Box::new(device.unwrap());
        Self {
            receive: Ring::new(0x10_000, &memory),
            transmit: Ring::new(0x40_000, &memory),
            device: activate(device, &memory, &epoll, &interrupt),
            agent,
            memory,
            epoll,
            interrupt,
            _folder: folder,
        }
    }

    fn reset(&mut self) {
        let (agent, _) = UnixStream::pair().unwrap();
        let endpoints = Endpoints {
            agent_port: 1,
            stream_port: 2,
            agent: agent.into(),
            streams: UnixListener::bind(self._folder.path().join("unused"))
                .unwrap()
                .into(),
            on_agent: Box::new(|| {}),
        };
        // Stands for the moment when a transport has no device.
        let placeholder: Box<dyn Active> = Box::new(ActiveVsock {
            muxer: Muxer::new(endpoints).unwrap(),
            receive: queue(0x70_000, &self.memory, &self.interrupt),
            transmit: queue(0x90_000, &self.memory, &self.interrupt),
            host: HostEvents::new(self.epoll.clone(), 9),
        });
        let idle = std::mem::replace(&mut self.device, placeholder)
            .reset()
            .unwrap();
        for base in [self.receive.base, self.transmit.base] {
            self.memory
                .write_slice(&[0; 3 * PAGE as usize], GuestAddress(base))
                .unwrap();
        }
        self.receive = Ring::new(self.receive.base, &self.memory);
        self.transmit = Ring::new(self.transmit.base, &self.memory);
        self.device = activate(idle, &self.memory, &self.epoll, &self.interrupt);
    }

    fn interrupted(&self) -> bool {
        let status = self.interrupt.status() & Interrupt::USED != 0;
        self.interrupt.acknowledge(Interrupt::USED);
        status
    }
}

fn queue(base: u64, memory: &GuestRam, interrupt: &Arc<Interrupt>) -> Virtqueue {
    let layout = Ring::new(base, memory).layout();
    let kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    Virtqueue::new(layout, 256, false, memory.clone(), interrupt.clone(), kick).unwrap()
}

fn activate(
    device: Box<dyn Device>,
    memory: &GuestRam,
    epoll: &Arc<OwnedFd>,
    interrupt: &Arc<Interrupt>,
) -> Box<dyn Active> {
    let queues = [0x10_000, 0x40_000].map(|base| Some(queue(base, memory, interrupt)));
    let activation = Activation {
        memory: memory.clone(),
        features: 0,
        queues: queues.into_iter().chain([None]).collect(),
        host: HostEvents::new(epoll.clone(), 2),
        interrupt: interrupt.clone(),
    };
    device.activate(activation).unwrap()
}

fn from_guest(operation: Operation, body: &[u8]) -> Vec<u8> {
    let ports = Ports {
        host: 77, // in the guest's packets the source comes first
        guest: 1024,
    };
    let header = Header {
        payload: body.len(),
        ..Header::new(ports, operation)
    };
    let mut bytes = header.to_bytes().to_vec();
    bytes[0] = GUEST_CID as u8;
    bytes[8] = 2;
    bytes[36..40].copy_from_slice(&100_000_u32.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn operation(packet: &[u8]) -> u8 {
    packet[30]
}

/// The dial waits until the guest has given a buffer for the answer; nothing is lost meanwhile.
#[test]
fn packets_pass_through_the_rings() {
    let mut world = World::new();
    world.transmit.send(&from_guest(Operation::Request, &[]));
    world.transmit.send(&from_guest(Operation::Data, b"early"));
    world.device.notified(TRANSMIT).unwrap();
    assert!(world.transmit.take().is_some() && world.interrupted());
    assert_eq!(world.receive.take(), None);
    let mut got = [0; 5];
    world.agent.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"early");
    world.receive.add(4096, true);
    world.device.notified(RECEIVE).unwrap();
    assert_eq!(operation(&world.receive.take().unwrap()), 2);
    assert!(world.interrupted());
    world.agent.write_all(&[5; 6000]).unwrap();
    world.receive.add(4096, true);
    world.receive.add(4096, true);
    world.receive.add(4096, true);
    world.device.ready(SOCKETS).unwrap();
    let sizes: Vec<_> = std::iter::from_fn(|| world.receive.take())
        .map(|packet| packet.len() - HEADER_SIZE)
        .collect();
    assert_eq!(sizes, [4096 - HEADER_SIZE, 6000 - 4096 + HEADER_SIZE]);
}

#[test]
fn buffers_that_no_driver_would_give_are_the_guest_s_error() {
    let mut world = World::new();
    world.transmit.send(&[0; HEADER_SIZE - 1]);
    assert!(matches!(
        world.device.notified(TRANSMIT),
        Err(DeviceError::Chain(_))
    ));
    let mut world = World::new();
    world.transmit.send(&from_guest(Operation::Request, &[]));
    world.receive.add(HEADER_SIZE as u32, true);
    let result = world.device.notified(TRANSMIT);
    assert!(matches!(result, Err(DeviceError::Guest { .. })));
}

#[test]
fn a_reset_ends_the_streams_and_the_device_can_be_switched_on_again() {
    let mut world = World::new();
    world.transmit.send(&from_guest(Operation::Request, &[]));
    world.device.notified(TRANSMIT).unwrap();
    world.reset();
    assert_eq!(world.agent.read(&mut [0]).unwrap(), 0);
    world.receive.add(4096, true);
    world.transmit.send(&from_guest(Operation::Request, &[]));
    world.device.notified(TRANSMIT).unwrap();
    // There is no second dial, not even after the guest restarts the device.
    assert_eq!(operation(&world.receive.take().unwrap()), 3);
}
