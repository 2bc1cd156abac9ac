//! One share's queues: requests go to the library's server, except those about locks.
//!
//! `serve` makes one backend per share and hands it to the vhost-user daemon, which calls it from
//! the share's only worker thread. The library has such a backend, too, but does not tell its file
//! systems what a lock's request says. So this one looks at each request first and gives those
//! about locks to `locks`.
//!
//! A lock that must be waited for must not hold up the queue. Its request is kept, and tried again
//! when a lock of this guest goes and, since the locks of others go silently, at growing intervals
//! ([`SOONEST`], [`LATEST`]). The guest's kernel can't take such a request back (its driver sends
//! no FUSE_INTERRUPT): until the answer no signal, not even SIGKILL, reaches the waiting process.
//! Hence [`PATIENCE`], after which the answer is EAGAIN; for EINTR the kernel would show an errno
//! of its own.
//!
//! A request that can't be decoded or answered ends the process; `last_words` says why.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kata_like_linux::lock;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{FileLock, InHeader, LkIn, LkOut, OutHeader};
use virtiofsd::passthrough::PassthroughFs;
use virtiofsd::server::Server;
use vm_memory::{
    ByteValued, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};
use vmm_sys_util::timerfd::TimerFd;

use crate::closing::Closing;
use crate::locks::{Locks, Request};
use crate::names::Checked;

/// The high-priority queue and the queue of requests.
const QUEUES: usize = 2;

/// The most descriptors of a queue.
const QUEUE_SIZE: usize = 1024;

/// VIRTIO_F_VERSION_1, VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX (virtio 1.2, 6).
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29;

/// The number of the timer's events; the daemon uses the numbers up to [`QUEUES`].
const TIMER: u16 = 3;

/// The number of the event at which the worker closes its filter.
const CLOSE: u16 = 4;

/// How long a lock is waited for. A process that is killed while it waits may live that long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A lock is tried again after as long as it has been waited for already, within these bounds.
const SOONEST: Duration = Duration::from_millis(1);
const LATEST: Duration = Duration::from_millis(50);

/// The most requests that wait. Each takes at most four descriptors of the queue, so there is room
/// for the request that unlocks.
const MAX_WAITING: usize = 128;

type Memory = GuestMemoryMmap<BitmapMmapRegion>;
type Guard = GuestMemoryLoadGuard<Memory>;
type Chain = DescriptorChain<Guard>;
type Vring = VringMutex<GuestMemoryAtomic<Memory>>;
type Ring = VringState<GuestMemoryAtomic<Memory>>;

/// Why the server can't go on.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("serve a queue: the guest's memory is not there")]
    NoMemory,
    #[error("use a queue of the guest's: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("call for an interrupt: {0}")]
    Call(io::Error),
    #[error("find a request in the guest's memory: {0}")]
    Chain(#[from] virtiofsd::descriptor_utils::Error),
    #[error("handle an incoming request: {0}")]
    Request(#[from] virtiofsd::Error),
    #[error("set the timer for locks that are waited for: {0}")]
    Timer(io::Error),
    #[error("an event {0} that nothing was registered for")]
    Event(u16),
}

/// The files of a share, as `names` lets the guest at them.
pub type Files = Arc<PassthroughFs>;

/// See the module.
pub struct Backend {
    server: Server<Checked<PassthroughFs>>,
    /// Set where others may lock, too: there the guest's kernel asks for locks.
    locks: Option<LockServer>,
    memory: Mutex<Option<GuestMemoryAtomic<Memory>>>,
    event_idx: AtomicBool,
    closing: Closing,
}

/// What serves locks.
pub struct LockServer {
    files: Files,
    locks: Arc<Locks>,
    waiting: Mutex<Waiting>,
}

/// The requests that wait, the oldest first, and the timer and eventfd that wake them.
struct Waiting {
    all: Vec<Waiter>,
    timer: TimerFd,
}

struct Waiter {
    queue: usize,
    chain: Chain,
    unique: u64,
    request: Request,
    since: Instant,
}

impl LockServer {
    /// Serves these locks on these files.
    pub fn new(files: Files, locks: Arc<Locks>) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let all = Vec::new();
        Ok(Self {
            files,
            locks,
            waiting: Mutex::new(Waiting { all, timer }),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }
}

impl Waiting {
    /// Sets the timer for the request that came last; stops it if none waits.
    fn set_timer(&mut self) -> Result<(), Broken> {
        let youngest = self.all.iter().map(|waiter| waiter.since.elapsed()).min();
        let set = match youngest {
            Some(waited) => self.timer.reset(waited.clamp(SOONEST, LATEST), None),
            None => self.timer.clear(),
        };
        set.map_err(|errno| Broken::Timer(errno.into()))
    }
}

/// What becomes of a request now.
enum Outcome {
    /// It was answered, with this many bytes.
    Answered(usize),
    /// It is answered later.
    Waits,
}

impl Backend {
    /// Serves `files`; also `locks`, where others may lock.
    pub fn new(files: Checked<PassthroughFs>, locks: Option<LockServer>, closing: Closing) -> Self {
        Self {
            server: Server::new(files),
            locks,
            memory: Mutex::new(None),
            event_idx: AtomicBool::new(false),
            closing,
        }
    }

    /// The descriptors whose events have numbers of ours.
    pub fn events(&self) -> Vec<(RawFd, u16)> {
        let timer = self
            .locks
            .as_ref()
            .map(|locks| locks.waiting().timer.as_raw_fd());
        let close = (self.closing.event(), CLOSE);
        timer
            .map(|timer| (timer, TIMER))
            .into_iter()
            .chain([close])
            .collect()
    }

    fn memory(&self) -> Result<Guard, Broken> {
        let memory = lock(&self.memory);
        Ok(memory.as_ref().ok_or(Broken::NoMemory)?.memory())
    }

    fn handle(&self, event: u16, vrings: &[Vring]) -> Result<(), Broken> {
        let queue = usize::from(event);
        match (vrings.get(queue), &self.locks) {
            (Some(vring), locks) => {
                self.serve_queue(queue, vring)?;
                match locks {
                    Some(locks) if locks.locks.take_released() => self.try_again(locks, vrings),
                    _ => Ok(()),
                }
            }
            (None, Some(locks)) if event == TIMER => self.try_again(locks, vrings),
            (None, _) if event == CLOSE => {
                self.closing.worker();
                Ok(())
            }
            (None, _) => Err(Broken::Event(event)),
        }
    }

    fn serve_queue(&self, queue: usize, vring: &Vring) -> Result<(), Broken> {
        let memory = self.memory()?;
        let ring = &mut *vring.get_mut();
        let event_idx = self.event_idx.load(Ordering::Relaxed);
        loop {
            if event_idx {
                ring.disable_notification()?;
            }
            let chains: Vec<Chain> = ring.get_queue_mut().iter(memory.clone())?.collect();
            for chain in chains {
                let head = chain.head_index();
                match self.serve(queue, &memory, chain)? {
                    Outcome::Answered(length) => self.give_back(ring, head, length)?,
                    Outcome::Waits => {}
                }
            }
            // With EVENT_IDX, a chain that came since the last look came without a kick.
            if !event_idx || !ring.enable_notification()? {
                return Ok(());
            }
        }
    }

    fn serve(&self, queue: usize, memory: &Guard, chain: Chain) -> Result<Outcome, Broken> {
        let request = Reader::new(memory, chain.clone())?;
        if let Some(locks) = &self.locks {
            // A copy of the header. Whatever the guest does to its own afterwards is the library's
            // affair.
            let mut look = request.clone();
            let header: InHeader = look.read_obj().map_err(virtiofsd::Error::DecodeMessage)?;
            if Request::is_one(header.opcode) {
                let asked: LkIn = look.read_obj().map_err(virtiofsd::Error::DecodeMessage)?;
                return locks.serve(queue, memory, chain, &header, &asked);
            }
        }
        let answer = Writer::new(memory, chain)?;
        let no_requests_of_ours = None::<&mut ()>;
        let length = self
            .server
            .handle_message(request, answer, no_requests_of_ours)?;
        Ok(Outcome::Answered(length))
    }

    /// Answers the waiting requests that can have their lock now, or have waited long enough.
    fn try_again(&self, locks: &LockServer, vrings: &[Vring]) -> Result<(), Broken> {
        let waiting = &mut *locks.waiting();
        for waiter in std::mem::take(&mut waiting.all) {
            let Some(vring) = vrings.get(waiter.queue) else {
                continue;
            };
            let ring = &mut *vring.get_mut();
            if !ring.is_enabled() || !ring.get_queue().ready() {
                continue; // the guest has taken back its queue, and all requests with it
            }
            let result = locks.locks.serve(&*locks.files, &waiter.request);
            if is_conflict(&result) && waiter.since.elapsed() < PATIENCE {
                waiting.all.push(waiter);
                continue;
            }
            let memory = self.memory()?;
            let head = waiter.chain.head_index();
            let length = answer(&memory, waiter.chain, waiter.unique, result)?;
            self.give_back(ring, head, length)?;
        }
        waiting.set_timer()
    }

    fn give_back(&self, ring: &mut Ring, head: u16, length: usize) -> Result<(), Broken> {
        // A length that does not fit is capped, as if there were less.
        ring.add_used(head, u32::try_from(length).unwrap_or(u32::MAX))?;
        if !self.event_idx.load(Ordering::Relaxed) || ring.needs_notification()? {
            ring.signal_used_queue().map_err(Broken::Call)?;
        }
        Ok(())
    }

    /// Forgets the waiting requests: the guest starts again, with other queues.
    fn forget_waiting(&self) {
        if let Some(locks) = &self.locks {
            locks.waiting().all.clear();
        }
    }
}

impl LockServer {
    fn serve(
        &self,
        queue: usize,
        memory: &Guard,
        chain: Chain,
        header: &InHeader,
        asked: &LkIn,
    ) -> Result<Outcome, Broken> {
        let request = match Request::parse(header.opcode, header.nodeid, asked) {
            Ok(request) => request,
            Err(error) => {
                return answer(memory, chain, header.unique, Err(error)).map(Outcome::Answered);
            }
        };
        let mut result = self.locks.serve(&*self.files, &request);
        if request.waits && is_conflict(&result) {
            let waiting = &mut *self.waiting();
            if waiting.all.len() < MAX_WAITING {
                waiting.all.push(Waiter {
                    queue,
                    chain,
                    unique: header.unique,
                    request,
                    since: Instant::now(),
                });
                waiting.set_timer()?;
                return Ok(Outcome::Waits);
            }
            result = Err(io::Error::from_raw_os_error(libc::ENOLCK));
        }
        answer(memory, chain, header.unique, result).map(Outcome::Answered)
    }
}

/// Whether somebody else has a lock that excludes this one.
fn is_conflict<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

/// Writes the answer to a lock's request; returns its length.
fn answer(
    memory: &Guard,
    chain: Chain,
    unique: u64,
    result: io::Result<Option<FileLock>>,
) -> Result<usize, Broken> {
    let (error, found) = match result {
        Ok(found) => (0, found.map(|lk| LkOut { lk })),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), None),
    };
    let body = found.as_ref().map_or(&[][..], ByteValued::as_slice);
    let length = size_of::<OutHeader>() + body.len();
    let header = OutHeader {
        len: length as u32, // two small structs
        error,
        unique,
    };
    let mut writer = Writer::new(memory, chain)?;
    writer
        .write_all(header.as_slice())
        .and_then(|()| writer.write_all(body))
        .map_err(virtiofsd::Error::EncodeMessage)?;
    Ok(length)
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.closing.vhost();
        FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.closing.vhost();
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn acked_features(&self, _features: u64) {
        self.forget_waiting();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        self.closing.vhost();
        self.forget_waiting();
        *lock(&self.memory) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without it the daemon's worker would not end, and the daemon would wait for it.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        event: u16,
        _ready: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        if let Err(broken) = self.handle(event, vrings) {
            log::error!("{broken}");
            process::exit(1);
        }
        Ok(())
    }
}
