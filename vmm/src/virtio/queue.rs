//! A split virtqueue whose every index is checked (virtio 1.2, 2.7).
//!
//! The crate `virtio-queue` does the ring arithmetic and the driver's notifications. The walk over
//! a chain is ours (`chain`), since a malformed chain must be an error there, not a short chain.
//! The used ring is ours, since the crate can't give several chains back at once.
//!
//! Invariants:
//! - The rings lie wholly in guest memory. [`Virtqueue::new`] checks this once; memory is never
//!   removed while a device is active.
//! - Size is a power of two not above the device's maximum.
//! - At most `size` chains are taken at a time.
//! - After an error the queue is not used again: the device goes to DEVICE_NEEDS_RESET.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{Chain, Malformed};
use super::guest::{GuestRam, Interrupt};

/// What a driver must not do to its rings.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, no power of two or above the device's maximum.
    #[error("size {size} is no power of two between 1 and {limit}")]
    Size { size: u32, limit: u16 },
    /// A ring is misaligned or outside guest memory.
    #[error("the {ring} ring at {address:#x} is misaligned or not in guest memory")]
    Address { ring: &'static str, address: u64 },
    /// The available index is more than `size` ahead, or a ring can't be read.
    #[error("the rings' indices")]
    Ring(#[source] virtio_queue::Error),
    #[error("a descriptor chain")]
    Chain(#[from] Malformed),
}

/// Where a driver put a queue: the transport's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueLayout {
    /// QueueNum.
    pub size: u32,
    /// QueueDesc.
    pub descriptors: u64,
    /// QueueDriver.
    pub available: u64,
    /// QueueDevice.
    pub used: u64,
}

/// What the closure of [`Virtqueue::serve`] did with a chain.
pub enum Served {
    /// It used the chain up; the driver gets it back.
    Done(Chain),
    /// It can't serve the chain now. The chain stays in the ring, and no further one is taken.
    Later(Chain),
}

/// One queue of an active device.
pub struct Virtqueue {
    ring: Queue,
    layout: QueueLayout,
    memory: GuestRam,
    interrupt: Arc<Interrupt>,
    kick: Arc<EventFd>,
    /// Chains given back since we last asked whether the driver wants an interrupt.
    given_back: Wrapping<u16>,
}

impl Virtqueue {
    /// Checks what the driver has set up and makes a queue of it. The driver's notification signals
    /// `kick`.
    pub fn new(
        layout: QueueLayout,
        max_size: u16,
        event_idx: bool,
        memory: GuestRam,
        interrupt: Arc<Interrupt>,
        kick: Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        let bad_size = || QueueError::Size {
            size: layout.size,
            limit: max_size,
        };
        let mut ring = Queue::new(max_size).map_err(|_| bad_size())?;
        let size = u16::try_from(layout.size).map_err(|_| bad_size())?;
        ring.try_set_size(size).map_err(|_| bad_size())?;
        let bad = |ring, address| move |_| QueueError::Address { ring, address };
        ring.try_set_desc_table_address(GuestAddress(layout.descriptors))
            .map_err(bad("descriptor", layout.descriptors))?;
        ring.try_set_avail_ring_address(GuestAddress(layout.available))
            .map_err(bad("available", layout.available))?;
        ring.try_set_used_ring_address(GuestAddress(layout.used))
            .map_err(bad("used", layout.used))?;
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        // `iter` of the crate takes an available ring at address 0 for a queue that is not set up.
        if layout.available == 0 || !ring.is_valid(&*memory) {
            return Err(QueueError::Address {
                ring: "available, used or descriptor",
                address: layout.available,
            });
        }
        Ok(Self {
            ring,
            layout,
            memory,
            interrupt,
            kick,
            given_back: Wrapping(0),
        })
    }

    /// The next chain that the driver has made available, checked. `None`: there is none.
    pub fn next_chain(&mut self) -> Result<Option<Chain>, QueueError> {
        let head = self
            .ring
            .iter(&*self.memory)
            .map_err(QueueError::Ring)?
            .next()
            .map(|chain| chain.head_index());
        match head {
            None => Ok(None),
            Some(head) => Ok(Some(Chain::walk(
                self.memory.clone(),
                GuestAddress(self.layout.descriptors),
                self.ring.size(),
                head,
            )?)),
        }
    }

    /// Gives a chain back to the driver, with the number of bytes that were written into it.
    pub fn give_back(&mut self, chain: Chain) -> Result<(), QueueError> {
        self.give_back_all([chain])
    }

    /// Gives several chains back in their order. The driver sees all of them or none.
    pub fn give_back_all(
        &mut self,
        chains: impl IntoIterator<Item = Chain>,
    ) -> Result<(), QueueError> {
        let used = |offset| GuestAddress(self.layout.used + offset); // in guest memory, see `new`
        let failed = |error| QueueError::Ring(virtio_queue::Error::GuestMemory(error));
        let mut next = Wrapping(self.ring.next_used());
        for chain in chains {
            // `struct virtq_used_elem`: id and length, 32 bits each.
            let element = u64::from(chain.head()) | u64::from(chain.written()) << 32;
            let at = used(4 + 8 * u64::from(next.0 % self.ring.size()));
            self.memory.write_obj(element.to_le(), at).map_err(failed)?;
            next += 1;
            self.given_back += 1;
        }
        self.ring.set_next_used(next.0);
        self.memory
            .store(next.0.to_le(), used(2), Ordering::Release)
            .map_err(failed)
    }

    /// Puts the chain that was taken last back into the ring; [`Virtqueue::next_chain`] returns it
    /// again.
    pub fn undo(&mut self, chain: Chain) {
        drop(chain);
        self.ring.go_to_previous_position();
    }

    /// Interrupts the driver if it wants an interrupt for what was given back since the last call
    /// (virtio 1.2, 2.7.7.2).
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let count = std::mem::take(&mut self.given_back);
        if self.ring.event_idx_enabled() {
            // The driver writes the index that it waits for, and then reads ours once more.
            fence(Ordering::SeqCst);
            let at = self.layout.available + 4 + 2 * u64::from(self.ring.size());
            let waits_for = self
                .memory
                .load(GuestAddress(at), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
            let passed = Wrapping(self.ring.next_used()) - Wrapping(waits_for) - Wrapping(1);
            if passed >= count {
                return Ok(());
            }
        }
        self.interrupt.raise(Interrupt::USED);
        Ok(())
    }

    /// Asks the driver to notify us of the next chain. True: one has come in the meantime.
    pub fn rearm(&mut self) -> Result<bool, QueueError> {
        self.ring
            .enable_notification(&*self.memory)
            .map_err(QueueError::Ring)
    }

    /// Makes the reactor call `notified` for this queue again, after the others have had their
    /// turn. A thread that waits for the queue's eventfd wakes.
    pub fn again(&self) {
        // EAGAIN: the counter is full, so a notification is pending.
        let _ = self.kick.write(1);
    }

    /// Serves chains until the ring is empty, `serve` says later, or `size` steps are done (then
    /// the other devices have their turn before the rest). A look at a ring that only seemed to be
    /// filled is a step, too: a vCPU may move the index to and fro. Signals the driver once.
    pub fn serve<E: From<QueueError>>(
        &mut self,
        mut serve: impl FnMut(Chain) -> Result<Served, E>,
    ) -> Result<(), E> {
        let mut given_back = false;
        let mut left = self.ring.size();
        loop {
            if left == 0 {
                self.again();
                break;
            }
            left -= 1;
            let Some(chain) = self.next_chain()? else {
                if self.rearm()? {
                    continue;
                }
                break;
            };
            match serve(chain)? {
                Served::Done(chain) => {
                    self.give_back(chain)?;
                    given_back = true;
                }
                Served::Later(chain) => {
                    self.undo(chain);
                    break;
                }
            }
        }
        if given_back {
            self.signal()?;
        }
        Ok(())
    }

    pub fn layout(&self) -> QueueLayout {
        self.layout
    }

    /// The eventfd that the driver's notification signals.
    pub fn kick(&self) -> &Arc<EventFd> {
        &self.kick
    }
}

#[cfg(test)]
#[path = "queue_exhaustive.rs"]
mod exhaustive;
#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
