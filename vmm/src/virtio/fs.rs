//! The file system device (virtio 1.2, 5.11): a vhost-user front end. The fs server does the work.
//!
//! `machine` puts up to two into their slots. At DRIVER_OK the server gets the guest's memory and
//! the addresses of the rings, and serves them from then on. Only its interrupts pass through here,
//! since virtio-mmio needs a status bit with each. Before DRIVER_OK the server hears nothing: it
//! may start while the guest's kernel boots.
//!
//! If the server dies the VM ends: the end-of-file of its socket is an error of the host's side.
//! The front end waits for the server's answers on the thread that switches devices, at most for
//! [`ANSWER_LIMIT`]. A server that hangs longer counts as dead.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Activation, Active, Device, DeviceError, GuestRam, HostEvents, Interrupt, Kind, RING_FEATURES,
    Token, Virtqueue, descriptor, number,
};
use crate::watchdog::Watchdog;

/// hiprio and one request queue. A server's request is limited to a queue's size less four pages,
/// so a larger queue makes larger reads and writes.
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];
const QUEUES: usize = 2;

/// `struct virtio_fs_config`: the tag, padded with NULs, and the number of request queues.
const CONFIG_SIZE: usize = TAG_SIZE + 4;
const TAG_SIZE: usize = 36;
const REQUEST_QUEUES: u32 = 1;

/// VHOST_USER_F_PROTOCOL_FEATURES: between front end and server; never offered to the guest.
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// How long the server may take to accept or give back all queues.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The server's connection. Tokens 0 and 1 are the queues' interrupts.
const CONNECTION: Token = Token(1 + REQUEST_QUEUES);

/// Why a share gets no device.
#[derive(Debug, thiserror::Error)]
pub enum BadShare {
    #[error("the tag {0:?} of a share: must have 1 to {TAG_SIZE} bytes and no NUL")]
    Tag(String),
    #[error("make the descriptors of share {tag:?}")]
    Descriptors {
        tag: String,
        #[source]
        source: io::Error,
    },
}

/// The idle device.
pub struct Fs {
    tag: String,
    config: [u8; CONFIG_SIZE],
    server: Frontend,
    /// The same connection, watched for its end.
    connection: Arc<UnixStream>,
    /// By which the server asks for a queue's interrupt.
    calls: [EventFd; QUEUES],
    watchdog: Watchdog,
    owned: bool,
}

impl Fs {
    /// Makes a device that the guest mounts as `tag`. The other end of `connection` serves it.
    pub fn new(tag: &str, connection: OwnedFd, watchdog: Watchdog) -> Result<Self, BadShare> {
        let bad = || BadShare::Tag(tag.to_owned());
        let failed = |source| BadShare::Descriptors {
            tag: tag.to_owned(),
            source,
        };
        if tag.is_empty() || tag.contains('\0') {
            return Err(bad());
        }
        let mut config = [0; CONFIG_SIZE];
        let (name, queues) = config.split_at_mut(TAG_SIZE);
        let name = name.get_mut(..tag.len()).ok_or_else(bad)?;
        name.copy_from_slice(tag.as_bytes());
        queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let stream = UnixStream::from(connection);
        let watched = stream.try_clone().map_err(failed)?;
        let call = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed);
        Ok(Self {
            tag: tag.to_owned(),
            config,
            server: Frontend::from_stream(stream, number::wide(QUEUES)),
            connection: Arc::new(watched),
            calls: [call()?, call()?],
            watchdog,
            owned: false,
        })
    }

    fn failed<E: std::error::Error + Send + Sync + 'static>(
        &self,
        step: &str,
    ) -> impl FnOnce(E) -> DeviceError {
        let step = format!("ask the fs server of share {:?} to {step}", self.tag);
        move |source| DeviceError::host(step, source)
    }

    /// Runs an exchange with the server; ends the connection if the answer comes late.
    fn in_time<T>(
        &mut self,
        exchange: impl FnOnce(&mut Self) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let guard = self.watchdog.watch(&self.connection, ANSWER_LIMIT);
        let result = exchange(self);
        if guard.is_late() {
            let late = format!("it has not answered for {ANSWER_LIMIT:?}");
            return Err(self.failed("do its part")(io::Error::other(late)));
        }
        result
    }

    /// Negotiates features with the server and tells it where the guest's memory is.
    fn introduce(&mut self, features: u64, memory: &GuestRam) -> Result<(), DeviceError> {
        if !self.owned {
            self.server
                .set_owner()
                .map_err(self.failed("take a front end"))?;
            self.owned = true;
        }
        let offered = self
            .server
            .get_features()
            .map_err(self.failed("name its features"))?;
        let wanted = features | PROTOCOL_FEATURES;
        if wanted & !offered != 0 {
            let missing = format!("features {:#x} are missing", wanted & !offered);
            return Err(self.failed("serve its rings")(io::Error::other(missing)));
        }
        let protocol = self
            .server
            .get_protocol_features()
            .map_err(self.failed("name its protocol features"))?
            & VhostUserProtocolFeatures::REPLY_ACK;
        self.server
            .set_protocol_features(protocol)
            .map_err(self.failed("accept protocol features"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.server.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.server
            .set_features(wanted)
            .map_err(self.failed("accept features"))?;
        let regions = memory
            .iter()
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<Vec<_>, _>>()
            .map_err(self.failed("map the guest's memory"))?;
        self.server
            .set_mem_table(&regions)
            .map_err(self.failed("map the guest's memory"))?;
        Ok(())
    }

    /// Hands one queue over.
    fn hand_over(
        &mut self,
        index: usize,
        queue: &Virtqueue,
        memory: &GuestRam,
    ) -> Result<(), DeviceError> {
        let layout = queue.layout();
        // `Virtqueue::new` has checked size and addresses.
        let address = |guest| {
            memory
                .get_host_address(GuestAddress(guest))
                .map(|host| number::wide(host.addr()))
        };
        let size = u16::try_from(layout.size).map_err(self.failed("take a queue"))?;
        let rings = VringConfigData {
            queue_max_size: QUEUE_SIZES[0],
            queue_size: size,
            flags: 0,
            desc_table_addr: address(layout.descriptors).map_err(self.failed("find a ring"))?,
            used_ring_addr: address(layout.used).map_err(self.failed("find a ring"))?,
            avail_ring_addr: address(layout.available).map_err(self.failed("find a ring"))?,
            log_addr: None,
        };
        let step = || self.failed("take over a queue");
        self.server.set_vring_num(index, size).map_err(step())?;
        self.server.set_vring_addr(index, &rings).map_err(step())?;
        self.server.set_vring_base(index, 0).map_err(step())?;
        if let Some(call) = self.calls.get(index) {
            self.server.set_vring_call(index, call).map_err(step())?;
        }
        self.server
            .set_vring_kick(index, queue.kick())
            .map_err(step())?;
        let enabled = self.server.clone().set_vring_enable(index, true);
        enabled.map_err(step())
    }
}

impl Device for Fs {
    fn kind(&self) -> Kind {
        Kind::Fs
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn serves_queues(&self) -> bool {
        false
    }

    fn activate(
        mut self: Box<Self>,
        mut guest: Activation,
    ) -> Result<Box<dyn Active>, DeviceError> {
        let queues = (0..QUEUES)
            .map(|index| guest.take_queue(index))
            .collect::<Result<Vec<_>, _>>()?;
        self.in_time(|device| {
            device.introduce(guest.features, &guest.memory)?;
            let mut queues = queues.iter().enumerate();
            queues.try_for_each(|(index, queue)| device.hand_over(index, queue, &guest.memory))
        })?;
        // Only now: while we wait for the server the event loop could do nothing about an event of
        // this device, and would find it again and again.
        for (token, call) in (0u32..).zip(&self.calls) {
            let host = &guest.host;
            host.watch(descriptor(call), Token(token), EventFlags::IN)?;
        }
        // Only answers come over the connection, so we watch it for its end alone.
        guest
            .host
            .watch(&self.connection, CONNECTION, EventFlags::RDHUP)?;
        Ok(Box::new(Running {
            device: *self,
            host: guest.host,
            interrupt: guest.interrupt,
        }))
    }
}

/// The running device. It only passes interrupts on.
struct Running {
    device: Fs,
    host: HostEvents,
    interrupt: Arc<Interrupt>,
}

impl Active for Running {
    /// The server itself reads the queues' notifications.
    fn notified(&mut self, _queue: u16) -> Result<(), DeviceError> {
        Ok(())
    }

    fn ready(&mut self, token: Token) -> Result<(), DeviceError> {
        match self.device.calls.get(number::index(token.0)) {
            Some(call) => {
                if call.read().is_ok() {
                    self.interrupt.raise(Interrupt::USED);
                }
                Ok(())
            }
            None if ended(&self.device.connection) => Err(DeviceError::host(
                format!("serve share {:?}", self.device.tag),
                io::Error::other("the fs server is gone: it closed its connection"),
            )),
            None => Ok(()),
        }
    }

    fn reset(mut self: Box<Self>) -> Result<Box<dyn Device>, DeviceError> {
        for call in &self.device.calls {
            self.host.unwatch(descriptor(call))?;
        }
        self.host.unwatch(&self.device.connection)?;
        self.device.in_time(|device| {
            for index in 0..QUEUES {
                let stop = || device.failed("give a queue back");
                device.server.get_vring_base(index).map_err(stop())?;
                let disabled = device.server.clone().set_vring_enable(index, false);
                disabled.map_err(stop())?;
            }
            Ok(())
        })?;
        Ok(Box::new(self.device))
    }
}

/// Whether the other side is really gone, and this is not just a stale event. A server that says
/// something without being asked counts as gone.
fn ended(connection: &UnixStream) -> bool {
    let look = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let looked = recv(connection, &mut [0_u8; 1][..], look);
    !matches!(looked, Err(Errno::AGAIN | Errno::INTR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    fn watchdog() -> Watchdog {
        Watchdog::start(|| ()).unwrap()
    }

    #[test]
    fn the_configuration_holds_the_tag_and_one_queue() {
        let fs = Fs::new("rootfs", connection(), watchdog()).unwrap();
        assert_eq!(&fs.config()[..7], b"rootfs\0");
        assert_eq!(&fs.config()[36..], 1u32.to_le_bytes());
        assert!(Fs::new(&"x".repeat(36), connection(), watchdog()).is_ok());
    }

    #[test]
    fn a_tag_that_does_not_fit_is_refused() {
        for tag in ["", "a\0b", &"x".repeat(37)] {
            assert!(Fs::new(tag, connection(), watchdog()).is_err(), "{tag:?}");
        }
    }

    #[test]
    fn the_end_of_the_server_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        assert!(!ended(&ours));
        drop(theirs);
        assert!(ended(&ours));
    }
}
