//! The agent's log: lines to `/dev/kmsg`, which the VMM carries to the host with the kernel's own.
//!
//! Called through the `log` crate. Containers can cause lines, so we bound their number: the
//! guest's log is a ring, and a flood would wash away what matters. Nothing here may block.

use std::fs::File;
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The kernel cuts a record at about 1,000 bytes (kernel/printk/printk.c, PRINTKRB_RECORD_MAX).
const MAX_LINE: usize = 900;

/// How many lines may come at once; `REFILL` more each second.
const BURST: u32 = 200;
const REFILL: u32 = 20;

struct Kmsg {
    device: File,
    budget: Mutex<Budget>,
}

/// Sends the `log` crate's lines to `device`.
pub fn start(device: File) {
    let logger = Box::leak(Box::new(Kmsg {
        device,
        budget: Mutex::new(Budget::new(Instant::now())),
    }));
    // Only a second call could fail, and `init` makes one.
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

impl Log for Kmsg {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= Level::Info
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let Ok(mut budget) = self.budget.lock() else {
            return;
        };
        let Some(lost) = budget.take(Instant::now()) else {
            return;
        };
        drop(budget);
        if lost > 0 {
            let line = format!("{lost} lines left out");
            let _ = (&self.device).write_all(&format_line(Level::Warn, &line));
        }
        // There is nobody to tell that the log can't be written.
        let _ = (&self.device).write_all(&format_line(record.level(), &record.args().to_string()));
    }

    fn flush(&self) {}
}

/// Formats one record as the kernel wants it: `<priority>text`, in a single write(2).
fn format_line(level: Level, text: &str) -> Vec<u8> {
    // Syslog priorities (RFC 5424, 6.2.1) of the facility "daemon", 3: not the kernel's own.
    let priority = 3 * 8
        + match level {
            Level::Error => 3,
            Level::Warn => 4,
            Level::Info => 6,
            Level::Debug | Level::Trace => 7,
        };
    let mut line = format!("<{priority}>kata-like-agent: ").into_bytes();
    let clean = text
        .bytes()
        .map(|byte| if byte < 0x20 { b' ' } else { byte });
    line.extend(clean.take(MAX_LINE));
    line
}

/// A bucket of lines that fills up with time.
struct Budget {
    left: u32,
    filled: Instant,
    lost: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            filled: now,
            lost: 0,
        }
    }

    /// `None`: this line is one too many. Otherwise how many were left out before it.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let seconds = now.saturating_duration_since(self.filled).as_secs();
        if seconds > 0 {
            let more = REFILL.saturating_mul(u32::try_from(seconds).unwrap_or(u32::MAX));
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled += Duration::from_secs(seconds);
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.lost))
            }
            None => {
                self.lost += 1;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_record_with_its_level() {
        let line = format_line(Level::Error, "a\nb\x1b[0m");
        assert_eq!(line, b"<27>kata-like-agent: a b [0m");
        assert!(format_line(Level::Info, &"x".repeat(5000)).len() < 1000);
    }

    #[test]
    fn a_flood_is_cut_and_counted() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let told = (0..BURST + 7)
            .filter(|_| budget.take(start).is_some())
            .count();
        assert_eq!(told, BURST as usize);
        assert_eq!(budget.take(start + Duration::from_secs(1)), Some(7));
        assert_eq!(budget.take(start + Duration::from_secs(1)), Some(0));
    }
}
