//! The virtiofsd library, set up for our shares and served over vhost-user.
//!
//! Called by `main` when the jail is closed. Each share has its own server object (inode table,
//! cache policy, descriptor budget), queues (`backend`) and worker thread, and serves one
//! connection: the VMM's. Deliberately absent: a thread pool (a request that blocks delays only its
//! own share, and a pool makes small requests a third slower), migration, the virtio configuration
//! (the VMM has it).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use kata_like_boot::{CachePolicy, Channel, FsdShare};
use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, PassthroughFs};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, LockServer, TIMER};
use crate::locks::{Locks, MAX_OWNERS};
use crate::names::{Checked, Others, check_name};

/// Descriptors that do not belong to the guest: sockets, eventfds, guest memory, those of a
/// request.
const OWN_FILES: u64 = 256;

/// Descriptors of the guest that the library does not count.
const LOCK_FILES: u64 = MAX_OWNERS as u64;

/// How long the guest may keep names and attributes that only an administrator changes.
const KEEP: Duration = Duration::from_secs(60);

/// How long the guest may keep what the host may change: it must see a change within a second.
const KEEP_SHARED: Duration = Duration::from_millis(500);

/// Why a share is not served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The request names something that is no directory at the share's top.
    #[error("open the share's directory {directory:?}")]
    Directory {
        directory: String,
        #[source]
        source: io::Error,
    },
    /// Fewer descriptors than the server itself needs.
    #[error("share {files} open files among {shares} file servers: too few")]
    TooFewFiles { files: u64, shares: usize },
    /// The library's server object failed.
    #[error("make the file server of {directory:?}")]
    FileSystem {
        directory: String,
        #[source]
        source: io::Error,
    },
    /// The library's vhost-user part failed; it has error types of its own.
    #[error("make the vhost-user server of {directory:?}: {why}")]
    Daemon { directory: String, why: String },
    /// A thread could not be started.
    #[error("start a thread")]
    Thread(#[source] io::Error),
    /// The connection to the VMM failed.
    #[error("serve the VMM's requests to {directory:?}: {why}")]
    Connection { directory: String, why: String },
}

type Server = VhostUserDaemon<Arc<Backend>>;

/// A share that waits for the VMM's connection.
pub struct Share {
    directory: String,
    server: Server,
    socket: UnixListener,
}

/// Makes a server for each share. `sockets` are listening already; `files` is the process's limit.
pub fn prepare(
    shares: &[FsdShare],
    sockets: Vec<OwnedFd>,
    proc_self_fd: &File,
    files: u64,
) -> Result<Vec<Share>, ServeError> {
    let count = shares.len();
    let budget = files
        .checked_sub(OWN_FILES + LOCK_FILES)
        .and_then(|guest| guest.checked_div(count as u64))
        .filter(|budget| *budget >= OWN_FILES)
        .ok_or(ServeError::TooFewFiles {
            files,
            shares: count,
        })?;
    shares
        .iter()
        .zip(sockets)
        .map(|(share, socket)| prepare_one(share, socket, proc_self_fd, budget))
        .collect()
}

fn prepare_one(
    share: &FsdShare,
    socket: OwnedFd,
    proc_self_fd: &File,
    budget: u64,
) -> Result<Share, ServeError> {
    let directory = share.directory.clone();
    let root_dir = check_directory(&directory).map_err(|source| ServeError::Directory {
        directory: directory.clone(),
        source,
    })?;
    let failed = |source| ServeError::FileSystem {
        directory: directory.clone(),
        source,
    };
    let keep = match share.cache {
        CachePolicy::Private => KEEP,
        CachePolicy::Shared => KEEP_SHARED,
    };
    let config = passthrough::Config {
        root_dir,
        entry_timeout: keep,
        attr_timeout: keep,
        cache_policy: match share.cache {
            CachePolicy::Private => passthrough::CachePolicy::Always,
            CachePolicy::Shared => passthrough::CachePolicy::Auto,
        },
        xattr: true,
        xattrmap: Some(trusted_attributes(&directory)?),
        announce_submounts: true,
        // Without it the guest asks for security.capability before each write.
        killpriv_v2: true,
        readdirplus: true,
        proc_sfd_rawfd: Some(proc_self_fd.try_clone().map_err(failed)?),
        guest_fd_limit: budget,
        ..passthrough::Config::default()
    };
    let file_system = Arc::new(PassthroughFs::new(config).map_err(failed)?);
    let (others, lock_server) = match share.cache {
        CachePolicy::Private => (
            Others::Nobody {
                missing_names: KEEP,
            },
            None,
        ),
        CachePolicy::Shared => {
            let locks = Arc::new(Locks::new(proc_self_fd.try_clone().map_err(failed)?));
            let server = LockServer::new(file_system.clone(), locks.clone()).map_err(failed)?;
            (Others::Somebody { locks }, Some(server))
        }
    };
    let backend = Arc::new(Backend::new(Checked::new(file_system, others), lock_server));
    let server = VhostUserDaemon::new(
        format!("fs {directory}"),
        backend.clone(),
        GuestMemoryAtomic::new(GuestMemoryMmap::new()),
    )
    .map_err(|error| ServeError::Daemon {
        directory: directory.clone(),
        why: error.to_string(),
    })?;
    if let Some(timer) = backend.timer() {
        for worker in server.get_epoll_handlers() {
            let registered = worker.register_listener(timer, EventSet::IN, u64::from(TIMER));
            registered.map_err(failed)?;
        }
    }
    Ok(Share {
        directory,
        server,
        socket: UnixListener::from(socket),
    })
}

/// The guest's overlays mark in `trusted.*` attributes what hides a lower file. On the host these
/// need a capability that this server has not, so they get a name of ours. The guest's kernel lets
/// only its administrators use `trusted.*`, and the guest can't use our name directly.
const TRUSTED: &str = "/prefix/all/trusted./user.kata-like./ /bad/server//trusted./ \
    /bad/client/user.kata-like.// /ok/all///";

fn trusted_attributes(directory: &str) -> Result<XattrMap, ServeError> {
    XattrMap::try_from(TRUSTED).map_err(|error| ServeError::FileSystem {
        directory: directory.to_owned(),
        source: io::Error::other(error.to_string()),
    })
}

/// Checks that `name` is a plain name at the share's top, of a directory and no link.
fn check_directory(name: &str) -> io::Result<String> {
    check_name(name.as_bytes())?;
    let path = format!("/{name}");
    if !Path::new(&path).symlink_metadata()?.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
    }
    Ok(path)
}

/// What the threads tell the one that waits.
enum News {
    ShimGone,
    VmmGone,
    Failed(ServeError),
}

/// Serves until every connection has ended, one has failed, or the shim is gone.
pub fn run(shares: Vec<Share>, control: &Channel) -> Result<(), ServeError> {
    let mut connected = shares.len();
    let (news, inbox) = channel();
    for share in shares {
        let news = news.clone();
        start(move || serve_one(share, &news))?;
    }
    let control = rustix::io::fcntl_dupfd_cloexec(control, 0)
        .map_err(|errno| ServeError::Thread(errno.into()))?;
    start(move || watch(&control, &news))?;
    while connected > 0 {
        match inbox.recv() {
            Ok(News::VmmGone) => connected -= 1,
            Ok(News::Failed(error)) => return Err(error),
            Ok(News::ShimGone) | Err(_) => return Ok(()),
        }
    }
    Ok(())
}

fn start(work: impl FnOnce() + Send + 'static) -> Result<(), ServeError> {
    let thread = thread::Builder::new().spawn(work);
    thread.map(drop).map_err(ServeError::Thread)
}

fn serve_one(mut share: Share, news: &Sender<News>) {
    let mut listener = Listener::from(share.socket);
    let mut served = share.server.start(&mut listener);
    drop(listener); // one connection; no other is accepted
    if served.is_ok() {
        served = share.server.wait();
    }
    let ending = match served {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected
            | VhostUserError::PartialMessage
            | VhostUserError::SocketBroken(_),
        )) => News::VmmGone,
        Err(error) => News::Failed(ServeError::Connection {
            directory: share.directory,
            why: error.to_string(),
        }),
    };
    // Without a receiver the process is ending.
    let _ = news.send(ending);
}

/// The shim sends nothing more, so any event on the control socket is its end.
fn watch(control: &OwnedFd, news: &Sender<News>) {
    while let Err(rustix::io::Errno::INTR) = poll(&mut [PollFd::new(control, PollFlags::IN)], None)
    {
    }
    let _ = news.send(News::ShimGone);
}
