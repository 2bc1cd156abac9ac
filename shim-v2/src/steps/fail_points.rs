//! Points at which a test makes the shim fail, stand still or die.
//!
//! Only a build with the cargo feature `fail-points` has them: what is shipped can't be asked.
//! Root asks by the file `inject` in [`DIRECTORY`], which holds a kind and the name of a point. The
//! names of all points that a shim reaches are appended to `reached`.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

/// Where the test says what is to happen. Without it, nothing does.
const DIRECTORY: &str = "/run/kata-like-fail-points";

/// The longest sleep, for a test that has died.
const LONGEST: Duration = Duration::from_secs(60);

/// How often each point was reached in this process: the second time it has another name.
static TIMES: Mutex<Option<HashMap<String, usize>>> = Mutex::new(None);

/// The shim is before or after a step. Fails if `inject` says `error`, waits until that file is
/// gone if it says `sleep`, and kills this process if it says `abort`.
pub async fn point(moment: &str, step: impl Display + Send) -> Result<(), Failure> {
    let directory = Path::new(DIRECTORY);
    if !directory.is_dir() {
        return Ok(());
    }
    let point = numbered(format!("{moment} {step}"));
    note(directory, &point)?;
    let inject = directory.join("inject");
    let asked = || fs::read_to_string(&inject).unwrap_or_default();
    let text = asked();
    let Some((kind, place)) = text.split_once(' ') else {
        return Ok(());
    };
    if place != point {
        return Ok(());
    }
    match kind {
        "error" => Err(Failure::new(Kind::Failed, format!("fail point {point:?}"))),
        "sleep" => {
            let begun = Instant::now();
            while asked() == text && begun.elapsed() < LONGEST {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok(())
        }
        "abort" => {
            let this = rustix::process::getpid();
            rustix::process::kill_process(this, rustix::process::Signal::KILL)
                .map_err(|errno| Failure::failed("kill this process", errno))
        }
        kind => Err(Failure::new(
            Kind::BadRequest,
            format!("fail point {point:?}: no kind {kind:?}"),
        )),
    }
}

fn numbered(point: String) -> String {
    let mut times = lock(&TIMES);
    let times = times.get_or_insert_with(HashMap::new);
    let time = times.entry(point.clone()).or_default();
    *time += 1;
    match time {
        1 => point,
        more => format!("{point} {more}"),
    }
}

fn note(directory: &Path, point: &str) -> Result<(), Failure> {
    let path = directory.join("reached");
    File::options()
        .append(true)
        .create(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{point}"))
        .map_err(|cause| Failure::failed(format!("write {}", path.display()), cause))
}
