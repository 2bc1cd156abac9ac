//! The file of the guest's log. What a VMM tells may be the guest's word by now: the file is
//! bounded, and nothing but lines of printable ASCII gets into it.
//!
//! `reports` appends, `vmm` looks how far it has come.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use super::child::clean;

/// The most bytes of lines in the file.
const MAX_FILE: u64 = 1 << 20;

/// How many of the last bytes are searched for the last lines.
const TAIL: usize = 4096;

/// The file, and how much of it is written. One task appends.
#[derive(Debug)]
pub(super) struct GuestLog {
    file: File,
    length: AtomicU64,
}

impl GuestLog {
    /// `file` is empty.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            length: AtomicU64::new(0),
        }
    }

    /// Appends lines, as far as they fit. If the file fails, lines are lost, and the VM goes on.
    pub(super) fn append(&self, text: &str) {
        let length = self.length();
        if text.is_empty() || length > MAX_FILE {
            return;
        }
        let clean = |char| match char {
            '\n' | ' '..='~' => char,
            _ => '?',
        };
        let mut text: String = text.chars().map(clean).collect();
        let room = usize::try_from(MAX_FILE - length).unwrap_or(usize::MAX);
        if text.len() > room {
            let whole = text.get(..room).and_then(|text| text.rfind('\n'));
            text.truncate(whole.map_or(0, |end| end + 1));
            text.push_str(&format!(
                "[the log's limit of {MAX_FILE} bytes is reached]\n"
            ));
            self.length.store(MAX_FILE + 1, Ordering::Relaxed);
        } else {
            self.length
                .store(length + text.len() as u64, Ordering::Relaxed);
        }
        let _ = (&self.file).write_all(text.as_bytes());
    }

    /// How many bytes it has; above its limit if it takes no more.
    pub(super) fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    /// Whether it takes no more.
    pub(super) fn is_full(&self) -> bool {
        self.length() > MAX_FILE
    }

    /// The last lines, as they may be shown.
    pub(super) fn tail(&self) -> io::Result<Vec<String>> {
        let mut bytes = vec![0; TAIL];
        let length = self.file.metadata()?.len();
        let start = length.saturating_sub(bytes.len() as u64);
        let count = self.file.read_at(&mut bytes, start)?;
        bytes.truncate(count);
        let text = String::from_utf8_lossy(&bytes);
        let lines = text.lines().map(clean);
        Ok(lines.filter(|line| !line.is_empty()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_bounded_and_clean() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = GuestLog::new(file.reopen().unwrap());
        log.append("first\n\x1b[2J\u{202e}\n");
        assert_eq!(log.tail().unwrap(), ["first", "?[2J?"]);
        for _ in 0..20 {
            log.append(&format!("{}\nshort\n", "x".repeat(100_000)));
        }
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(
            log.is_full() && text.len() < (1 << 20) + 100,
            "{}",
            text.len()
        );
        assert_eq!(text.matches("limit").count(), 1);
        assert!(
            text.lines().all(|line| line.len() != 99_999),
            "a line is cut"
        );
    }
}
