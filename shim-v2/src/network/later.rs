//! What becomes of a namespace after it was joined: interfaces that come and go.
//!
//! A plugin makes an interface in many steps. So whoever watches is told of a change only when nothing has
//! changed any more for a while, and an interface counts as soon as it is up.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use kata_like_netlink::{Address, Changes, Link};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use super::{Interface, Joined, MAX_INTERFACES, Network, TAP_PREFIX, failed, inside, interface};
use crate::error::SandboxError;

/// How long nothing must have changed, and how long that is waited for.
const QUIET: Duration = Duration::from_secs(1);
const RESTLESS: Duration = Duration::from_secs(10);

/// Has the kernel tell of changes in a namespace from now on. Blocks.
pub fn open(namespace: BorrowedFd) -> Result<Changes, SandboxError> {
    inside(namespace, || {
        Changes::open().map_err(failed("watch the pod's network namespace"))
    })
}

/// Watches a namespace. Needs a runtime of tokio.
#[derive(Debug)]
pub struct Watch(AsyncFd<Changes>);

impl Watch {
    /// Waits for these.
    pub fn new(changes: Changes) -> io::Result<Self> {
        // SAFETY: the descriptor must be open, and stay the same file until the `AsyncFd` is dropped. `Changes`
        // owns it and never exchanges it, and the `AsyncFd` owns `Changes`.
        let watched = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) };
        Ok(Self(watched?))
    }

    /// Waits for a change, and for the end of what has begun with it.
    pub async fn settled(&self) -> io::Result<()> {
        self.changed().await?;
        let end = Instant::now() + RESTLESS;
        while let Ok(changed) = timeout_at(end.min(Instant::now() + QUIET), self.changed()).await {
            changed?;
        }
        Ok(())
    }

    async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let some = ready.get_inner().take()?;
            ready.clear_ready();
            if some {
                return Ok(());
            }
        }
    }
}

/// What has become of a namespace.
#[derive(Debug, Default)]
pub struct Later {
    /// The numbers of interfaces that are gone.
    pub gone: Vec<u32>,
    /// Interfaces that have come, with the routes and neighbours that lead over them.
    pub come: Network,
    /// Their taps.
    pub taps: Vec<OwnedFd>,
}

impl Joined {
    /// Looks again, and joins what has come to taps. What can't be joined is logged once. Blocks.
    pub fn look_again(&mut self, namespace: BorrowedFd) -> Result<Later, SandboxError> {
        inside(namespace, || {
            let links = self.socket.links().map_err(failed("list the interfaces"))?;
            let addresses = self
                .socket
                .addresses()
                .map_err(failed("list the addresses"))?;
            let gone = self.forget(&links);
            let (mut come, mut taps) = (Vec::new(), Vec::new());
            for link in links.iter().filter(|link| link.is_up()) {
                if self.knows(link.index) || link.name.starts_with(TAP_PREFIX) {
                    continue;
                }
                match self.join_later(link, &links, &addresses) {
                    Ok(Some((interface, tap))) => {
                        come.push(interface);
                        taps.push(tap);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        self.given_up.insert(link.index);
                        let line = error.one_line();
                        tracing::warn!("{} has come and is left out: {line}", link.name);
                    }
                }
            }
            let come = match come.is_empty() {
                true => Network::default(),
                false => self.ways_over(come, &links)?,
            };
            Ok(Later { gone, come, taps })
        })
    }

    fn knows(&self, index: u32) -> bool {
        let mut redirects = self.redirects.iter();
        redirects.any(|redirect| redirect.link() == index) || self.given_up.contains(&index)
    }

    /// Forgets what is gone, and answers what of it was joined.
    fn forget(&mut self, links: &[Link]) -> Vec<u32> {
        let is_there = |index: &u32| links.iter().any(|link| link.index == *index);
        self.given_up.retain(is_there);
        let joined = self.redirects.iter().map(|redirect| redirect.link());
        let gone: Vec<u32> = joined.filter(|index| !is_there(index)).collect();
        self.redirects
            .retain(|redirect| !gone.contains(&redirect.link()));
        gone
    }

    fn join_later(
        &mut self,
        link: &Link,
        links: &[Link],
        addresses: &[Address],
    ) -> Result<Option<(Interface, OwnedFd)>, SandboxError> {
        let Some(found) = interface(link, links, addresses)? else {
            return Ok(None);
        };
        if self.redirects.len() >= MAX_INTERFACES {
            let why = format!("a virtual machine has at most {MAX_INTERFACES} interfaces");
            return Err(SandboxError::unsupported("one more", why));
        }
        let tap = self.join(&found)?;
        Ok(Some((found, tap)))
    }

    /// The routes and neighbours that lead over these interfaces.
    fn ways_over(
        &mut self,
        interfaces: Vec<Interface>,
        links: &[Link],
    ) -> Result<Network, SandboxError> {
        let mut network = Network {
            interfaces,
            ..Network::default()
        };
        network.add_ways(&mut self.socket, links)?;
        let routes = std::mem::take(&mut network.routes).into_iter();
        let over = routes.filter(|route| route.interfaces.iter().any(|name| network.has(name)));
        network.routes = over.collect();
        Ok(network)
    }
}
