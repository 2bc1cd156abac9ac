//! The VMM and the guest of these tests: a vhost-user front-end, and a driver with one request at a
//! time, whose bytes are whatever the test wants. One more request may wait beside it.

use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtiofsd::fuse::{InHeader, InitInCompat, InitInExt, InitOut, OutHeader};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

pub const MEMORY: usize = 4 << 20;
const QUEUE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x10_0000;
const REPLY: u64 = 0x20_0000;
const REPLY_SIZE: u32 = 0x11_0000;

/// The index of the request that may wait: of its descriptors, and of its buffers, that far behind
/// the others.
const BESIDE: u16 = 2;
const BESIDE_OFFSET: u64 = 0x8_0000;
const BESIDE_REPLY_SIZE: u32 = 0x1000;

/// FUSE_POSIX_LOCKS and FUSE_FLOCK_LOCKS.
pub const LOCKS: u32 = 1 << 1 | 1 << 10;

/// FUSE_INIT_EXT, FUSE_SUBMOUNTS, FUSE_WRITEBACK_CACHE, FUSE_HANDLE_KILLPRIV_V2 and the above.
const OFFERED: u32 = (1 << 30) | (1 << 27) | (1 << 16) | (1 << 28) | LOCKS;

/// A mounted virtio-fs, as raw requests.
pub struct Guest {
    memory: GuestMemoryMmap<()>,
    kick: EventFd,
    call: EventFd,
    next: u16,
    /// The unique number of the request that waits.
    waiting: Option<u64>,
    /// The user and group of the following requests.
    pub user: u32,
    /// The offered features that the server has taken.
    pub accepted: u32,
    _frontend: Frontend,
}

impl Guest {
    /// Connects, hands over memory and queues, and mounts (FUSE_INIT).
    pub fn mount(socket: UnixStream) -> Self {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, MEMORY as u64).unwrap();
        let file = FileOffset::new(std::fs::File::from(file), 0);
        let range = (GuestAddress(0), MEMORY, Some(file));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
        let mut frontend = Frontend::from_stream(socket, 2);
        let offered = frontend.get_features().unwrap();
        frontend.set_owner().unwrap();
        let wanted = (1 << 32) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(offered & wanted).unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
        let region = memory.find_region(GuestAddress(0)).unwrap();
        frontend
            .set_mem_table(&[VhostUserMemoryRegionInfo {
                guest_phys_addr: 0,
                memory_size: MEMORY as u64,
                userspace_addr: host,
                mmap_offset: 0,
                mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
            }])
            .unwrap();
        let event = || EventFd::new(0).unwrap();
        let (kick, unused, call) = (event(), event(), event());
        for queue in 0..2 {
            // Queue 0 (high priority) exists but is never used; it lies elsewhere.
            let base = host + if queue == 0 { 0x8000 } else { 0 };
            frontend.set_vring_num(queue, QUEUE).unwrap();
            let rings = VringConfigData {
                queue_max_size: QUEUE,
                queue_size: QUEUE,
                flags: 0,
                desc_table_addr: base + DESCRIPTORS,
                used_ring_addr: base + USED,
                avail_ring_addr: base + AVAILABLE,
                log_addr: None,
            };
            frontend.set_vring_addr(queue, &rings).unwrap();
            frontend.set_vring_base(queue, 0).unwrap();
            frontend.set_vring_call(queue, &call).unwrap();
            let kick = if queue == 0 { &unused } else { &kick };
            frontend.set_vring_kick(queue, kick).unwrap();
            frontend.set_vring_enable(queue, true).unwrap();
        }
        let mut guest = Self {
            memory,
            kick,
            call,
            next: 0,
            waiting: None,
            user: 0,
            accepted: 0,
            _frontend: frontend,
        };
        let mut init = bytes(InitInCompat {
            major: 7,
            minor: 38,
            max_readahead: 0,
            flags: OFFERED,
        });
        init.extend(bytes(InitInExt::default()));
        let reply = guest.call(26, 0, &init).unwrap();
        guest.accepted = parse::<InitOut>(&reply).flags;
        guest
    }

    /// Sends one request and waits for its reply: the bytes behind the header, or the errno.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let (unique, request) = self.request(opcode, node, body);
        self.send(&request);
        self.wait(self.next - u16::from(self.waiting.is_some()));
        self.reply(unique, REPLY)
    }

    /// FUSE_FORGET of one look-up. It has no answer, only its buffers come back.
    pub fn forget(&mut self, node: u64) {
        let (_, request) = self.request(2, node, &1u64.to_ne_bytes());
        self.send(&request);
        self.wait(self.next - u16::from(self.waiting.is_some()));
    }

    /// Sends one request beside the others, without waiting. Only one at a time.
    pub fn start(&mut self, opcode: u32, node: u64, body: &[u8]) {
        assert_eq!(self.waiting, None);
        let (unique, request) = self.request(opcode, node, body);
        self.waiting = Some(unique);
        self.send_at(BESIDE, BESIDE_OFFSET, BESIDE_REPLY_SIZE, &request);
    }

    /// Waits for the reply to [`Guest::start`].
    pub fn finish(&mut self) -> Result<Vec<u8>, i32> {
        let unique = self.waiting.take().unwrap();
        self.wait(self.next);
        self.reply(unique, REPLY + BESIDE_OFFSET)
    }

    /// Whether that reply is still missing.
    pub fn waits(&self) -> bool {
        let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        self.waiting.is_some() && used != self.next
    }

    fn request(&self, opcode: u32, node: u64, body: &[u8]) -> (u64, Vec<u8>) {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode,
            unique: u64::from(self.next) + 1,
            nodeid: node,
            uid: self.user.into(),
            gid: self.user.into(),
            pid: 1,
            ..InHeader::default()
        };
        let mut request = bytes(header);
        request.extend_from_slice(body);
        (header.unique, request)
    }

    fn reply(&self, unique: u64, at: u64) -> Result<Vec<u8>, i32> {
        let reply: OutHeader = self.memory.read_obj(GuestAddress(at)).unwrap();
        assert_eq!(reply.unique, unique, "an answer to another request");
        if reply.error != 0 {
            return Err(-reply.error);
        }
        let mut body = vec![0; reply.len as usize - size_of::<OutHeader>()];
        let start = GuestAddress(at + size_of::<OutHeader>() as u64);
        self.memory.read_slice(&mut body, start).unwrap();
        Ok(body)
    }

    /// Sends one request of arbitrary bytes.
    pub fn send(&mut self, request: &[u8]) {
        self.send_at(0, 0, REPLY_SIZE, request);
    }

    fn send_at(&mut self, first: u16, offset: u64, reply_size: u32, request: &[u8]) {
        let (at, reply) = (REQUEST + offset, REPLY + offset);
        self.memory.write_slice(request, GuestAddress(at)).unwrap();
        self.describe(first.into(), at, request.len() as u32, 1);
        self.describe(u64::from(first) + 1, reply, reply_size, 2);
        let slot = AVAILABLE + 4 + u64::from(self.next % QUEUE) * 2;
        self.memory.write_obj(first, GuestAddress(slot)).unwrap();
        self.next += 1;
        self.memory
            .write_obj(self.next, GuestAddress(AVAILABLE + 2))
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// Waits until at least `wanted` requests have been answered.
    fn wait(&self, wanted: u16) {
        loop {
            let used: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
            if used >= wanted {
                return;
            }
            let mut call = libc::pollfd {
                fd: self.call.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: `call` is one live pollfd, as the count says.
            let ready = unsafe { libc::poll(&mut call, 1, 10_000) };
            assert_eq!(ready, 1, "no answer within ten seconds");
            self.call.read().unwrap();
        }
    }

    fn describe(&self, index: u64, address: u64, length: u32, flags: u16) {
        let at = DESCRIPTORS + index * 16;
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory
            .write_obj(index as u16 + 1, GuestAddress(at + 14))
            .unwrap();
    }
}

/// The bytes of a structure of the FUSE protocol.
pub fn bytes(object: impl ByteValued) -> Vec<u8> {
    object.as_slice().to_vec()
}

/// A structure of the FUSE protocol at the start of a reply.
pub fn parse<T: ByteValued + Default>(reply: &[u8]) -> T {
    let mut object = T::default();
    let size = size_of::<T>();
    object.as_mut_slice().copy_from_slice(&reply[..size]);
    object
}
