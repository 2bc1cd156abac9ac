//! The shim's log: lines on descriptor 2, which is containerd's FIFO or nothing.
//!
//! Called by `main` in the serving process. Nobody may be reading, or read slowly: a line that
//! can't be written at once is lost, and nothing else happens.

use std::io::{self, Write};

use tracing::Level;
use tracing_subscriber::fmt::MakeWriter;

/// Starts the log.
pub fn start(debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(Lines)
        .finish();
    // Only fails where a log is running already.
    let _ = tracing::subscriber::set_global_default(subscriber);
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
