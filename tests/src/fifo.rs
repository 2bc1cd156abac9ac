//! A FIFO as containerd's clients make them for a process's streams; this side plays the client.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::{Patience, TestResult, failure};

/// A FIFO in a folder of the test's.
pub struct Fifo(PathBuf);

impl Fifo {
    /// Makes it.
    pub fn new(folder: &Path, name: &str) -> TestResult<Self> {
        let path = folder.join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0)?;
        Ok(Self(path))
    }

    /// One that is there.
    pub fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// As a request names it.
    pub fn path(&self) -> String {
        self.0.display().to_string()
    }

    /// Opens it to read, whether there is a writer or not.
    pub fn reader(&self) -> TestResult<Reader> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        Ok(Reader {
            file: options.open(&self.0)?,
            seen: Vec::new(),
        })
    }

    /// Reads it in the background from now on, so that no writer has to wait.
    pub fn collect(&self) -> TestResult<Collector> {
        let mut options = OpenOptions::new();
        // Open for writing as well, so that no end is seen before the last writer has come.
        options.read(true).write(true);
        let reader = Reader {
            file: options.custom_flags(libc::O_NONBLOCK).open(&self.0)?,
            seen: Vec::new(),
        };
        let (stopped, stop) = std::io::pipe()?;
        Ok(Collector {
            stop,
            reader: thread::spawn(move || reader.read_until_stopped(&stopped)),
        })
    }

    /// Opens it to write, which takes a reader, and writes.
    pub fn write(&self, text: &str) -> TestResult<File> {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(&self.0)?;
        file.write_all(text.as_bytes())?;
        Ok(file)
    }
}

/// The reading end, and what has come out of it.
pub struct Reader {
    file: File,
    /// All that was read.
    pub seen: Vec<u8>,
}

impl Reader {
    /// Reads until this holds, or until the end. Whether it holds.
    fn until(&mut self, deadline: Duration, holds: impl Fn(&[u8]) -> bool) -> TestResult<bool> {
        let patience = Patience::new(deadline);
        while !holds(&self.seen) {
            let left = patience.left();
            if left.is_zero() {
                let text = String::from_utf8_lossy(&self.seen);
                let tail: String = text.chars().rev().take(200).collect();
                let tail: String = tail.chars().rev().collect();
                return Err(failure(format!(
                    "not within {deadline:?}; the last bytes: {tail:?}"
                )));
            }
            let mut waiting = [PollFd::new(&self.file, PollFlags::IN)];
            poll(&mut waiting, Some(&Timespec::try_from(left)?))?;
            let happened = waiting[0].revents();
            if happened.contains(PollFlags::IN) {
                self.take()?;
            } else if happened.contains(PollFlags::HUP) {
                // Only told where there was a writer.
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads what is there.
    fn take(&mut self) -> TestResult {
        let mut chunk = [0; 4096];
        let count = self.file.read(&mut chunk)?;
        self.seen.extend_from_slice(&chunk[..count]);
        Ok(())
    }

    /// Reads until the other end of `stopped` is closed and nothing is left.
    fn read_until_stopped(mut self, stopped: &PipeReader) -> TestResult<Vec<u8>> {
        loop {
            let mut waiting = [
                PollFd::new(&self.file, PollFlags::IN),
                PollFd::new(stopped, PollFlags::empty()),
            ];
            poll(&mut waiting, None)?;
            let [file, stopped] = waiting.map(|one| one.revents());
            if file.contains(PollFlags::IN) {
                self.take()?;
            } else if stopped.contains(PollFlags::HUP) {
                return Ok(self.seen);
            }
        }
    }

    /// Reads until a text has come.
    pub fn expect(&mut self, text: &str, deadline: Duration) -> TestResult {
        let wanted = text.as_bytes();
        let found = self.until(deadline, |seen| {
            seen.windows(wanted.len()).any(|part| part == wanted)
        })?;
        match found {
            true => Ok(()),
            false => Err(failure(format!("the stream has ended without {text:?}"))),
        }
    }

    /// Reads at least so many bytes in all.
    pub fn at_least(&mut self, count: usize, deadline: Duration) -> TestResult {
        match self.until(deadline, |seen| seen.len() >= count)? {
            true => Ok(()),
            false => Err(failure(format!(
                "the stream has ended before {count} bytes"
            ))),
        }
    }

    /// Reads to the end.
    pub fn to_end(&mut self, deadline: Duration) -> TestResult {
        self.until(deadline, |_| false).map(drop)
    }

    /// What was read, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).replace('\r', "")
    }
}

/// A FIFO that is read in the background; the reading ends with the value.
pub struct Collector {
    stop: PipeWriter,
    reader: JoinHandle<TestResult<Vec<u8>>>,
}

impl Collector {
    /// All that has come.
    pub fn finish(self) -> TestResult<Vec<u8>> {
        drop(self.stop);
        let all = self.reader.join();
        all.map_err(|_| failure("the reader of a FIFO panicked"))?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_has_what_came_before_the_stop() -> TestResult {
        let folder = tempfile::tempdir()?;
        let fifo = Fifo::new(folder.path(), "fifo")?;
        let collector = fifo.collect()?;
        // More than a pipe holds, from one writer after the other.
        let text = "0123456789abcdef".repeat(8192);
        for part in text.as_bytes().chunks(libc::PIPE_BUF) {
            let part = std::str::from_utf8(part)?;
            let patience = Patience::new(Duration::from_secs(10));
            // So much is taken as a whole or, while the FIFO is full, not at all.
            while fifo.write(part).is_err() {
                assert!(!patience.is_over(), "the FIFO stays full");
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(collector.finish()? == text.as_bytes(), "other bytes came");
        Ok(())
    }
}
