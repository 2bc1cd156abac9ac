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
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use kata_like_boot::{CachePolicy, Channel, FsdShare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, PassthroughFs};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use crate::backend::{Backend, LockServer};
use crate::closing::Closing;
use crate::filters::{Filters, Kind};
use crate::jail::{self, JailStepError};
use crate::locks::{Locks, MAX_OWNERS};
use crate::names::{Checked, Others, check_name};

/// Descriptors that do not belong to the guest: sockets, eventfds, guest memory, those of a
/// request.
const OWN_FILES: u64 = 256;

/// Descriptors of the guest that the library does not count.
const LOCK_FILES: u64 = MAX_OWNERS as u64;

/// Descriptors that the server needs beside those of the guest that the library counts. Each inode
/// that the guest knows holds one.
pub const RESERVED: u64 = OWN_FILES + LOCK_FILES;

/// How long the guest may keep names and attributes that only an administrator changes.
const KEEP: Duration = Duration::from_secs(60);

/// How long the guest may keep what the host may change: it must see a change within a second.
const KEEP_SHARED: Duration = Duration::from_millis(500);

/// How long the VMM's connection may take: the shim makes it before it starts the server.
const CONNECTED_WITHIN: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};

/// How long a thread may take to load its filter.
const CLOSED_WITHIN: Duration = Duration::from_secs(10);

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
    /// The VMM has not connected.
    #[error("wait for the VMM's connection to {directory:?}")]
    NotConnected {
        directory: String,
        #[source]
        source: io::Error,
    },
    /// A step of the jail failed.
    #[error(transparent)]
    Jail(#[from] JailStepError),
    /// A thread does not say that it has its filter.
    #[error("wait for the filter of a thread: no word within {CLOSED_WITHIN:?}")]
    NotClosed,
    /// The connection to the VMM failed.
    #[error("serve the VMM's requests to {directory:?}: {why}")]
    Connection { directory: String, why: String },
}

type Server = VhostUserDaemon<Arc<Backend>>;

/// A share and its worker.
struct Share {
    directory: String,
    server: Server,
    socket: Option<UnixListener>,
}

/// What is served, and to whom.
pub struct Request<'a> {
    /// The shares, each with a socket that the VMM has connected to.
    pub shares: &'a [FsdShare],
    /// The sockets, listening.
    pub sockets: Vec<OwnedFd>,
    /// The limit of open files of this process.
    pub files: u64,
    /// `/proc/self/fd`.
    pub proc_self_fd: File,
}

/// The threads that serve, each behind its filter.
pub struct Serving {
    connected: usize,
    inbox: Receiver<News>,
}

/// Makes a server for each share and all threads. When it returns, each of them has its filter; the
/// exception is what [`crate::closing`] says of the vhost threads.
pub fn start(
    request: Request,
    control: &Channel,
    filters: &Filters,
) -> Result<Serving, ServeError> {
    let open = |share: &FsdShare| {
        let opened = check_directory(&share.directory).and_then(File::open);
        opened.map_err(|source| ServeError::Directory {
            directory: share.directory.clone(),
            source,
        })
    };
    let directories = request
        .shares
        .iter()
        .map(open)
        .collect::<Result<Vec<_>, _>>()?;
    jail::only_files_below(&directories, &request.proc_self_fd)?;
    drop(directories);
    let (closed, all_closed) = channel();
    let shares = prepare(request, filters, &closed)?;
    let (news, inbox) = channel();
    let connected = shares.len();
    for mut share in shares {
        share.connect()?;
        let news = news.clone();
        waiter(filters, &closed, move || serve_one(share, &news))?;
    }
    let control = rustix::io::fcntl_dupfd_cloexec(control, 0)
        .map_err(|errno| ServeError::Thread(errno.into()))?;
    waiter(filters, &closed, move || {
        watch(&control, &news);
        // A waiter closes nothing.
        std::mem::forget(control);
    })?;
    // A worker and a waiter for each share, and one for the control socket.
    for _ in 0..2 * connected + 1 {
        let within = all_closed.recv_timeout(CLOSED_WITHIN);
        within.map_err(|_| ServeError::NotClosed)?;
    }
    Ok(Serving { connected, inbox })
}

impl Serving {
    /// Serves until every connection has ended, one has failed, or the shim is gone.
    pub fn run(mut self) -> Result<(), ServeError> {
        while self.connected > 0 {
            match self.inbox.recv() {
                Ok(News::VmmGone) => self.connected -= 1,
                Ok(News::Failed(error)) => return Err(error),
                Ok(News::ShimGone) | Err(_) => return Ok(()),
            }
        }
        Ok(())
    }
}

fn prepare(
    request: Request,
    filters: &Filters,
    closed: &Sender<Kind>,
) -> Result<Vec<Share>, ServeError> {
    let (files, count) = (request.files, request.shares.len());
    let budget = files
        .checked_sub(RESERVED)
        .and_then(|guest| guest.checked_div(count as u64))
        .filter(|budget| *budget >= OWN_FILES)
        .ok_or(ServeError::TooFewFiles {
            files,
            shares: count,
        })?;
    let mut made = Vec::new();
    for (share, socket) in request.shares.iter().zip(request.sockets) {
        let closing = Closing::new(filters.clone(), closed.clone()).map_err(ServeError::Thread)?;
        made.push(prepare_one(
            share,
            socket,
            &request.proc_self_fd,
            budget,
            closing,
        )?);
    }
    Ok(made)
}

fn prepare_one(
    share: &FsdShare,
    socket: OwnedFd,
    proc_self_fd: &File,
    budget: u64,
    closing: Closing,
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
    let checked = Checked::new(file_system, others);
    let backend = Arc::new(Backend::new(checked, lock_server, closing));
    let server = VhostUserDaemon::new(
        format!("fs {directory}"),
        backend.clone(),
        GuestMemoryAtomic::new(GuestMemoryMmap::new()),
    )
    .map_err(|error| ServeError::Daemon {
        directory: directory.clone(),
        why: error.to_string(),
    })?;
    for worker in server.get_epoll_handlers() {
        for (descriptor, number) in backend.events() {
            let registered = worker.register_listener(descriptor, EventSet::IN, number.into());
            registered.map_err(failed)?;
        }
    }
    Ok(Share {
        directory,
        server,
        socket: Some(UnixListener::from(socket)),
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

impl Share {
    /// Takes the VMM's connection, and has a thread answer what comes over it.
    fn connect(&mut self) -> Result<(), ServeError> {
        let failed = |source| ServeError::NotConnected {
            directory: self.directory.clone(),
            source,
        };
        let socket = self
            .socket
            .take()
            .ok_or_else(|| failed(io::ErrorKind::NotConnected.into()))?;
        let mut waiting = [PollFd::new(&socket, PollFlags::IN)];
        match poll(&mut waiting, Some(&CONNECTED_WITHIN)) {
            Ok(0) => return Err(failed(io::ErrorKind::TimedOut.into())),
            Ok(_) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        // One connection: no other is accepted.
        let started = self.server.start(&mut Listener::from(socket));
        started.map_err(|error| ServeError::Connection {
            directory: self.directory.clone(),
            why: error.to_string(),
        })
    }
}

/// Starts a thread that only waits, behind the filter for that. It stays: the end of a thread takes
/// calls that the filter has not.
fn waiter(
    filters: &Filters,
    closed: &Sender<Kind>,
    work: impl FnOnce() + Send + 'static,
) -> Result<(), ServeError> {
    let (filters, closed) = (filters.clone(), closed.clone());
    let thread = thread::Builder::new().spawn(move || {
        // Without its filter it does nothing and says nothing, and the server does not start.
        if filters.close(Kind::Waiter).is_ok() && closed.send(Kind::Waiter).is_ok() {
            work();
        }
        loop {
            thread::park();
        }
    });
    thread.map(drop).map_err(ServeError::Thread)
}

fn serve_one(mut share: Share, news: &Sender<News>) {
    let served = share.server.wait();
    let ending = match served {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected
            | VhostUserError::PartialMessage
            | VhostUserError::SocketBroken(_),
        )) => News::VmmGone,
        Err(error) => News::Failed(ServeError::Connection {
            directory: share.directory.clone(),
            why: error.to_string(),
        }),
    };
    // The process ends with its last share, and what is left of this one with it.
    std::mem::forget(share);
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
