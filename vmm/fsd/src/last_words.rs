//! Tells the shim what goes wrong while the server serves: a panic, or why the library gave up.
//!
//! Called by `main`: [`install`] first, [`silence`] when the server ends by itself. If the library
//! can't answer a request it logs that and calls `exit` on the spot, in any of its threads. Its
//! last line then goes to the shim as the reason.
//!
//! What must hold: a guest can't fill the host's log ([`MAX_LINES`]). A worker that panics ends the
//! process, since otherwise the guest's requests would never be answered.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use kata_like_boot::{Channel, FsdReport};
use kata_like_linux::lock;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The most lines that the library may log: the guest causes them.
const MAX_LINES: usize = 100;

/// The longest line, in characters.
const MAX_LINE: usize = 300;

const PANICKED: i32 = 101;

struct LastWords {
    control: Channel,
    error: Mutex<Option<String>>,
    lines: AtomicUsize,
    silent: AtomicBool,
}

static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// From now on reports panics and the library's errors. Needs system calls that the jail forbids.
pub fn install(control: &Channel) -> io::Result<()> {
    let control = rustix::io::fcntl_dupfd_cloexec(control, 0)?;
    let words = LAST_WORDS.get_or_init(|| LastWords {
        control: Channel::from_fd(control),
        error: Mutex::new(None),
        lines: AtomicUsize::new(0),
        silent: AtomicBool::new(false),
    });
    log::set_logger(words).map_err(io::Error::other)?;
    log::set_max_level(LevelFilter::Error);
    // SAFETY: `say` is a function that lives as long as the program. It takes and returns nothing
    // and doesn't unwind: it allocates, locks without panicking, and sends a message.
    if unsafe { libc::atexit(say) } != 0 {
        return Err(io::Error::other("no room for a function to run at the end"));
    }
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        words.remember(format!("a worker panicked: {panic}"));
        std::process::exit(PANICKED);
    }));
    Ok(())
}

/// The process ends by itself and has said why, if there was a reason.
pub fn silence() {
    if let Some(words) = LAST_WORDS.get() {
        words.silent.store(true, Ordering::Relaxed);
    }
}

/// `exit` calls it.
extern "C" fn say() {
    let Some(words) = LAST_WORDS.get() else {
        return;
    };
    if words.silent.load(Ordering::Relaxed) {
        return;
    }
    let error = lock(&words.error);
    if let Some(why) = error.clone() {
        // If the shim is gone nobody needs to know.
        let _ = words.control.send(&FsdReport::Failed { why }, &[]);
    }
}

impl LastWords {
    fn remember(&self, line: String) -> String {
        let line: String = line
            .chars()
            .map(|char| if char.is_control() { ' ' } else { char })
            .take(MAX_LINE)
            .collect();
        let mut error = lock(&self.error);
        *error = Some(line.clone());
        line
    }
}

impl Log for LastWords {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= Level::Error
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.remember(record.args().to_string());
        if self.lines.fetch_add(1, Ordering::Relaxed) < MAX_LINES {
            eprintln!("kata-like-fsd: {line}");
        }
    }

    fn flush(&self) {}
}
