//! The command line that containerd gives a shim, in the syntax of Go's `flag` package.
//!
//! Called by `main`. `-x v`, `-x=v`, `--x v` and `--x=v` are the same; a switch is `-x` or
//! `-x=true`; flags end at the first argument that is none, which is the action, or at `--`.
//! (Facts: Go, `flag/flag.go`; containerd, `pkg/shim/shim.go`.)

use std::ffi::OsString;
use std::path::PathBuf;

/// What the command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container's id; in the serving process, the sandbox's.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-publish-binary`: containerd's program; unused, events go over ttrpc.
    pub publish_binary: String,
    /// `-bundle`: the container's bundle; empty: the working directory.
    pub bundle: PathBuf,
    /// `-debug`: log more.
    pub debug: bool,
    /// `-v`: print the version.
    pub version: bool,
    /// `-info`: print what the runtime can do.
    pub info: bool,
    /// `start`, `delete`, or empty: serve.
    pub action: String,
}

/// Why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlagsError {
    /// A flag that no containerd uses.
    #[error("read the command line: unknown flag {0:?}")]
    Unknown(String),
    /// A flag without its value.
    #[error("read the command line: flag {0:?} needs a value")]
    NoValue(String),
    /// A switch that is neither true nor false.
    #[error("read the command line: flag {flag:?} is a switch, not {value:?}")]
    NotASwitch {
        flag: String,
        /// What it was set to.
        value: String,
    },
    /// Bytes that are no text.
    #[error("read the command line: {0:?} is not UTF-8")]
    NotText(OsString),
}

impl Flags {
    /// Reads the arguments that follow the program's name.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, FlagsError> {
        let mut flags = Self::default();
        let mut rest = arguments.into_iter().map(text);
        while let Some(argument) = rest.next().transpose()? {
            let name = match argument.strip_prefix('-') {
                None | Some("") => {
                    flags.action = argument;
                    break;
                }
                Some("-") => {
                    flags.action = rest.next().transpose()?.unwrap_or_default();
                    break;
                }
                Some(name) => name.strip_prefix('-').unwrap_or(name),
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            match name {
                "debug" => flags.debug = switch(name, value)?,
                "v" => flags.version = switch(name, value)?,
                "info" => flags.info = switch(name, value)?,
                _ => {
                    let value = match value {
                        Some(value) => value,
                        None => rest
                            .next()
                            .transpose()?
                            .ok_or_else(|| FlagsError::NoValue(name.to_owned()))?,
                    };
                    match name {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "publish-binary" => flags.publish_binary = value,
                        "bundle" => flags.bundle = value.into(),
                        // Sockets are chosen by `start` and handed to the serving process open.
                        "socket" | "debug-socket" => {}
                        _ => return Err(FlagsError::Unknown(name.to_owned())),
                    }
                }
            }
        }
        Ok(flags)
    }
}

fn text(argument: OsString) -> Result<String, FlagsError> {
    argument.into_string().map_err(FlagsError::NotText)
}

fn switch(flag: &str, value: Option<String>) -> Result<bool, FlagsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(FlagsError::NotASwitch {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagsError> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerd_s_start_line_is_read() {
        let flags =
            parse("-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id a start")
                .expect("a line as containerd writes it");
        assert_eq!(flags.namespace, "k8s.io");
        assert_eq!(flags.address, "/run/c.sock");
        assert_eq!(flags.id, "a");
        assert_eq!(flags.action, "start");
        assert!(!flags.debug);
    }

    #[test]
    fn every_spelling_of_a_flag_is_the_same() {
        let plain = parse("-id a -debug delete").expect("plain");
        assert_eq!(parse("--id=a --debug=true delete"), Ok(plain.clone()));
        assert_eq!(parse("-id=a -debug -- delete"), Ok(plain));
    }

    #[test]
    fn a_switch_takes_no_following_value() {
        let flags = parse("-debug start -id a").expect("an action ends the flags");
        assert!(flags.debug);
        assert_eq!(flags.action, "start");
        assert_eq!(flags.id, "");
    }

    #[test]
    fn wrong_lines_are_refused_by_name() {
        assert_eq!(parse("-idd a"), Err(FlagsError::Unknown("idd".into())));
        assert_eq!(parse("-id"), Err(FlagsError::NoValue("id".into())));
        assert!(matches!(
            parse("-debug=x"),
            Err(FlagsError::NotASwitch { .. })
        ));
    }
}
