//! A disk's thread: serves its queue from DRIVER_OK to the reset, and waits for the next in between.
//!
//! The threads are made before the jail closes, one for each slot that a disk can have, since the
//! jail starts none. An idle one holds nothing of a disk or a guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::{io, thread};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Disk;
use super::request;
use crate::virtio::{DeviceError, Virtqueue, descriptor};

/// Requests need little of it: their data stays in guest memory.
const STACK: usize = 256 << 10;

/// A job's end: the disk comes back, with what the driver did wrong if that was the reason.
pub type Over = (Disk, Result<(), DeviceError>);

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

    fn is_raised(&self) -> bool {
        self.raised.load(Ordering::SeqCst)
    }

    /// Readable from [`Signal::raise`] on.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// What a thread does until it is stopped.
pub struct Job {
    /// Where the data is.
    pub disk: Disk,
    /// Whether each write is to last before it is answered.
    pub flush_each_write: bool,
    /// The driver's requests.
    pub queue: Virtqueue,
    /// Ends the job.
    pub stop: Signal,
    /// Raised when it has ended, for whatever reason.
    pub ended: Signal,
}

/// A thread that serves one disk at a time.
#[derive(Clone)]
pub struct Worker(Sender<(Job, Sender<Over>)>);

impl Worker {
    /// Starts it. It ends when nobody can give it a job any more.
    pub fn start(name: String) -> io::Result<Self> {
        let (jobs, inbox) = channel::<(Job, Sender<Over>)>();
        let thread = thread::Builder::new().name(name).stack_size(STACK);
        thread.spawn(move || {
            while let Ok((job, over)) = inbox.recv() {
                job.run(over);
            }
        })?;
        Ok(Self(jobs))
    }

    /// Gives it a disk to serve. The job's end comes by the result.
    pub fn begin(&self, job: Job) -> Result<Receiver<Over>, DeviceError> {
        let (over, result) = channel();
        let sent = self.0.send((job, over));
        sent.map_err(|_| DeviceError::host("serve a disk", "its thread is gone"))?;
        Ok(result)
    }
}

/// Raises a signal when it is dropped: at a job's end, or while the thread unwinds.
struct Raise(Signal);

impl Drop for Raise {
    fn drop(&mut self) {
        self.0.raise();
    }
}

impl Job {
    fn run(mut self, over: Sender<Over>) {
        let ended = Raise(self.ended.clone());
        let result = self.serve();
        let Self { disk, queue, .. } = self;
        drop(queue);
        // Without a receiver the device is gone, and the disk is closed here.
        let _ = over.send((disk, result));
        drop(ended);
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        while !self.stop.is_raised() {
            while let Some(mut chain) = self.queue.next_chain()? {
                if self.stop.is_raised() {
                    return Ok(());
                }
                let stopped = || self.stop.is_raised();
                request::serve(&mut chain, &self.disk, self.flush_each_write, stopped)?;
                self.queue.give_back(chain)?;
                self.queue.signal()?;
            }
            if !self.queue.rearm()? {
                self.wait()?;
            }
        }
        Ok(())
    }

    /// Waits for the driver's notification or the stop.
    fn wait(&self) -> Result<(), DeviceError> {
        let kick = descriptor(self.queue.kick());
        let stop = descriptor(self.stop.event());
        let mut waiting = [
            PollFd::new(&kick, PollFlags::IN),
            PollFd::new(&stop, PollFlags::IN),
        ];
        match poll(&mut waiting, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                let source = io::Error::from(errno);
                return Err(DeviceError::host("wait for a disk's requests", source));
            }
        }
        let _ = self.queue.kick().read(); // EAGAIN: it was the stop
        Ok(())
    }
}
