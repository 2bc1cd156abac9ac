//! The shim's log: lines on descriptor 2, which is containerd's FIFO or nothing.
//!
//! `main` starts it in the serving process; `pod` sets the level once it has read the
//! configuration. Nobody may be reading, or read slowly: a line that can't be written at once is
//! lost, and nothing else happens.
//!
//! What a guest can cause as often as it likes is logged within a [`Budget`]: the host's journal
//! counts the lines of all pods together.

use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use kata_like_config::LogLevel;
use kata_like_linux::lock;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::Registry;
use tracing_subscriber::reload;

type Level = reload::Handle<LevelFilter, Registry>;

/// The level of the process's log, if the configuration may change it.
static LEVEL: OnceLock<Level> = OnceLock::new();

/// Starts the log at level info; with `debug`, which is containerd's own wish, at debug for good.
pub fn start(debug: bool) {
    let first = match debug {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    let (subscriber, level) = subscriber(first, Lines);
    // Only fails where a log is running already.
    if tracing::subscriber::set_global_default(subscriber).is_ok() && !debug {
        let _ = LEVEL.set(level);
    }
}

/// Sets the level that the configuration asks for.
pub fn set_level(level: LogLevel) {
    if let Some(handle) = LEVEL.get() {
        set(handle, level);
    }
}

fn set(handle: &Level, level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Only fails after the log's end.
    let _ = handle.reload(level);
}

fn subscriber<W>(first: LevelFilter, writer: W) -> (impl Subscriber + Send + Sync, Level)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, level) = reload::Layer::new(first);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_writer(writer);
    (
        tracing_subscriber::registry().with(filter).with(lines),
        level,
    )
}

/// Descriptor 2, each line of it whole or lost.
#[derive(Clone, Copy)]
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = io::stderr().write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

/// How many lines one place may log in [`SPAN`].
const LINES: u32 = 10;
/// See [`LINES`].
const SPAN: Duration = Duration::from_secs(5);

/// What one place in the code may log at a guest's wish: ten lines in five seconds. It is a
/// `static` beside its line.
#[derive(Debug)]
pub struct Budget(Mutex<Spent>);

#[derive(Debug)]
struct Spent {
    since: Option<Instant>,
    lines: u32,
    left_out: u64,
}

impl Budget {
    /// Nothing is spent yet.
    pub const fn new() -> Self {
        Self(Mutex::new(Spent {
            since: None,
            lines: 0,
            left_out: 0,
        }))
    }

    /// Logs a line if that is within the budget. It gets the number of lines that were left out
    /// since the last one.
    pub fn spend(&self, line: impl FnOnce(u64)) {
        let allowed = lock(&self.0).allows(Instant::now());
        if let Some(left_out) = allowed {
            line(left_out);
        }
    }
}

impl Spent {
    fn allows(&mut self, now: Instant) -> Option<u64> {
        let over = |since: Instant| now.duration_since(since) >= SPAN;
        if self.since.is_none_or(over) {
            (self.since, self.lines) = (Some(now), 0);
        }
        if self.lines < LINES {
            self.lines += 1;
            return Some(std::mem::take(&mut self.left_out));
        }
        self.left_out = self.left_out.saturating_add(1);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn the_level_of_the_configuration_holds_from_then_on() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let (subscriber, level) = subscriber(LevelFilter::INFO, File::create(&path).unwrap());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("one");
            set(&level, LogLevel::Error);
            tracing::info!("two");
            tracing::warn!("three");
            tracing::error!("four");
            set(&level, LogLevel::Trace);
            tracing::trace!("five");
        });
        let text = std::fs::read_to_string(path).unwrap();
        let last_words = text.lines().filter_map(|line| line.split(' ').next_back());
        assert_eq!(last_words.collect::<Vec<_>>(), ["one", "four", "five"]);
    }

    #[test]
    fn a_flood_is_ten_lines_in_five_seconds_and_says_what_is_missing() {
        let mut spent = Budget::new().0.into_inner().unwrap();
        let begin = Instant::now();
        let logged = |spent: &mut Spent, at: Duration| -> Vec<u64> {
            let tries = (0..1000).filter_map(|_| spent.allows(begin + at));
            tries.collect()
        };
        assert_eq!(logged(&mut spent, Duration::ZERO), [0; 10]);
        let early = logged(&mut spent, SPAN - Duration::from_millis(1));
        assert!(early.is_empty(), "{early:?}");
        let mut wanted = [0; 10];
        wanted[0] = 1990;
        assert_eq!(logged(&mut spent, SPAN), wanted);
    }

    #[test]
    fn a_line_within_the_budget_is_logged() {
        let budget = Budget::new();
        let mut lines = 0;
        for _ in 0..100 {
            budget.spend(|_| lines += 1);
        }
        assert_eq!(lines, 10);
    }
}
