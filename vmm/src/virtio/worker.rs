//! A thread that serves a device's queues from DRIVER_OK to the reset, and waits for the next in between.
//!
//! The threads are made before the jail closes, one for each slot that may come to need one, since the
//! jail starts none. An idle one holds nothing of a device or a guest. [`Serving`] is the device's side
//! of one that is at work.
//!
//! What must hold: after a reset nothing touches the guest's rings or buffers any more. The reset
//! therefore waits, at most [`STOP_LIMIT`], for what is under way.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;
use std::{io, thread};

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DeviceError, HostEvents, Token, descriptor};

/// Requests and frames need little of it: their data stays in guest memory.
const STACK: usize = 256 << 10;

/// How long a thread may keep a reset waiting, before the VM is given up.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Something that is said once, between a device and its thread.
#[derive(Clone)]
pub struct Signal {
    raised: Arc<AtomicBool>,
    event: Arc<EventFd>,
}

impl Signal {
    /// Not raised yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            raised: Arc::default(),
            event: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
        })
    }

    /// Raises it, for good.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        let _ = self.event.write(1); // a full counter (EAGAIN) says the same
    }

    /// Whether it was raised.
    pub fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// Readable from [`Signal::raise`] on.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// What a thread does until it is stopped.
pub trait Job: Send + 'static {
    /// What the device gets back at the end, of which nothing belongs to the guest.
    type Host: Send + 'static;

    /// Serves the queues until `stop` is raised, or the driver or the host fails.
    fn serve(&mut self, stop: &Signal) -> Result<(), DeviceError>;

    /// Lets go of the queues.
    fn finish(self) -> Self::Host;
}

/// A thread that serves one device at a time.
#[derive(Clone)]
pub struct Worker(Sender<Box<dyn FnOnce() + Send>>);

impl Worker {
    /// Starts it. It ends when nobody can give it a job any more.
    pub fn start(name: String) -> io::Result<Self> {
        let (jobs, inbox) = channel::<Box<dyn FnOnce() + Send>>();
        let thread = thread::Builder::new().name(name).stack_size(STACK);
        thread.spawn(move || {
            while let Ok(job) = inbox.recv() {
                job();
            }
        })?;
        Ok(Self(jobs))
    }
}

/// Raises a signal when it is dropped: at a job's end, or while the thread unwinds.
struct Raise(Signal);

impl Drop for Raise {
    fn drop(&mut self) {
        self.0.raise();
    }
}

/// A job's end: what is the host's comes back, with what the driver did wrong if that was the reason.
type Over<H> = (H, Result<(), DeviceError>);

/// A thread at work, seen from its device.
pub struct Serving<H> {
    worker: Worker,
    stop: Signal,
    ended: Signal,
    over: Receiver<Over<H>>,
    /// What the device had, if the thread has ended by itself: the guest broke its rings.
    stopped: Option<H>,
    host: HostEvents,
}

impl<H: Send + 'static> Serving<H> {
    /// Gives `worker` a job. [`Serving::ready`] is to be called when `token` is ready.
    pub fn begin(
        worker: Worker,
        mut job: impl Job<Host = H>,
        host: HostEvents,
        token: Token,
    ) -> Result<Self, DeviceError> {
        let failed = |source| DeviceError::host("take an eventfd for a device's thread", source);
        let stop = Signal::new().map_err(failed)?;
        let ended = Signal::new().map_err(failed)?;
        host.watch(descriptor(ended.event()), token, EventFlags::IN)?;
        let (tell, over) = channel();
        let (stopped, raise) = (stop.clone(), Raise(ended.clone()));
        let work = move || {
            let result = job.serve(&stopped);
            // Without a receiver the device is gone, and what it had is closed here.
            let _ = tell.send((job.finish(), result));
            drop(raise);
        };
        let sent = worker.0.send(Box::new(work));
        sent.map_err(|_| DeviceError::host("serve a device", "its thread is gone"))?;
        Ok(Self {
            worker,
            stop,
            ended,
            over,
            stopped: None,
            host,
        })
    }

    /// The thread has ended by itself, if this is no event of an earlier life: here is why.
    pub fn ready(&mut self) -> Result<(), DeviceError> {
        match self.over.try_recv() {
            Ok((host, result)) => {
                self.stopped = Some(host);
                result
            }
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => match self.stopped {
                Some(_) => Ok(()),
                None => Err(panicked()),
            },
        }
    }

    /// Stops the thread. It touches nothing of the guest's any more when this returns.
    pub fn end(mut self) -> Result<(H, Worker), DeviceError> {
        self.host.unwatch(descriptor(self.ended.event()))?;
        let host = match self.stopped.take() {
            Some(host) => host,
            None => {
                self.stop.raise();
                let over = self.over.recv_timeout(STOP_LIMIT);
                // Whatever the thread has to complain of, the driver has given up by itself.
                let (host, _) = over.map_err(|error| match error {
                    RecvTimeoutError::Disconnected => panicked(),
                    RecvTimeoutError::Timeout => DeviceError::host(
                        "stop a device's thread",
                        format!("a request has not come back from the host for {STOP_LIMIT:?}"),
                    ),
                })?;
                host
            }
        };
        Ok((host, self.worker))
    }
}

fn panicked() -> DeviceError {
    DeviceError::host("serve a device", "its thread panicked")
}

/// Waits until one of these is readable, or has failed.
pub fn wait_for(readable: &[BorrowedFd]) -> Result<(), DeviceError> {
    let mut waiting: Vec<PollFd> = readable
        .iter()
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    match poll(&mut waiting, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => {
            let source = io::Error::from(errno);
            Err(DeviceError::host("wait for a device's queues", source))
        }
    }
}
