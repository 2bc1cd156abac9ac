//! `kata-like-fsd`: the pod's virtio-fs server. It sees the pod's share and nothing else.
//!
//! The shim starts it alone in new namespaces, with the control socket as descriptor 3. In order:
//! the boot request (`kata_like_boot::FsdBoot`); the share as the only file system (`root`); few
//! capabilities and no_new_privs (`jail`); then the virtiofsd library behind a check of every name
//! (`serve`, `names`), its threads behind lists of system calls (`filters`). If a step fails the
//! server reports that step and serves nothing. It ends when the VMM has closed its connections, or
//! the shim its end of the control socket.

mod backend;
mod closing;
mod filters;
mod jail;
mod last_words;
mod locks;
mod names;
mod root;
mod serve;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::process;

use kata_like_boot::{CONTROL_FD, Channel, ChannelError, FsdBoot, FsdReport};
use kata_like_failure::one_line;
use kata_like_jail::JailError;
use kata_like_linux::fd::inherited;
use rustix::fs::FileType;

use filters::{Filters, Kind};
use serve::Request;

/// The step that failed; the source is the cause.
#[derive(Debug, thiserror::Error)]
enum FsdError {
    #[error("process {0} of its pid namespace: the shim starts it as process 1 of its own")]
    NotAlone(u32),
    #[error("take the fs server's boot request")]
    Boot(#[source] ChannelError),
    #[error("prepare to report what goes wrong")]
    LastWords(#[source] io::Error),
    #[error("make the pod's share the fs server's root")]
    Root(#[source] JailError),
    #[error("jail the fs server")]
    Jail(#[source] jail::JailStepError),
    #[error(transparent)]
    Filter(JailError),
    #[error("serve the pod's share")]
    Serve(#[source] serve::ServeError),
    #[error("report to the shim")]
    Report(#[source] ChannelError),
}

fn main() {
    let Some(control) = take_control_socket() else {
        eprintln!(
            "kata-like-fsd: no control socket as descriptor {CONTROL_FD}: it is started by the shim"
        );
        process::exit(2);
    };
    let ended = run(&control);
    last_words::silence();
    // Not by returning: what that would close and free, this thread's filter does not let it.
    process::exit(match ended {
        Ok(()) => 0,
        Err(error) => {
            let why = one_line(&error);
            eprintln!("kata-like-fsd: {why}");
            // Nobody may be listening any more; the exit status says the same.
            let _ = control.send(&FsdReport::Failed { why }, &[]);
            1
        }
    })
}

fn run(control: &Channel) -> Result<(), FsdError> {
    // Who can name other processes can have the kernel send them signals (F_SETOWN of fcntl(2)).
    match process::id() {
        1 => {}
        other => return Err(FsdError::NotAlone(other)),
    }
    let (boot, fds) = FsdBoot::receive(control).map_err(FsdError::Boot)?;
    jail::limit_memory(boot.memory_bytes).map_err(FsdError::Jail)?;
    let wanted = boot.files.saturating_add(serve::RESERVED);
    let files = jail::limit_files(wanted).map_err(FsdError::Jail)?;
    let keep: Vec<_> = std::iter::once(control.as_fd())
        .chain(std::iter::once(fds.tree.as_fd()))
        .chain(fds.sockets.iter().map(AsFd::as_fd))
        .map(|fd| fd.as_raw_fd())
        .collect();
    jail::close_others(&keep).map_err(FsdError::Jail)?;
    last_words::install(control).map_err(FsdError::LastWords)?;
    let proc_self_fd = root::enter(fds.tree).map_err(FsdError::Root)?;
    jail::drop_privileges().map_err(FsdError::Jail)?;
    let filters = Filters::new().map_err(FsdError::Filter)?;
    let request = Request {
        shares: &boot.shares,
        sockets: fds.sockets,
        files,
        proc_self_fd,
    };
    let serving = serve::start(request, control, &filters).map_err(FsdError::Serve)?;
    filters.close(Kind::Waiter).map_err(FsdError::Filter)?;
    control
        .send(&FsdReport::Serving, &[])
        .map_err(FsdError::Report)?;
    serving.run().map_err(FsdError::Serve)
}

/// Descriptor [`CONTROL_FD`], if it is a socket.
fn take_control_socket() -> Option<Channel> {
    let control = inherited(CONTROL_FD).ok()?;
    let kind = rustix::fs::fstat(&control).ok()?.st_mode;
    let is_socket = FileType::from_raw_mode(kind) == FileType::Socket;
    is_socket.then(|| Channel::from_fd(control))
}
