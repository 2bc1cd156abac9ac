//! A terminal for a command under test: this side plays the user.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::{Patience, TestResult, failure};

/// A command on a terminal.
pub struct OnTerminal {
    master: File,
    child: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl OnTerminal {
    /// Starts the command with a terminal of this size as its controlling one.
    pub fn start(mut command: Command, columns: u16, rows: u16) -> TestResult<Self> {
        let (mut master, mut slave) = (-1, -1);
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the two integers and the size live across the call; name and termios may be null.
        let failed = unsafe {
            libc::openpty(
                &mut master,
                &mut slave,
                std::ptr::null_mut(),
                std::ptr::null(),
                &size,
            )
        } < 0;
        if failed {
            return Err(failure(format!(
                "openpty: {}",
                std::io::Error::last_os_error()
            )));
        }
        // SAFETY: openpty has just made both descriptors, and nobody else knows them.
        let (master, slave) =
            unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        // The child must not hold the master: its end is what the terminal's reader waits for.
        rustix::io::fcntl_setfd(&master, rustix::io::FdFlags::CLOEXEC)?;
        let copies = (slave.try_clone()?, slave.try_clone()?);
        command
            .stdin(Stdio::from(slave))
            .stdout(Stdio::from(copies.0))
            .stderr(Stdio::from(copies.1));
        // SAFETY: setsid and ioctl are async-signal-safe and allocate nothing; fd 0 is the slave by
        // then.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        drop(command); // our copies of the slave
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, shared) = (File::from(master.try_clone()?), Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                shared
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(&buffer[..count]);
            }
        });
        Ok(Self {
            master: File::from(master),
            child,
            seen,
        })
    }

    /// Types.
    pub fn write(&mut self, text: &str) -> TestResult {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Makes the window larger or smaller; the kernel sends SIGWINCH.
    pub fn resize(&self, columns: u16, rows: u16) -> TestResult {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: TIOCSWINSZ reads one winsize, which lives across the call; the descriptor is
        // ours.
        if unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
            return Err(failure(format!(
                "TIOCSWINSZ: {}",
                std::io::Error::last_os_error()
            )));
        }
        Ok(())
    }

    /// What was on the screen so far.
    pub fn screen(&self) -> String {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Waits until a text is on the screen: `deadline` is how long nothing at all may come, three
    /// times that the end.
    pub fn expect(&self, text: &str, deadline: Duration) -> TestResult {
        let begin = Instant::now();
        let (all, mut silence) = (Patience::new(deadline * 3), Patience::new(deadline));
        let mut length = 0;
        loop {
            let screen = self.screen();
            if screen.contains(text) {
                break;
            }
            if screen.len() != length {
                (length, silence) = (screen.len(), Patience::new(deadline));
            }
            if silence.is_over() || all.is_over() {
                return Err(failure(format!(
                    "{text:?} not on the terminal after {:?}: {screen:?}",
                    begin.elapsed()
                )));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits for the command's end and gives its exit code.
    pub fn finish(mut self, deadline: Duration) -> TestResult<i32> {
        crate::ctr::wait(&mut self.child, &Patience::new(deadline))?
            .ok_or_else(|| failure(format!("still running; screen: {:?}", self.screen())))
    }
}
