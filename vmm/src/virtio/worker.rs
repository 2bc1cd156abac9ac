//! A thread that serves a device's queues from DRIVER_OK to the reset, and then waits for the next
//! device.
//!
//! The threads and their eventfds are made before the jail closes, one for each slot that may need
//! one: the jail lets none start. An idle thread holds nothing of a device or a guest. [`Serving`]
//! is the device's side of a thread at work.
//!
//! What must hold: after a reset nothing touches the guest's rings or buffers. So the reset waits,
//! at most [`STOP_LIMIT`], for the work in progress.

use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::time::Duration;
use std::{io, thread};

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{DeviceError, HostEvents, Token, descriptor};

/// In bytes. Requests and frames need little stack: their data stays in guest memory.
const STACK: usize = 256 << 10;

/// How long a thread may delay a reset before the VM is given up.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// A flag that a thread can poll on.
#[derive(Clone)]
pub struct Signal {
    raised: Arc<AtomicBool>,
    event: Arc<EventFd>,
}

impl Signal {
    /// Makes a flag that is not raised.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            raised: Arc::default(),
            event: Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?),
        })
    }

    /// Raises the flag until it is lowered.
    pub fn raise(&self) {
        self.raised.store(true, Ordering::SeqCst);
        let _ = self.event.write(1); // EAGAIN: the counter is full, so it is readable
    }

    /// Lowers the flag, for the next job.
    fn lower(&self) {
        let _ = self.event.read(); // EAGAIN: it was not raised
        self.raised.store(false, Ordering::SeqCst);
    }

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
    /// What the device gets back at the end. Nothing in it belongs to the guest.
    type Host: Send + 'static;

    /// Serves the queues until `stop` is raised, or until the driver or the host fails.
    fn serve(&mut self, stop: &Signal) -> Result<(), DeviceError>;

    /// Lets go of the queues.
    fn finish(self) -> Self::Host;
}

/// A thread that serves one device at a time.
#[derive(Clone)]
pub struct Worker {
    jobs: Sender<Box<dyn FnOnce() + Send>>,
    stop: Signal,
    ended: Signal,
}

impl Worker {
    /// Starts the thread, which does `first` before all else. It rests when nobody can give it a
    /// job any more.
    pub fn start(name: String, first: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (stop, ended) = (Signal::new()?, Signal::new()?);
        let (jobs, inbox) = channel::<Box<dyn FnOnce() + Send>>();
        let thread = thread::Builder::new().name(name).stack_size(STACK);
        thread.spawn(move || {
            first();
            while let Ok(job) = inbox.recv() {
                // A job that panics has told nothing: its device sees that.
                let _ = catch_unwind(AssertUnwindSafe(job));
            }
            kata_like_jail::rest();
        })?;
        Ok(Self { jobs, stop, ended })
    }
}

/// Raises a flag when it is dropped: at a job's end, or while the thread unwinds.
struct Raise(Signal);

impl Drop for Raise {
    fn drop(&mut self) {
        self.0.raise();
    }
}

/// A job's end: the host's part comes back, with the driver's fault if that was the reason.
type Over<H> = (H, Result<(), DeviceError>);

/// A thread at work, as its device sees it.
pub struct Serving<H> {
    worker: Worker,
    over: Receiver<Over<H>>,
    /// What the device had, if the thread ended by itself because the guest broke its rings.
    stopped: Option<H>,
    host: HostEvents,
}

impl<H: Send + 'static> Serving<H> {
    /// Gives `worker` a job. Call [`Serving::ready`] when `token` is ready.
    pub fn begin(
        worker: Worker,
        mut job: impl Job<Host = H>,
        host: HostEvents,
        token: Token,
    ) -> Result<Self, DeviceError> {
        worker.stop.lower();
        host.watch(descriptor(worker.ended.event()), token, EventFlags::IN)?;
        let (tell, over) = channel();
        let (stop, ended) = (worker.stop.clone(), worker.ended.clone());
        let work = move || {
            // Not before: the end of the last job, which raises it, may just be under way.
            ended.lower();
            let raise = Raise(ended);
            let result = job.serve(&stop);
            // Without a receiver the device is gone, and the VM is about to end. Its parts stay
            // open until then: this thread may close nothing.
            if let Err(unheard) = tell.send((job.finish(), result)) {
                std::mem::forget(unheard);
            }
            drop(raise);
        };
        let sent = worker.jobs.send(Box::new(work));
        sent.map_err(|_| DeviceError::host("serve a device", "its thread is gone"))?;
        Ok(Self {
            worker,
            over,
            stopped: None,
            host,
        })
    }

    /// Says why the thread has ended by itself. Ignores a stale event of the device's earlier life.
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

    /// Stops the thread. When this returns the thread touches nothing of the guest any more.
    pub fn end(mut self) -> Result<(H, Worker), DeviceError> {
        self.host.unwatch(descriptor(self.worker.ended.event()))?;
        let host = match self.stopped.take() {
            Some(host) => host,
            None => {
                self.worker.stop.raise();
                let over = self.over.recv_timeout(STOP_LIMIT);
                // Whatever the thread reports as the driver's fault, the driver has given up by
                // itself.
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

/// Waits until one of the descriptors is readable or has failed.
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
