//! The shim's log: lines on descriptor 2, which is containerd's FIFO or nothing.
//!
//! `main` starts it in the serving process; `pod` sets the level once it has read the
//! configuration. Nobody may be reading, or read slowly: a line that can't be written at once is
//! lost, and nothing else happens.

use std::io::{self, Write};
use std::sync::OnceLock;

use kata_like_config::LogLevel;
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
}
