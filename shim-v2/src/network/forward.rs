//! Port-forward: what connects to the loopback of the pod's network namespace on the host reaches
//! the guest's.
//!
//! Called by `pod_network`. containerd's PortForward (CRI) enters that namespace and dials
//! localhost, where no process of the guest listens. So one socket listens there for every port
//! (`steer`), and each connection is joined to one that the agent makes in the guest. The kernel
//! has accepted a connection before the guest has been asked: one that the guest refuses is reset
//! at once.
//!
//! What must hold: no more connections than [`MOST`], or the limit of open files lets through;
//! further ones are reset. Nobody waits for anything here. All of it ends when [`Forward`] is
//! dropped, or with the shim.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kata_like_netlink::loopback_up;
use kata_like_relay::{relay, reset};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use rustix::process::{Resource, getrlimit};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::network::read::inside;
use kata_like_failure::{Failure, Kind};

mod steer;

use steer::Steering;

/// The most connections at a time: half of the streams that the VMM carries.
const MOST: usize = 512;
/// Open files that are left for all else that the shim does.
const OTHER_FILES: u64 = 256;
/// How many wait to be accepted.
const BACKLOG: i32 = 1024;
/// How long it waits after a failure to accept: somebody may close a file meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that every port of the namespace's loopback leads to.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    steering: Steering,
}

/// Connections, being accepted and carried. Dropped, all of them end.
#[derive(Debug)]
pub struct Forward {
    #[allow(dead_code, reason = "its drop is what it is for")]
    steering: Steering,
    accepting: AbortHandle,
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Listens in a namespace; nothing is accepted yet. Where the namespace is the pod's `own`, its
/// loopback interface is brought up first. Blocks.
pub fn listen_in(namespace: BorrowedFd, own: bool) -> Result<Listener, Failure> {
    let failed = |step: &'static str| move |cause: io::Error| Failure::failed(step, cause);
    inside(namespace, || {
        if own {
            loopback_up().map_err(failed("bring the loopback interface up"))?;
        }
        let socket = match listening(AddressFamily::INET6) {
            // A kernel without IPv6.
            Err(Errno::AFNOSUPPORT) => listening(AddressFamily::INET),
            other => other,
        };
        let socket = socket.map_err(|errno| failed("listen on loopback")(errno.into()))?;
        let steering = Steering::new(namespace, socket.as_fd())?;
        Ok(Listener { socket, steering })
    })
}

/// On loopback, so that nobody else reaches it: on IPv4's, for a socket of IPv6 that is bound to
/// `::1` takes no IPv4 (net/ipv6/af_inet6.c, `__inet6_bind`). Free: the interface may be down.
fn listening(family: AddressFamily) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    if family == AddressFamily::INET6 {
        let address = Ipv4Addr::LOCALHOST.to_ipv6_mapped();
        sockopt::set_ipv6_v6only(&socket, false)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
        bind(&socket, &SocketAddrV6::new(address, 0, 0, 0))?;
    } else {
        sockopt::set_ip_freebind(&socket, true)?;
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))?;
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

impl Listener {
    /// Accepts from now on. `connect` connects to a port of the guest's loopback. Needs a runtime
    /// of tokio.
    pub fn serve<F>(
        self,
        connect: impl Fn(u16) -> F + Send + Sync + 'static,
    ) -> Result<Forward, Failure>
    where
        F: Future<Output = Result<UnixStream, Failure>> + Send + 'static,
    {
        let listener = TcpListener::from_std(self.socket.into())
            .map_err(|cause| Failure::failed("watch the listening socket", cause))?;
        let accepting = tokio::spawn(accept(listener, most(), Arc::new(connect)));
        Ok(Forward {
            steering: self.steering,
            accepting: accepting.abort_handle(),
        })
    }
}

/// Each takes two files here.
fn most() -> usize {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let fit = files.saturating_sub(OTHER_FILES) / 2;
    usize::try_from(fit).map_or(MOST, |fit| fit.clamp(1, MOST))
}

async fn accept<F>(
    listener: TcpListener,
    most: usize,
    connect: Arc<impl Fn(u16) -> F + Send + Sync + 'static>,
) where
    F: Future<Output = Result<UnixStream, Failure>> + Send + 'static,
{
    let (mut connections, mut full) = (JoinSet::new(), false);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let client = match accepted {
            Ok((client, _)) => client,
            Err(error) => {
                tracing::warn!("accept a connection to be forwarded: {error}");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        if connections.len() >= most {
            if !std::mem::replace(&mut full, true) {
                tracing::warn!("{most} connections are forwarded: further ones are reset");
            }
            reset(&client);
            continue;
        }
        full &= connections.len() > most / 2;
        let connect = Arc::clone(&connect);
        connections.spawn(async move { forward(client, &*connect).await });
    }
}

async fn forward<F>(client: TcpStream, connect: &(impl Fn(u16) -> F + Sync))
where
    F: Future<Output = Result<UnixStream, Failure>> + Send + 'static,
{
    // What is small goes on at once: it has been held together by whoever sends it.
    let port = client
        .set_nodelay(true)
        .and_then(|()| client.local_addr())
        .map(|address| address.port());
    let guest = match port {
        Ok(port) => connect(port).await,
        Err(cause) => Err(Failure::failed("look at a connection", cause)),
    };
    match guest {
        Ok(guest) => relay(client, guest).await,
        Err(error) => {
            match error.kind() {
                // A port that nobody listens on, most likely.
                Kind::Failed => tracing::debug!("{}", error.one_line()),
                _ => tracing::warn!("{}", error.one_line()),
            }
            reset(&client);
        }
    }
}

#[cfg(test)]
mod tests;
