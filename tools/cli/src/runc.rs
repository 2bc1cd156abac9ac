//! Calls that were meant for runc.
//!
//! `nerdctl run --runtime kata-like` takes any name without `io.containerd.` for a binary that
//! behaves like runc, and containerd's runc shim then calls it: `kata-like --root … --log FILE
//! --log-format json create --bundle … ID`. The answer goes to standard error and to the log file,
//! where that shim looks for the reason.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

/// runc's verbs (runc 1.2, `main.go`).
const VERBS: [&str; 17] = [
    "checkpoint",
    "create",
    "delete",
    "events",
    "exec",
    "features",
    "kill",
    "list",
    "pause",
    "ps",
    "restore",
    "resume",
    "run",
    "spec",
    "start",
    "state",
    "update",
];

/// runc's options before the verb; `true`: a value follows.
const OPTIONS: [(&str, bool); 7] = [
    ("--root", true),
    ("--log", true),
    ("--log-format", true),
    ("--rootless", true),
    ("--criu", true),
    ("--systemd-cgroup", false),
    ("--debug", false),
];

/// A command line in runc's manner.
#[derive(Debug, PartialEq, Eq)]
pub struct Call {
    verb: String,
    log: Option<PathBuf>,
}

impl Call {
    /// Looks at the program's arguments. `None`: they are for us.
    pub fn recognise(arguments: &[OsString]) -> Option<Self> {
        let mut rest = arguments.iter().skip(1);
        let mut log = None;
        while let Some(argument) = rest.next() {
            let text = argument.to_str()?;
            if VERBS.contains(&text) {
                return Some(Self {
                    verb: text.into(),
                    log,
                });
            }
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value.into())),
                None => (text, None),
            };
            let (_, takes_value) = OPTIONS.iter().find(|(option, _)| *option == name)?;
            let value: Option<OsString> = match value {
                None if *takes_value => Some(rest.next()?.clone()),
                value => value,
            };
            if name == "--log" {
                log = value.map(PathBuf::from);
            }
        }
        None
    }

    /// One line, which also goes to the log that containerd's runc shim reads.
    pub fn answer(&self) -> String {
        let line = format!(
            "kata-like {}: kata-like is no OCI runtime binary but a containerd runtime; use --runtime io.containerd.kata-like.v2",
            self.verb
        );
        if let Some(log) = &self.log {
            let entry = serde_json::json!({ "level": "error", "msg": line });
            // The line on standard error counts; it does not matter if the log can't be written.
            let _ = OpenOptions::new()
                .append(true)
                .create(true)
                .open(log)
                .and_then(|mut file| writeln!(file, "{entry}"));
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognise(line: &str) -> Option<Call> {
        let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        Call::recognise(&arguments)
    }

    #[test]
    fn the_call_of_a_mistaken_runtime_flag_is_answered_with_the_right_one() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log.json");
        let line = format!(
            "kata-like --root /run/x --log {} --log-format json create --bundle /b id",
            log.display()
        );
        let call = recognise(&line).unwrap();
        assert!(
            call.answer()
                .contains("--runtime io.containerd.kata-like.v2")
        );
        let entry: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(log).unwrap()).unwrap();
        assert_eq!(entry["msg"], call.answer());
    }

    #[test]
    fn calls_for_runc_and_calls_for_us_are_told_apart() {
        for (line, verb) in [
            ("kata-like create id", Some("create")),
            (
                "kata-like --log=/dev/null --systemd-cgroup state id",
                Some("state"),
            ),
            ("kata-like --root", None),
            ("kata-like check", None),
            ("kata-like --version", None),
            ("kata-like --help", None),
            ("kata-like", None),
        ] {
            assert_eq!(
                recognise(line).map(|call| call.verb).as_deref(),
                verb,
                "{line}"
            );
        }
    }
}
