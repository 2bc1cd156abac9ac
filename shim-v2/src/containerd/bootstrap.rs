//! Answers `start` in containerd's dialects, and gives birth to the process that serves.
//!
//! Called by `main`, before any thread exists. On success `start` prints the answer and nothing
//! else, for containerd reads its stdout and stderr as one; the serving process holds neither. On
//! failure nothing is left: no socket, cgroup or process.
//!
//! The dialect: up to 2.2 containerd sends an `Any` with the runtime's options, or nothing, and
//! takes a plain address, which means task v2 to it; 1.6 and 1.7 know no other answer that suits.
//! From 2.3 on it sends `BootstrapParams` and gets a `BootstrapResult` with version 3. An `Any`
//! also decodes as `BootstrapParams`: it is taken for one only if it repeats what the flags say.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use kata_like_config::state::{NetworkLock, StateError};
use protobuf::Message;
use rustix::thread::UnshareFlags;

use crate::bundle::{self, BundleError, Membership, Role};
use crate::cgroup;
use crate::containerd::flags::Flags;
use crate::containerd::socket::{self, Bound, SocketError};
use crate::network::claim::{self, Place};
use crate::spawn::{self, Birth, BirthError, Network};
use kata_like_failure::Failure;

/// The most that is read of what containerd sends.
const MAX_STDIN: u64 = 10 << 20;
/// The version of the task API that `BootstrapResult` announces.
const TASK_VERSION: i32 = 3;

/// Why `start` failed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A flag is missing.
    #[error("start a shim: flag -{0} is missing")]
    Missing(&'static str),
    /// containerd's message can't be read.
    #[error("read containerd's request from stdin")]
    Stdin(#[source] io::Error),
    /// containerd's message is too long.
    #[error("read containerd's request from stdin: more than {MAX_STDIN} bytes")]
    StdinTooLong,
    /// The working directory is not there.
    #[error("find the bundle, the working directory")]
    Bundle(#[source] io::Error),
    /// The bundle's files.
    #[error(transparent)]
    Files(#[from] BundleError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A container of a pod that does not run.
    #[error("start container {id}: its pod's sandbox {group} is not running")]
    NoSandbox { id: String, group: String },
    /// Whose the network namespace is can't be found out.
    #[error("find whose the network namespace of {id} is")]
    Network {
        id: String,
        #[source]
        source: StateError,
    },
    #[error("start the shim of {id}")]
    Cgroup {
        id: String,
        #[source]
        source: Failure,
    },
    /// The serving process.
    #[error("start the shim of {id}")]
    Birth {
        id: String,
        #[source]
        source: BirthError,
    },
    #[error("answer containerd")]
    Answer(#[source] io::Error),
}

/// How containerd wants its answer.
#[derive(Clone, Debug, PartialEq)]
enum Dialect {
    /// The address as it is.
    Plain,
    /// 2.3 and later.
    Bootstrap(Box<BootstrapParams>),
}

impl Dialect {
    fn of(stdin: &[u8], flags: &Flags) -> Self {
        match BootstrapParams::parse_from_bytes(stdin) {
            Ok(params)
                if !flags.id.is_empty()
                    && params.instance_id == flags.id
                    && params.namespace == flags.namespace =>
            {
                Self::Bootstrap(Box::new(params))
            }
            _ => Self::Plain,
        }
    }

    fn answer(&self, address: &str) -> Vec<u8> {
        let Self::Bootstrap(_) = self else {
            return address.as_bytes().to_vec();
        };
        let result = BootstrapResult {
            version: TASK_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        // Writing to a Vec fails for a message of 2 GiB or more only.
        result.write_to_bytes().unwrap_or_default()
    }

    fn socket_directory(&self) -> &Path {
        let named = match self {
            Self::Bootstrap(params) => params.socket_dir.as_deref().unwrap_or_default(),
            Self::Plain => "",
        };
        Path::new(if named.is_empty() {
            socket::DIRECTORY
        } else {
            named
        })
    }

    /// Where the events go, if containerd says so here.
    fn events_address(&self) -> Option<&str> {
        match self {
            Self::Bootstrap(params) => {
                Some(params.containerd_ttrpc_address.as_str()).filter(|address| !address.is_empty())
            }
            Self::Plain => None,
        }
    }
}

/// The whole of `start`.
pub fn start(flags: &Flags) -> Result<(), StartError> {
    for (name, value) in [("namespace", &flags.namespace), ("id", &flags.id)] {
        if value.is_empty() {
            return Err(StartError::Missing(name));
        }
    }
    let bundle = match flags.bundle.as_os_str().is_empty() {
        true => std::env::current_dir().map_err(StartError::Bundle)?,
        false => flags.bundle.clone(),
    };
    let dialect = Dialect::of(&read_stdin()?, flags);
    let member = Membership::read(&bundle, &flags.id)?;
    let path_of = |group: &str| {
        let directory = dialect.socket_directory();
        socket::path(directory, &flags.address, &flags.namespace, group)
    };
    let mut path = path_of(&member.group)?;
    let mut network = None;
    if member.role == Role::Alone
        && member.group == flags.id
        && let Some(given) = &member.network
    {
        let serving = |sandbox: &str| path_of(sandbox).ok().filter(|it| socket::is_served(it));
        let place = claim::find(&flags.namespace, &flags.id, given, serving);
        match place.map_err(|source| StartError::Network {
            id: flags.id.clone(),
            source,
        })? {
            Place::Pod(socket) => path = socket,
            Place::Own(lock) => network = Some(lock),
            Place::Unknown => {}
        }
    }
    let address = socket::address(&path);
    if !join(flags, &member, &path)? {
        serve_new(flags, &bundle, &path, network, dialect.events_address())?;
    }
    bundle::write_address(&bundle, &address)?;
    let mut out = io::stdout().lock();
    out.write_all(&dialect.answer(&address))
        .and_then(|()| out.flush())
        .map_err(StartError::Answer)
}

/// Whether the container goes into a pod whose shim serves already.
fn join(flags: &Flags, member: &Membership, path: &Path) -> Result<bool, StartError> {
    if socket::is_served(path) {
        return Ok(true);
    }
    if member.role == Role::CriContainer && member.group != flags.id {
        return Err(StartError::NoSandbox {
            id: flags.id.clone(),
            group: member.group.clone(),
        });
    }
    Ok(false)
}

/// Makes the pod's socket and cgroup, and the process that serves there, which gets the pod's
/// network namespace if that is known already.
fn serve_new(
    flags: &Flags,
    bundle: &Path,
    path: &Path,
    network: Option<NetworkLock>,
    events: Option<&str>,
) -> Result<(), StartError> {
    // Another `start` may have been faster.
    let Bound::New(listener) = socket::bind(path)? else {
        return Ok(());
    };
    let served = || {
        let leaf = cgroup::make_leaf(&flags.namespace, &flags.id, bundle).map_err(|source| {
            StartError::Cgroup {
                id: flags.id.clone(),
                source,
            }
        })?;
        let handed = [Some(listener.as_fd()), network.as_ref().map(AsFd::as_fd)];
        give_birth(flags, bundle, handed, leaf.as_fd(), events).map_err(|source| {
            cgroup::remove_leaf(&flags.namespace, &flags.id, bundle);
            StartError::Birth {
                id: flags.id.clone(),
                source,
            }
        })
    };
    served().inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })?;
    if let Some(network) = network {
        network.hand_over();
    }
    Ok(())
}

/// `handed`: descriptors 3 and 4.
fn give_birth(
    flags: &Flags,
    bundle: &Path,
    handed: [Option<BorrowedFd>; 2],
    leaf: BorrowedFd,
    events: Option<&str>,
) -> Result<(), BirthError> {
    let log = open_log(bundle);
    let mut arguments = vec![
        env!("CARGO_PKG_NAME"),
        "-namespace",
        &flags.namespace,
        "-id",
        &flags.id,
        "-address",
        &flags.address,
    ];
    if flags.debug {
        arguments.push("-debug");
    }
    let mut environment: Vec<String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| events.is_none() || name != "TTRPC_ADDRESS")
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    environment.extend(events.map(|address| format!("TTRPC_ADDRESS={address}")));
    let newborn = spawn::birth(&Birth {
        program: &own_program(),
        arguments: &arguments,
        environment: &environment,
        directory: bundle,
        cgroup: Some(leaf),
        network: Network::Inherited,
        namespaces: UnshareFlags::empty(),
        mounts: None,
        label: None,
        oom_score: None,
        descriptors: &[&[None, None, log.as_ref().map(AsFd::as_fd)], &handed[..]].concat(),
    })?;
    raise_oom_score(newborn.pid);
    Ok(())
}

/// This program. The link works even where the file has been replaced, but gives a process the name
/// `exe`.
fn own_program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .filter(|program| program.exists())
        .unwrap_or_else(|| "/proc/self/exe".into())
}

/// The FIFO that containerd copies to its own log. Never waited for: without a reader there is no
/// log.
fn open_log(bundle: &Path) -> Option<OwnedFd> {
    std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .ok()
        .map(OwnedFd::from)
}

/// containerd is to outlive its shims when memory runs out. Best effort, as with runc's shim.
fn raise_oom_score(pid: u32) {
    let parent = std::os::unix::process::parent_id();
    let read = std::fs::read_to_string(format!("/proc/{parent}/oom_score_adj"));
    if let Some(score) = read.ok().and_then(|text| text.trim().parse::<i32>().ok()) {
        let raised = score.saturating_add(1).min(1000);
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), raised.to_string());
    }
}

/// All that containerd sends; nothing where a person has typed the command.
pub fn read_stdin() -> Result<Vec<u8>, StartError> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    let mut request = Vec::new();
    stdin
        .lock()
        .take(MAX_STDIN + 1)
        .read_to_end(&mut request)
        .map_err(StartError::Stdin)?;
    if request.len() as u64 > MAX_STDIN {
        return Err(StartError::StdinTooLong);
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::well_known_types::any::Any;

    fn flags() -> Flags {
        Flags {
            namespace: "k8s.io".into(),
            id: "pod".into(),
            ..Flags::default()
        }
    }

    /// BootstrapParams as containerd 2.3 writes them: instance_id, namespace, log_level -4,
    /// containerd_version, ttrpc address, grpc address, binary, one extension, socket_dir.
    const PARAMS: &[u8] = b"\x0a\x03pod\x12\x06k8s.io\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\
        \x22\x06v2.3.4\x2a\x09/r/t.sock\x32\x07/r/sock\x3a\x06/bin/c\x42\x07\x0a\x05\x0a\x03a.B\
        \x4a\x04/r/s";

    #[test]
    fn nothing_and_options_get_the_plain_address() {
        let mut options = Any::new();
        options.type_url = "runtimeoptions.v1.Options".into();
        options.value = b"\x12\x03k8s".to_vec();
        let options = options.write_to_bytes().expect("a small message");
        for stdin in [&b""[..], &options, b"\xff\xff", b"garbage"] {
            let dialect = Dialect::of(stdin, &flags());
            assert_eq!(dialect, Dialect::Plain);
            assert_eq!(dialect.answer("unix:///a"), b"unix:///a");
            assert_eq!(dialect.socket_directory(), Path::new(socket::DIRECTORY));
        }
    }

    #[test]
    fn an_any_that_looks_like_params_is_none() {
        // type_url and value land in instance_id and namespace.
        let any = b"\x0a\x03pod\x12\x07default";
        assert_eq!(Dialect::of(any, &flags()), Dialect::Plain);
    }

    #[test]
    fn params_get_a_result_with_version_3() {
        let dialect = Dialect::of(PARAMS, &flags());
        assert_eq!(
            dialect.answer("unix:///a"),
            b"\x08\x03\x12\x09unix:///a\x1a\x05ttrpc"
        );
        assert_eq!(dialect.socket_directory(), Path::new("/r/s"));
        assert_eq!(dialect.events_address(), Some("/r/t.sock"));
    }

    #[test]
    fn a_container_of_a_pod_that_does_not_run_is_refused() {
        let member = Membership {
            group: "pod".into(),
            role: Role::CriContainer,
            network: None,
        };
        let mut flags = flags();
        flags.id = "container".into();
        let error = join(&flags, &member, Path::new("/nowhere/socket")).expect_err("no shim");
        assert_eq!(
            error.to_string(),
            "start container container: its pod's sandbox pod is not running"
        );
    }

    #[test]
    fn a_first_container_is_to_be_served_anew() {
        let member = Membership {
            group: "pod".into(),
            role: Role::CriSandbox,
            network: None,
        };
        assert!(!join(&flags(), &member, Path::new("/nowhere/socket")).expect("no error"));
    }
}
