//! What becomes of a namespace after it was joined: interfaces that come, change and go, and the
//! ways over them.
//!
//! The guest is told of the difference only, and so keeps what its containers have changed
//! themselves. A plugin makes an interface in many steps. So whoever watches is told of a change
//! only when nothing has changed any more for a while, and an interface counts as soon as it is up.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use kata_like_linux::watch::Watched;
use kata_like_netlink::{Address, Changes, Link, Named, Neighbour, Route};
use tokio::io::Interest;
use tokio::time::{Instant, timeout_at};

use super::{Interface, Joined, MAX_INTERFACES, Network, TAP_PREFIX, failed, inside, interface};
use kata_like_failure::Failure;

/// How long nothing must have changed, and how long that is waited for.
const QUIET: Duration = Duration::from_secs(1);
const RESTLESS: Duration = Duration::from_secs(10);

/// Has the kernel tell of changes in a namespace from now on. Blocks.
pub fn open(namespace: BorrowedFd) -> Result<Changes, Failure> {
    inside(namespace, || {
        Changes::open().map_err(failed("watch the pod's network namespace"))
    })
}

/// Watches a namespace. Needs a runtime of tokio.
#[derive(Debug)]
pub struct Watch(Watched<Changes>);

impl Watch {
    /// Waits for these.
    pub fn new(changes: Changes) -> io::Result<Self> {
        Ok(Self(Watched::new(changes, Interest::READABLE)?))
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
    /// Interfaces that have come, and all routes and neighbours that have.
    pub come: Network,
    pub taps: Vec<OwnedFd>,
    /// Interfaces that are different, with the addresses that have come.
    pub changed: Vec<Interface>,
    /// What has gone from interfaces that are there: their addresses, routes and neighbours.
    pub removed: Network,
}

impl Joined {
    /// Looks again, and joins what has come to taps. What can't be joined is logged once. Blocks.
    pub fn look_again(&mut self, namespace: BorrowedFd) -> Result<Later, Failure> {
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
            let mut now = Network::default();
            for told in &self.told.interfaces {
                let link = links.iter().find(|link| link.index == told.index);
                // One that can't be judged any more, as it is down without an address, stays as it
                // was.
                let found = link.map(|link| interface(link, &links, &addresses));
                let stays = link.is_some().then(|| told.clone());
                let found = found.and_then(|it| it.ok().flatten()).or(stays);
                now.interfaces.extend(found.map(|found| Interface {
                    mtu: found.mtu.min(told.mtu), // the device has got its largest one
                    ..found
                }));
            }
            now.interfaces.extend(come.iter().cloned());
            now.add_ways(&mut self.socket, &links, &mut |error| {
                tracing::warn!("what has come is left out: {}", error.one_line());
                Ok(())
            })?;
            let mut later = difference(&self.told, &now);
            self.told = now;
            (later.gone, later.taps, later.come.interfaces) = (gone, taps, come);
            Ok(later)
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
    ) -> Result<Option<(Interface, OwnedFd)>, Failure> {
        let Some(found) = interface(link, links, addresses)? else {
            return Ok(None);
        };
        if self.redirects.len() >= MAX_INTERFACES {
            let why = format!("a virtual machine has at most {MAX_INTERFACES} interfaces");
            return Err(Failure::unsupported("one more", why));
        }
        let tap = self.join(&found)?;
        Ok(Some((found, tap)))
    }
}

/// What is different, but for interfaces that have come or gone.
fn difference(told: &Network, now: &Network) -> Later {
    let mut later = Later::default();
    for interface in &now.interfaces {
        let Some(before) = told
            .interfaces
            .iter()
            .find(|it| it.index == interface.index)
        else {
            continue;
        };
        let lacks = |of: &Interface, it: &Address| !of.addresses.iter().any(|own| is_same(own, it));
        let (mut come, mut gone) = (interface.clone(), before.clone());
        come.addresses.retain(|it| lacks(before, it));
        // One with a limited life is prolonged by what the guest hears and the host does not.
        let permanent = |it: &Address| it.flags & libc::IFA_F_PERMANENT != 0;
        gone.addresses
            .retain(|it| permanent(it) && lacks(interface, it));
        let differs = (come.mtu, come.up) != (before.mtu, before.up);
        if differs || !come.addresses.is_empty() {
            later.changed.push(come);
        }
        if !gone.addresses.is_empty() {
            later.removed.interfaces.push(gone);
        }
    }
    let is_left = |it: &String| it == "lo" || now.has(it);
    later.come.routes = without(&now.routes, &told.routes);
    later.removed.routes = without(&told.routes, &now.routes);
    let gone = |it: &Named<Route>| it.interfaces.iter().all(is_left);
    later.removed.routes.retain(gone);
    later.come.neighbours = without(&now.neighbours, &told.neighbours);
    later.removed.neighbours = without(&told.neighbours, &now.neighbours);
    let gone = |it: &Named<Neighbour>| it.interfaces.iter().all(is_left);
    later.removed.neighbours.retain(gone);
    later
}

/// Whether two addresses are one, however far the kernel is with it.
fn is_same(one: &Address, other: &Address) -> bool {
    let flags = one.flags;
    *one == Address {
        flags,
        ..other.clone()
    }
}

/// Those that are not among the others.
fn without<T: Clone + PartialEq>(these: &[T], others: &[T]) -> Vec<T> {
    let left = these.iter().filter(|it| !others.contains(it));
    left.cloned().collect()
}
