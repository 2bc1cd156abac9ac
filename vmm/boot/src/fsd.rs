//! The fs server's boot request and its one report.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::{BOOT_DEADLINE, Channel, ChannelError, VERSION};

/// Who else may change a share's files while the pod runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CachePolicy {
    /// Nobody: the guest caches everything that it has read, and remembers missing names.
    Private,
    /// The host, too: the guest asks again after a short time.
    Shared,
}

/// One virtio-fs server object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsdShare {
    /// The share's root: a plain directory name at the top of [`FsdFds::tree`].
    pub directory: String,
    /// How the guest may cache the share's files.
    pub cache: CachePolicy,
}

/// What the fs server serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsdBoot {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The shares, in the order of [`FsdFds::sockets`].
    pub shares: Vec<FsdShare>,
    /// How many files the guest may keep open or remember, in all shares together. Each holds about
    /// 2 KiB of the host's kernel. The host's own limits may allow fewer.
    pub files: u64,
    /// The guest's memory in bytes. The server maps all of it.
    pub memory_bytes: u64,
}

/// The descriptors beside an [`FsdBoot`], in this order.
#[derive(Debug)]
pub struct FsdFds {
    /// A recursive `open_tree(2)` clone of the pod's share, a shared mount.
    pub tree: OwnedFd,
    /// A listening vhost-user socket per share.
    pub sockets: Vec<OwnedFd>,
}

impl FsdBoot {
    /// Sends the request, for the shim.
    pub fn send(&self, fds: &FsdFds, to: &Channel) -> Result<(), ChannelError> {
        let mut all: Vec<BorrowedFd> = vec![fds.tree.as_fd()];
        all.extend(fds.sockets.iter().map(AsFd::as_fd));
        to.send(self, &all)
    }

    /// Receives the request, for the server. It must come within ten seconds. Checks version and
    /// number of descriptors.
    pub fn receive(from: &Channel) -> Result<(Self, FsdFds), ChannelError> {
        let (boot, fds): (Self, _) = from.receive_within(BOOT_DEADLINE)?;
        if boot.version != VERSION {
            return Err(ChannelError::Version {
                theirs: boot.version,
                ours: VERSION,
            });
        }
        let (got, wanted) = (fds.len(), 1 + boot.shares.len());
        if got != wanted {
            return Err(ChannelError::Descriptors { got, wanted });
        }
        let mut rest = fds.into_iter();
        let tree = rest
            .next()
            .ok_or(ChannelError::Descriptors { got, wanted })?;
        Ok((
            boot,
            FsdFds {
                tree,
                sockets: rest.collect(),
            },
        ))
    }
}

/// What the fs server tells the shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsdReport {
    /// The jail is closed, and every share is served.
    Serving,
    /// The server will not serve, and its process ends.
    Failed {
        /// Step, object and cause.
        why: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_for_each_share_or_nothing() {
        let fd = || Channel::pair().unwrap().0.into_fd();
        let share = |directory: &str, cache| FsdShare {
            directory: directory.into(),
            cache,
        };
        let boot = FsdBoot {
            version: VERSION,
            shares: vec![
                share("rootfs", CachePolicy::Private),
                share("volumes", CachePolicy::Shared),
            ],
            files: 1000,
            memory_bytes: 64 << 20,
        };
        for (sockets, good) in [(1, false), (2, true), (3, false)] {
            let (shim, fsd) = Channel::pair().unwrap();
            let fds = FsdFds {
                tree: fd(),
                sockets: (0..sockets).map(|_| fd()).collect(),
            };
            boot.send(&fds, &shim).unwrap();
            assert_eq!(FsdBoot::receive(&fsd).is_ok(), good, "{sockets} sockets");
        }
    }
}
