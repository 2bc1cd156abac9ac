//! The command: its environment, where it is found, and the exec itself.
//!
//! Called by `init` and `exec` in the container's process, with the container's root and user.
//! Errors are in runc's words, which users and tools know: they are Go's for `exec.LookPath`.

use std::convert::Infallible;
use std::ffi::{CString, OsStr};
use std::io::{Read, Take};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::Process;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use super::error::Result;

/// How much of /etc/passwd we read.
const LONGEST_PASSWD: u64 = 1 << 20;

/// A command, ready to run but for its place.
#[derive(Debug)]
pub(super) struct Command {
    arguments: Vec<CString>,
    environment: Vec<(String, String)>,
}

impl Command {
    /// Checks the process's arguments and environment. Of a variable that is given twice, the last
    /// one counts.
    pub(super) fn of(process: &Process, field: &str) -> Result<Self> {
        let no_nul = |text: &str, field: String| {
            CString::new(text).map_err(|_| Failure::bad(field, "holds a NUL byte"))
        };
        let arguments = process.args().iter().flatten().enumerate();
        let arguments = arguments
            .map(|(index, argument)| no_nul(argument, format!("{field}.args[{index}]")))
            .collect::<Result<Vec<_>>>()?;
        let mut environment: Vec<(String, String)> = Vec::new();
        for (index, variable) in process.env().iter().flatten().enumerate() {
            let field = format!("{field}.env[{index}]");
            let (name, value) = variable
                .split_once('=')
                .ok_or_else(|| Failure::bad(&field, format!("{variable:?} has no '='")))?;
            if name.is_empty() {
                return Err(Failure::bad(&field, format!("{variable:?} has no name")));
            }
            no_nul(variable, field)?;
            set(&mut environment, name, value.to_owned());
        }
        Ok(Self {
            arguments,
            environment,
        })
    }

    /// Gives the process a home if it has none: that of its user in the container, or else `/`.
    pub(super) fn set_home(&mut self, uid: u32) {
        let name = "HOME";
        if self.variable(name).is_none_or(str::is_empty) {
            let home = home(Path::new("/etc/passwd"), uid).unwrap_or_else(|| "/".to_owned());
            set(&mut self.environment, name, home);
        }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    /// Finds the command: by its path, or in the PATH of its own environment.
    pub(super) fn find(&self) -> Result<CString> {
        let name = self
            .arguments
            .first()
            .map(|name| name.as_bytes())
            .unwrap_or_default();
        let shown = String::from_utf8_lossy(name);
        if name.contains(&b'/') {
            return match executable(name) {
                Ok(path) => Ok(path),
                Err(reason) => Err(Failure::failed(format!("exec: {shown:?}"), reason)),
            };
        }
        let path = self.variable("PATH").unwrap_or_default();
        for directory in path.split(':').filter(|_| !path.is_empty()) {
            let candidate = Path::new(if directory.is_empty() { "." } else { directory })
                .join(OsStr::from_bytes(name));
            let Ok(found) = executable(candidate.as_os_str().as_bytes()) else {
                continue;
            };
            if candidate.is_absolute() {
                return Ok(found);
            }
            return Err(Failure::failed(
                format!("exec: {shown:?}"),
                "cannot run executable found relative to current directory",
            ));
        }
        Err(Failure::failed(
            format!("exec: {shown:?}"),
            "executable file not found in $PATH",
        ))
    }

    /// Becomes the command.
    pub(super) fn run(&self, path: &CString) -> Result<Infallible> {
        let environment = self
            .environment
            .iter()
            .map(|(name, value)| CString::new(format!("{name}={value}")))
            .collect::<Result<Vec<_>, _>>()
            .step(|| "write the environment")?;
        nix::unistd::execve(path, &self.arguments, &environment)
            .map_err(std::io::Error::from)
            .map_err(|error| {
                let shown = path.to_string_lossy();
                Failure::failed(format!("exec {shown}"), words(&error))
            })
    }
}

/// Sets a variable. One that is there keeps its place.
fn set(environment: &mut Vec<(String, String)>, name: &str, value: String) {
    match environment.iter_mut().find(|(known, _)| known == name) {
        Some((_, old)) => *old = value,
        None => environment.push((name.to_owned(), value)),
    }
}

/// The path, if the caller may run it, or why not.
fn executable(path: &[u8]) -> Result<CString, String> {
    let shown = String::from_utf8_lossy(path).into_owned();
    let path = CString::new(path).map_err(|_| "invalid argument".to_owned())?;
    let status = std::fs::metadata(OsStr::from_bytes(path.as_bytes()))
        .map_err(|error| format!("stat {shown}: {}", words(&error)))?;
    if status.is_dir() {
        return Err("is a directory".to_owned());
    }
    match accessat(CWD, path.as_c_str(), Access::EXEC_OK, AtFlags::EACCESS) {
        Ok(()) => Ok(path),
        // A seccomp profile older than this call hides the answer.
        Err(Errno::NOSYS | Errno::PERM) => {
            if status.mode() & 0o111 != 0 {
                Ok(path)
            } else {
                Err("permission denied".to_owned())
            }
        }
        Err(errno) => Err(words(&errno.into())),
    }
}

/// The error in the words of a Go program: lower case, without its number.
fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => text.to_owned(),
    }
}

/// Finds the home directory in the container's own list of users.
fn home(passwd: &Path, uid: u32) -> Option<String> {
    // The image may have put anything there. We read only a regular file, and not without end.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(passwd)
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    let mut limited: Take<_> = file.take(LONGEST_PASSWD);
    limited.read_to_end(&mut bytes).ok()?;
    String::from_utf8_lossy(&bytes).lines().find_map(|line| {
        let mut fields = line.split(':');
        let user = fields.nth(2)?.parse::<u32>().ok()?;
        let home = fields.nth(2)?;
        (user == uid && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::error::refused;

    fn command(arguments: &str, environment: &str) -> Result<Command> {
        let json = format!(
            r#"{{"cwd": "/", "user": {{"uid": 0, "gid": 0}}, "args": {arguments}, "env": {environment}}}"#
        );
        Command::of(&serde_json::from_str(&json).unwrap(), "process")
    }

    fn failure(arguments: &str, environment: &str) -> String {
        command(arguments, environment)
            .unwrap()
            .find()
            .unwrap_err()
            .one_line()
    }

    #[test]
    fn a_missing_command_is_told_in_runcs_words() {
        let path = r#"["PATH=/nowhere:/proc/self"]"#;
        assert_eq!(
            failure(r#"["no-such"]"#, path),
            r#"exec: "no-such": executable file not found in $PATH"#
        );
        assert_eq!(
            failure(r#"["sh"]"#, "[]"),
            r#"exec: "sh": executable file not found in $PATH"#
        );
        assert_eq!(
            failure(r#"["/no/such"]"#, path),
            r#"exec: "/no/such": stat /no/such: no such file or directory"#
        );
        assert_eq!(
            failure(r#"["/proc"]"#, path),
            r#"exec: "/proc": is a directory"#
        );
        assert_eq!(
            failure(r#"["/proc/self/status"]"#, path),
            r#"exec: "/proc/self/status": permission denied"#
        );
    }

    #[test]
    fn the_command_is_found_in_its_own_path() {
        let command = command(r#"["sh", "-c", "x"]"#, r#"["PATH=/nowhere:/bin"]"#).unwrap();
        assert_eq!(command.find().unwrap().as_c_str(), c"/bin/sh");
    }

    #[test]
    fn the_last_of_a_variable_counts_and_a_home_is_given() {
        let mut command = command(r#"["sh"]"#, r#"["A=1", "B=", "A=2=3"]"#).unwrap();
        assert_eq!(command.variable("A"), Some("2=3"));
        let names: Vec<_> = command.environment.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["A", "B"]);
        command.set_home(0);
        assert_eq!(command.variable("HOME"), Some("/root"));
        command.set_home(12345);
        assert_eq!(command.variable("HOME"), Some("/root"));
    }

    #[test]
    fn nonsense_is_named() {
        for (arguments, environment, field) in [
            (r#"["a\u0000b"]"#, "[]", "process.args[0]"),
            (r#"["a"]"#, r#"["A=1", "B"]"#, "process.env[1]"),
            (r#"["a"]"#, r#"["=1"]"#, "process.env[0]"),
        ] {
            let error = command(arguments, environment).unwrap_err();
            assert_eq!(refused(&error), field);
        }
    }
}
