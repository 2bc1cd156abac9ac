//! A device that is attacked, from its reset to its answers.

use crate::machine::{DATA, load, rest, store, until};
use crate::say;
use crate::transport::{Device, INDIRECT, NEXT, Ring, VERSION_1, WRITE};

/// A queue of a device.
#[derive(Debug)]
pub struct Victim {
    /// For the report.
    pub name: &'static str,
    /// The device's slot.
    pub slot: u64,
    /// Which of its queues is attacked.
    pub queue: u32,
    /// The sizes of its queues.
    pub sizes: &'static [u16],
    /// The device writes to the buffers of this queue.
    pub incoming: bool,
    /// Which rules it has.
    pub kind: Kind,
}

/// Kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the standard's")]
pub enum Kind {
    Net,
    Block,
    Entropy,
    Vsock,
    Fs,
}

/// A device that is switched on, and its queues.
pub struct Session {
    /// Whose.
    pub victim: &'static Victim,
    /// The device.
    pub device: Device,
    /// Its queues.
    pub rings: [Ring; 3],
}

impl Victim {
    /// The device's registers.
    pub fn device(&self) -> Device {
        Device::at(self.slot)
    }

    /// Whether another process than the VMM serves the queues.
    pub fn is_served_elsewhere(&self) -> bool {
        self.kind == Kind::Fs
    }

    /// Waits until the host has put the device into its slot.
    pub fn wait_for(&self) -> bool {
        until(|| self.device().kind() != 0)
    }

    /// Resets the device, and sets up all but DRIVER_OK.
    pub fn prepare(&'static self) -> Session {
        self.prepare_with(0)
    }

    /// The same, with more features.
    pub fn prepare_with(&'static self, features: u64) -> Session {
        let device = self.device();
        if !device.negotiate(VERSION_1 | INDIRECT | features) {
            say!("wrong: {} does not accept its features", self.name);
        }
        let mut rings = [Ring::new(0, 16), Ring::new(1, 16), Ring::new(2, 16)];
        for ((ring, size), number) in rings.iter_mut().zip(self.sizes).zip(0..) {
            ring.size = *size;
            device.place(number, u32::from(*size), ring.addresses());
        }
        Session {
            victim: self,
            device,
            rings,
        }
    }

    /// A device that is reset and switched on.
    pub fn open(&'static self) -> Session {
        let session = self.prepare();
        session.device.switch_on();
        session
    }
}

impl Session {
    /// The queue that is attacked.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.rings[self.victim.queue as usize]
    }

    /// The flags of a buffer that goes the queue's way.
    pub fn way(&self) -> u16 {
        if self.victim.incoming { WRITE } else { 0 }
    }

    /// Offers the chain at descriptor 0, and waits until it comes back.
    pub fn exchange(&mut self, queue: u32) -> Option<(u32, u32)> {
        let ring = &mut self.rings[queue as usize];
        ring.offer(0);
        self.device.kick(queue);
        ring.wait()
    }

    /// A request of a disk that gets bytes; gives the status.
    pub fn request(&mut self, kind: u32, sector: u64, length: u32) -> Option<u8> {
        let status = DATA + 64;
        store(DATA, kind);
        store(DATA + 8, sector);
        store(status, 0xff_u8);
        let ring = &self.rings[0];
        ring.describe(0, DATA, 16, NEXT, 1);
        ring.describe(1, DATA + 4096, length, NEXT | WRITE, 2);
        ring.describe(2, status, 1, WRITE, 0);
        self.exchange(0)?;
        Some(load(status))
    }

    /// Whether the device gives up its driver, or gives a chain back; `None`: neither, within some
    /// ticks or, if one of the two has to come, within the guest's patience.
    pub fn outcome(&mut self, must: bool) -> Option<Outcome> {
        let before = self.ring().seen;
        let mut found = None;
        let mut look = |session: &mut Self| {
            if session.ring().used() != before {
                found = Some(Outcome::Answered);
            } else if session.device.needs_reset() {
                found = Some(Outcome::Broken);
            }
            found.is_some()
        };
        if must {
            until(|| look(self));
        } else {
            for _ in 0..8 {
                if look(self) {
                    break;
                }
                rest();
            }
        }
        found
    }
}

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The device needs a reset.
    Broken,
    /// The chain came back.
    Answered,
}
