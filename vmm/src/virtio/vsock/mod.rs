//! The vsock device (virtio 1.2, 5.10): only its three queues.
//!
//! `machine` makes it from the descriptors of the boot request. `packet`, `connection` and `muxer`
//! know what a packet means; here buffers pass between them and the rings.
//!
//! What must hold: nothing blocks. A guest that gives no receive buffers stalls only its own
//! streams, which wait in the muxer, bounded.

mod connection;
mod muxer;
mod packet;

use std::os::fd::AsFd;

use rustix::event::epoll::EventFlags;

use self::muxer::Muxer;
pub use self::muxer::{Endpoints, OnAgent};
use self::packet::{GUEST_CID, HEADER_SIZE};
use super::queue::Served;
use super::{
    Activation, Active, Chain, Device, DeviceError, HostEvents, Kind, RING_FEATURES, Token,
    Virtqueue,
};

/// Receive, transmit, events (5.10.2).
const QUEUES: [u16; 3] = [256, 256, 16];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The muxer's epoll set, the only descriptor that is registered.
const SOCKETS: Token = Token(0);

/// The device, switched off.
pub struct Vsock {
    muxer: Muxer,
    config: [u8; 8],
}

impl Vsock {
    /// Takes the sockets; uses none before the guest has switched the device on.
    pub fn new(endpoints: Endpoints) -> Result<Self, DeviceError> {
        Ok(Self::with(Muxer::new(endpoints)?))
    }

    fn with(muxer: Muxer) -> Self {
        Self {
            muxer,
            config: GUEST_CID.to_le_bytes(), // struct virtio_vsock_config
        }
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// We send no events.
    fn needed_queues(&self) -> usize {
        2
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(self: Box<Self>, mut guest: Activation) -> Result<Box<dyn Active>, DeviceError> {
        let receive = guest.take_queue(usize::from(RECEIVE))?;
        let transmit = guest.take_queue(usize::from(TRANSMIT))?;
        let mut muxer = self.muxer;
        muxer.start()?;
        guest.host.watch(muxer.as_fd(), SOCKETS, EventFlags::IN)?;
        Ok(Box::new(ActiveVsock {
            muxer,
            receive,
            transmit,
            host: guest.host,
        }))
    }
}

/// The device, running. It does not keep the queue of events: we have none to send (they are for
/// migration), so the guest's buffers stay in it.
struct ActiveVsock {
    muxer: Muxer,
    receive: Virtqueue,
    transmit: Virtqueue,
    host: HostEvents,
}

impl ActiveVsock {
    /// Takes packets from the guest until it has no more or other devices must have their turn.
    fn transmitted(&mut self) -> Result<(), DeviceError> {
        let muxer = &mut self.muxer;
        self.transmit.serve(|mut chain| {
            receive_packet(muxer, &mut chain)?;
            Ok(Served::Done(chain))
        })
    }

    /// Sends packets to the guest while there are packets, and buffers for them.
    fn fill(&mut self) -> Result<(), DeviceError> {
        let muxer = &mut self.muxer;
        if !muxer.owes_packet() {
            return Ok(());
        }
        self.receive.serve(|mut chain| {
            send_packet(muxer, &mut chain).map(|sent| match sent {
                true => Served::Done(chain),
                false => Served::Later(chain),
            })
        })
    }
}

/// A chain without room for a header gets no answer: no vsock driver makes one.
fn receive_packet(muxer: &mut Muxer, chain: &mut Chain) -> Result<(), DeviceError> {
    let mut header = [0; HEADER_SIZE];
    chain.read_exact(&mut header)?;
    let held = chain.readable();
    muxer.receive(&header, chain, held)
}

fn send_packet(muxer: &mut Muxer, chain: &mut Chain) -> Result<bool, DeviceError> {
    if chain.writable() <= HEADER_SIZE {
        return Err(DeviceError::Guest {
            rule: "gives a vsock receive buffer that holds no more than a header",
        });
    }
    Ok(muxer.send(chain)?)
}

impl Active for ActiveVsock {
    fn notified(&mut self, queue: u16) -> Result<(), DeviceError> {
        if queue == TRANSMIT {
            self.transmitted()?;
        }
        self.fill()
    }

    fn ready(&mut self, _: Token) -> Result<(), DeviceError> {
        self.muxer.host_ready()?;
        self.fill()
    }

    fn reset(self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        let mut muxer = self.muxer;
        self.host.unwatch(muxer.as_fd())?;
        muxer.stop();
        Ok(Box::new(Vsock::with(muxer)))
    }
}

#[cfg(test)]
mod tests;
