//! The thread that switches devices on and off.
//!
//! A vCPU's write of DRIVER_OK or 0 may mean to wait for the host: for an fs server's answers, for
//! the end of a disk's last request. A vCPU's thread may make no system call for that, and the
//! event loop may never wait. So `bus` hands such a write to this thread. The vCPU waits until the
//! write has had its effect, as its driver expects; the loop goes on with everything else.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;
use std::{io, thread};

use super::DeviceError;
use super::mmio::{Slot, Switch};

/// In bytes.
const STACK: usize = 256 << 10;

/// How long a vCPU waits. Each device has a shorter deadline of its own; a few may be switched one
/// after the other.
const LIMIT: Duration = Duration::from_secs(30);

/// What a vCPU wants.
struct Order {
    slot: Arc<Slot>,
    switch: Switch,
    done: SyncSender<Result<(), DeviceError>>,
}

/// The way to the thread.
#[derive(Clone)]
pub struct Life(Sender<Order>);

impl Life {
    /// Starts the thread, which does `first` before all else. It rests when nobody can order
    /// anything any more.
    pub fn start(first: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (orders, inbox) = channel::<Order>();
        let thread = thread::Builder::new().name("life".to_owned());
        thread.stack_size(STACK).spawn(move || {
            first();
            while let Ok(Order { slot, switch, done }) = inbox.recv() {
                // After a panic nothing is sent, and the vCPU sees that.
                let switched = catch_unwind(AssertUnwindSafe(|| slot.switch(switch)));
                // The vCPU may have given up; then the VM is about to end.
                let _ = switched.map(|result| done.send(result));
            }
            kata_like_jail::rest();
        })?;
        Ok(Self(orders))
    }

    /// Has a switch of `slot` carried out, and waits for it. An error is the host's failure.
    pub fn switch(&self, slot: &Arc<Slot>, switch: Switch) -> Result<(), DeviceError> {
        let (done, result) = sync_channel(1);
        let slot = slot.clone();
        let order = Order { slot, switch, done };
        let failed = |why: String| DeviceError::host("switch a device on or off", why);
        let sent = self.0.send(order);
        sent.map_err(|_| failed("the thread for that is gone".to_owned()))?;
        result.recv_timeout(LIMIT).unwrap_or_else(|error| {
            Err(failed(match error {
                RecvTimeoutError::Timeout => format!("it has not happened within {LIMIT:?}"),
                RecvTimeoutError::Disconnected => "the thread for that panicked".to_owned(),
            }))
        })
    }
}
