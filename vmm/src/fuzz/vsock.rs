//! A guest and a host that speak vsock, both as they like.

use std::io::Read;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::epoll::{self, CreateFlags};
use rustix::net::{SendFlags, send};

use super::devices::broken;
use super::driver::Driver;
use super::input::Input;
use crate::virtio::vsock::{Endpoints, Vsock};
use crate::virtio::{Activation, Active, Device, DeviceError, HostEvents, RING_FEATURES, Token};

const AGENT: u32 = 1024;
const STREAM: u32 = 2048;
/// The first port of the host's own connections.
const FIRST_PORT: u32 = 1 << 30;
/// The host's connections at a time, the agent's among them.
const MOST: usize = 8;

/// The host's side.
struct Host {
    address: SocketAddr,
    streams: Vec<UnixStream>,
}

/// The device on its rings, with everything that a guest and a host may do.
pub fn vsock(data: &[u8]) {
    let (mut host, device) = Host::new();
    let epoll = epoll::create(CreateFlags::CLOEXEC).expect("make an epoll set");
    let epoll = Arc::new(epoll);
    let mut driver = Driver::new(3);
    let mut active = activate(Box::new(device), &mut driver, &epoll);
    let mut input = Input::new(data);
    while !input.is_empty() {
        let act = input.byte();
        let which = act >> 4;
        let result = match act % 16 {
            0 | 1 => {
                driver.act(&mut input);
                Ok(())
            }
            2 | 3 => {
                let packet = packet(&mut input);
                driver.request(1, which.into(), &packet, 0);
                active.notified(1)
            }
            4 | 5 => {
                let room = 44 + u32::from(input.half()) % 0xfd0;
                driver.request(0, which.into(), &[], room);
                active.notified(0)
            }
            6 => active.notified(u16::from(which) % 4),
            7 | 8 => active.ready(Token(0)),
            15 => Err(DeviceError::Guest { rule: "a reset" }),
            other => {
                host.act(other, which.into(), &mut input);
                Ok(())
            }
        };
        if broken(result) {
            let device = active.reset().expect("switch the device off");
            active = activate(device, &mut driver, &epoll);
        }
    }
}

fn activate(device: Box<dyn Device>, driver: &mut Driver, epoll: &Arc<OwnedFd>) -> Box<dyn Active> {
    let queues = (0..3).map(|queue| Some(driver.queue(queue, false)));
    let activation = Activation {
        queues: queues.collect(),
        memory: driver.memory.clone(),
        features: RING_FEATURES,
        host: HostEvents::new(epoll.clone(), 0),
        interrupt: driver.interrupt.clone(),
    };
    device.activate(activation).expect("switch the device on")
}

impl Host {
    fn new() -> (Self, Vsock) {
        static RUN: AtomicU64 = AtomicU64::new(0);
        let run = RUN.fetch_add(1, Ordering::Relaxed);
        let name = format!("kata-like-fuzz-{}-{run}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).expect("an address");
        let listener = UnixListener::bind_addr(&address).expect("listen");
        let (ours, agent) = UnixStream::pair().expect("make a pair of sockets");
        let device = Vsock::new(Endpoints {
            agent_port: AGENT,
            stream_port: STREAM,
            agent: ours.into(),
            streams: listener.into(),
            on_agent: Box::new(|| ()),
        });
        let mut host = Self {
            address,
            streams: Vec::new(),
        };
        host.take(agent);
        (host, device.expect("make the device"))
    }

    fn take(&mut self, stream: UnixStream) {
        let set = stream.set_nonblocking(true);
        set.expect("make a socket non-blocking");
        self.streams.push(stream);
    }

    fn act(&mut self, act: u8, which: usize, input: &mut Input) {
        if act == 9 && self.streams.len() < MOST {
            let stream = UnixStream::connect_addr(&self.address);
            return self.take(stream.expect("connect"));
        }
        let which = which % self.streams.len().max(1);
        let Some(stream) = self.streams.get_mut(which) else {
            return;
        };
        match act {
            10 | 11 => {
                // No signal where the other side is gone.
                let bytes = vec![1; usize::from(input.half())];
                let _ = send(stream, &bytes, SendFlags::NOSIGNAL);
            }
            12 => {
                let _ = stream.read(&mut [0; 0x2000]);
            }
            13 => {
                let half = [Shutdown::Read, Shutdown::Write][usize::from(input.byte() & 1)];
                let _ = stream.shutdown(half);
            }
            14 => drop(self.streams.swap_remove(which)),
            _ => {}
        }
    }
}

/// A packet of the guest's whose header is right but for what the input says.
fn packet(input: &mut Input) -> Vec<u8> {
    let choice = input.byte();
    let (host, guest) = match choice & 7 {
        7 => (AGENT, 77),
        other => (FIRST_PORT + u32::from(other), STREAM),
    };
    let operation = u16::from(choice >> 3) % 9;
    let payload = input.byte();
    let mut packet = Vec::new();
    for address in [3u64, 2] {
        packet.extend(address.to_le_bytes());
    }
    for number in [guest, host, u32::from(payload)] {
        packet.extend(number.to_le_bytes());
    }
    for number in [1, operation] {
        packet.extend(number.to_le_bytes());
    }
    for _ in 0..3 {
        packet.extend(input.word().to_le_bytes()); // flags, and the guest's credit
    }
    packet.extend(vec![9; payload.into()]);
    packet
}
