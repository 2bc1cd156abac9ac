//! One thread that ends a connection when its other side does not answer in time.
//!
//! The vhost-user front end waits for its server's answers without a limit, on the thread that
//! switches devices. So each exchange is announced here first. If its [`Guard`] is not dropped in
//! time the thread shuts the connection down, the exchange fails, and the VM ends with a reason
//! that says so.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use std::{io, thread};

const STACK: usize = 64 << 10;

/// An exchange that has not ended.
struct Watched {
    connection: Arc<UnixStream>,
    until: Instant,
    over: Arc<AtomicBool>,
    late: Arc<AtomicBool>,
}

#[derive(Clone)]
pub struct Watchdog(Sender<Watched>);

impl Watchdog {
    /// Starts the thread, which does `first` before all else. It rests when there is no
    /// watchdog left.
    pub fn start(first: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (sender, inbox) = channel();
        let thread = thread::Builder::new().name("watchdog".to_owned());
        thread.stack_size(STACK).spawn(move || {
            first();
            watch(&inbox);
            kata_like_jail::rest();
        })?;
        Ok(Self(sender))
    }

    /// From now on `connection` has `limit` for one exchange.
    pub fn watch(&self, connection: &Arc<UnixStream>, limit: Duration) -> Guard {
        let guard = Guard {
            over: Arc::default(),
            late: Arc::default(),
        };
        let watched = Watched {
            connection: connection.clone(),
            until: Instant::now() + limit,
            over: guard.over.clone(),
            late: guard.late.clone(),
        };
        // If the thread has panicked an exchange has no limit, as without a watchdog.
        let _ = self.0.send(watched);
        guard
    }
}

/// Dropped, it ends the exchange.
pub struct Guard {
    over: Arc<AtomicBool>,
    late: Arc<AtomicBool>,
}

impl Guard {
    /// Whether the connection was shut down.
    pub fn is_late(&self) -> bool {
        self.late.load(Ordering::SeqCst)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// Sleeps until the next exchange should be over. An idle VM is never woken.
fn watch(inbox: &Receiver<Watched>) {
    let mut all: Vec<Watched> = Vec::new();
    loop {
        all.retain(|watched| !watched.over.load(Ordering::SeqCst));
        let next = all.iter().map(|watched| watched.until).min();
        let news = match next {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => inbox.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        match news {
            Ok(watched) => all.push(watched),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                for watched in all.extract_if(.., |watched| watched.until <= now) {
                    if !watched.over.load(Ordering::SeqCst) {
                        watched.late.store(true, Ordering::SeqCst);
                        // The exchange may have ended by itself in this moment.
                        let _ = watched.connection.shutdown(Shutdown::Both);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn only_an_exchange_that_lasts_is_ended() {
        let watchdog = Watchdog::start(|| ()).unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        let soon = Duration::from_millis(20);
        for _ in 0..100 {
            drop(watchdog.watch(&ours, soon));
        }
        thread::sleep(3 * soon);
        ours.set_nonblocking(true).unwrap();
        let open = (&*ours).read(&mut [0]).unwrap_err();
        assert_eq!(open.kind(), io::ErrorKind::WouldBlock);
        ours.set_nonblocking(false).unwrap();
        let guard = watchdog.watch(&ours, soon);
        assert!(!guard.is_late());
        assert_eq!((&*ours).read(&mut [0]).unwrap(), 0);
        assert!(guard.is_late());
    }
}
