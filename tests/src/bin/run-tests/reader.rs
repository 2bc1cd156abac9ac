//! Makes runs of what a host prints: `inside::run` says how each begins and ends.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use crate::count::Count;
use crate::hosts::{Outcome, Run, lock};
use crate::libtest::Progress;
use crate::logs;

/// The test binary that a host runs just now.
struct Running {
    name: String,
    begun: Instant,
    progress: Progress,
    not_run: Vec<String>,
}

/// Listens to one host.
pub struct Reader<'a> {
    number: u64,
    work: &'a Path,
    outcome: &'a Mutex<Outcome>,
    text: String,
    running: Option<Running>,
}

impl<'a> Reader<'a> {
    pub fn new(number: u64, work: &'a Path, outcome: &'a Mutex<Outcome>) -> Self {
        Self {
            number,
            work,
            outcome,
            text: String::new(),
            running: None,
        }
    }

    /// Takes one line.
    pub fn take(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
        if let Some(running) = &mut self.running {
            running.progress.take(line);
            let missing = line.strip_prefix("not run: ");
            running.not_run.extend(
                missing
                    .and_then(|rest| rest.strip_prefix(&*running.name)?.strip_prefix("::"))
                    .map(str::to_owned),
            );
        }
        let Some((name, what)) = line
            .strip_prefix("== ")
            .and_then(|rest| rest.split_once(": "))
        else {
            return;
        };
        if what == "begun" {
            println!("host {}: {name}", self.number);
            self.running = Some(Running {
                name: name.to_owned(),
                begun: Instant::now(),
                progress: Progress::default(),
                not_run: Vec::new(),
            });
        } else if what.starts_with("a second time") {
            let line = format!("{name}: {what}");
            lock(self.outcome).again.push(line);
        } else if let Some((passed, failed)) = numbers(what)
            && let Some(running) = self.running.take_if(|running| running.name == name)
        {
            let count = Count {
                passed,
                failed,
                not_run: running.not_run,
            };
            if !count.all_passed() {
                self.keep_output(&running.name);
            }
            lock(self.outcome).runs.push(Run {
                name: running.name,
                begun: running.begun,
                ended: Instant::now(),
                count,
            });
            self.flush();
        }
    }

    /// The host says nothing more: what it was at is cut off.
    pub fn host_is_gone(&mut self) {
        if let Some(running) = self.running.take() {
            self.keep_output(&running.name);
            lock(self.outcome)
                .cut_off
                .insert(running.name, running.progress);
        }
        self.flush();
    }

    /// What the tests of a binary printed is among its logs.
    fn keep_output(&self, name: &str) {
        let folder = logs::folder(self.work, name);
        let kept =
            fs::create_dir_all(&folder).and_then(|()| fs::write(folder.join("output"), &self.text));
        if let Err(error) = kept {
            println!("keep the output of {name}: {error}");
        }
    }

    fn flush(&mut self) {
        print!("{}", std::mem::take(&mut self.text));
    }
}

/// Of `3 passed, 0 failed, 2 not run`.
fn numbers(what: &str) -> Option<(u64, u64)> {
    let (passed, rest) = what.split_once(" passed, ")?;
    let (failed, rest) = rest.split_once(" failed, ")?;
    rest.strip_suffix(" not run")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}
