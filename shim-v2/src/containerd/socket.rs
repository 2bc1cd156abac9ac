//! The socket that a pod's shim serves on: its place, its making, and whether somebody serves
//! there.
//!
//! Called by `bootstrap`. The place follows from containerd's address, the namespace and the pod's
//! name, so every container of a pod finds the same one. It is made 0600 in a 0700 directory by a
//! process without threads, listens before anybody is told of it, and is handed to the serving
//! process open. (Facts: containerd, `pkg/shim/util_unix.go`.)

use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use sha2::{Digest, Sha256};
use std::os::fd::AsFd;

/// Where containerd's shims have their sockets, unless it names another directory.
pub const DIRECTORY: &str = "/run/containerd/s";
/// The longest path that containerd can dial.
const MAX_PATH: usize = 106;
/// How long a socket that exists may take to show that it is served.
const ALIVE_DEADLINE: Duration = Duration::from_millis(100);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The directory's name leaves no room for ours.
    #[error("place the shim's socket: {} is longer than {MAX_PATH} bytes", path.display())]
    TooLong { path: PathBuf },
    /// A step of its making.
    #[error("make the shim's socket: {step} {}", path.display())]
    Make {
        /// What was being done.
        step: &'static str,
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// What [`bind`] has found at a socket's place.
#[derive(Debug)]
pub enum Bound {
    /// It is ours now.
    New(UnixListener),
    /// A living shim serves there.
    Served,
}

/// The socket's path for a pod.
pub fn path(
    directory: &Path,
    address: &str,
    namespace: &str,
    group: &str,
) -> Result<PathBuf, SocketError> {
    let joined = Path::new(address).join(namespace).join(group);
    let digest = Sha256::digest(joined.as_os_str().as_encoded_bytes());
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(name);
    if path.as_os_str().len() > MAX_PATH {
        return Err(SocketError::TooLong { path });
    }
    Ok(path)
}

/// The address of a path, as it is told to containerd.
pub fn address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Makes the socket and listens, unless a living shim serves there. Call it before any thread runs:
/// it sets the process's umask for a moment.
pub fn bind(path: &Path) -> Result<Bound, SocketError> {
    let failed = |step, source| SocketError::Make {
        step,
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| failed("make the directory of", source))?;
    }
    let listener = match bind_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path) {
                return Ok(Bound::Served);
            }
            std::fs::remove_file(path).map_err(|source| failed("remove the dead", source))?;
            bind_private(path)
        }
        bound => bound,
    };
    listener
        .map(Bound::New)
        .map_err(|source| failed("bind", source))
}

fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(before);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether a process listens at `path`.
pub fn is_served(path: &Path) -> bool {
    try_connect(path).is_ok()
}

fn try_connect(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(
        std::os::fd::AsRawFd::as_raw_fd(&probe),
        &UnixAddr::new(path)?,
    ) {
        // A listener with a full queue is alive, only busy.
        Ok(()) | Err(nix::Error::EAGAIN) => Ok(()),
        Err(nix::Error::EINPROGRESS) => {
            let timeout = PollTimeout::try_from(ALIVE_DEADLINE).unwrap_or(PollTimeout::ZERO);
            let mut polled = [PollFd::new(probe.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut polled, timeout)? {
                0 => Err(nix::Error::ETIMEDOUT),
                _ => Ok(()),
            }
        }
        Err(error) => Err(error),
    }
}

/// Removes a socket that nobody serves any more.
pub fn remove_dead(path: &Path) {
    if !is_served(path) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_the_one_of_containerd_s_own_shims() {
        // sha256 of "/run/containerd/containerd.sock/default/a".
        let path = path(
            Path::new(DIRECTORY),
            "/run/containerd/containerd.sock",
            "default",
            "a",
        )
        .expect("a short directory");
        let digest = Sha256::digest(b"/run/containerd/containerd.sock/default/a");
        let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(path, Path::new("/run/containerd/s").join(name));
        assert_eq!(path.as_os_str().len(), 18 + 64);
    }

    #[test]
    fn a_directory_too_long_to_dial_is_refused() {
        let directory = PathBuf::from(format!("/{}", "d".repeat(60)));
        let error = path(&directory, "", "default", "a").expect_err("125 bytes");
        assert!(matches!(error, SocketError::TooLong { .. }));
    }

    #[test]
    fn a_socket_is_private_and_found_alive() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("deep/er/socket");
        let Bound::New(listener) = bind(&path).expect("bind") else {
            panic!("nobody serves there");
        };
        let mode = |path: &Path| path.metadata().expect("metadata").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().expect("a parent")), 0o700);
        assert!(matches!(bind(&path), Ok(Bound::Served)));
        drop(listener);
        assert!(!is_served(&path));
        assert!(
            matches!(bind(&path), Ok(Bound::New(_))),
            "a dead one is replaced"
        );
    }

    #[test]
    fn only_a_dead_socket_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("socket");
        let bound = bind(&path).expect("bind");
        remove_dead(&path);
        assert!(path.exists());
        drop(bound);
        remove_dead(&path);
        assert!(!path.exists());
    }
}
