//! The serving process: one pod's shim, from its birth to its end.
//!
//! Called by `main`; born by `bootstrap`, with the listening socket as descriptor 3, the lock of
//! the pod's network namespace, if it has one by then, as descriptor 4, and containerd's log FIFO,
//! or nothing, as descriptor 2. It ends by itself: on containerd's `Shutdown`, on SIGTERM or
//! SIGINT, and when it has had neither a container nor a client for a while, which also covers a
//! containerd that died before its first call. At its end socket and sandbox are gone.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_shim_protos::ttrpc;
use futures::Stream;
use futures::stream::unfold;
use kata_like_config::state::NetworkLock;
use kata_like_linux::fd::inherited;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::cgroup;
use crate::containerd::flags::Flags;
use crate::containerd::publish::Publisher;
use crate::containerd::service;
use crate::pod::Pod;
use crate::pod::events::Events;
use crate::share;

/// The listening socket's number.
const LISTENER: RawFd = 3;
/// The number of the network namespace's lock.
const NETWORK: RawFd = 4;
/// How long the shim stays without a container and a client.
const IDLE: Duration = Duration::from_secs(20);
/// How often it looks.
const IDLE_CHECK: Duration = Duration::from_secs(1);
/// How long the last events may take.
const FLUSH: Duration = Duration::from_secs(2);
/// How long clients may take to read the last answers.
const GOODBYE: Duration = Duration::from_millis(500);

/// Why the process can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Typed by a person, most likely.
    #[error(
        "serve: descriptor {LISTENER} is no listening socket; containerd starts this program with the action `start`"
    )]
    NoListener(#[source] io::Error),
    #[error("serve: {step}")]
    Start {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    #[error("serve: start the ttrpc server")]
    Server(#[source] ttrpc::Error),
}

/// Serves one pod to its end.
pub fn run(flags: &Flags) -> Result<(), ServeError> {
    let listener = take_listener().map_err(ServeError::NoListener)?;
    let network = take_network();
    // Before there is a second thread: a namespace is a thread's.
    let host_mounts = share::own_namespace().map_err(|source| ServeError::Start {
        step: "leave the host's mount namespace",
        source,
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .thread_name("shim")
        .enable_all()
        .build()
        .map_err(|source| ServeError::Start {
            step: "start the runtime",
            source,
        })?;
    let served = runtime.block_on(serve(flags, listener, host_mounts, network));
    // A blocking call that hangs does not keep the process.
    runtime.shutdown_timeout(Duration::from_millis(100));
    cgroup::retire();
    served
}

/// The descriptor that `start` has handed over, if it is one.
fn take_listener() -> io::Result<StdUnixListener> {
    let listener = inherited(LISTENER)?;
    if !rustix::net::sockopt::socket_acceptconn(&listener)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let listener = StdUnixListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// The lock that `start` has handed over, if the pod's network namespace was known by then.
fn take_network() -> Option<NetworkLock> {
    // On /dev/null if there is no lock.
    NetworkLock::inherited(inherited(NETWORK).ok()?)
}

async fn serve(
    flags: &Flags,
    listener: StdUnixListener,
    host_mounts: OwnedFd,
    network: Option<NetworkLock>,
) -> Result<(), ServeError> {
    let failed = |step| move |source| ServeError::Start { step, source };
    let path = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(Path::to_owned));
    let listener = UnixListener::from_std(listener).map_err(failed("watch the socket"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("watch for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("watch for SIGINT"))?;

    let (events, happened) = Events::queue();
    let address = std::env::var("TTRPC_ADDRESS").ok();
    let publisher = Publisher::start(address, &flags.namespace, happened);
    let pod = Pod::new(
        &flags.namespace,
        &flags.id,
        events,
        Some(host_mounts),
        network,
    );
    let clients = watch::Sender::new(0);
    let mut server = Server::new()
        .add_listener(Listener::new(accept(listener, clients.clone())))
        .register_service(service::services(&pod));
    server.start().await.map_err(ServeError::Server)?;
    tracing::debug!(sandbox = flags.id, "serving");

    let why = tokio::select! {
        () = pod.done() => "containerd asked for it",
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        () = idle(&pod, &clients) => "no container and no client",
    };
    tracing::debug!(sandbox = flags.id, why, "ending");
    end(&pod, &publisher, path, &clients).await;
    Ok(())
}

/// Takes everything down; each part has its deadline.
async fn end(
    pod: &Arc<Pod>,
    publisher: &Publisher,
    socket: Option<PathBuf>,
    clients: &watch::Sender<usize>,
) {
    // First, so that nobody new finds the way here.
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
    }
    pod.stop().await;
    publisher.flush(FLUSH).await;
    let mut clients = clients.subscribe();
    let _ = timeout(GOODBYE, clients.wait_for(|clients| *clients == 0)).await;
}

/// Returns when there has been nothing to do for a while.
async fn idle(pod: &Pod, clients: &watch::Sender<usize>) {
    let mut since = Instant::now();
    while since.elapsed() < IDLE {
        tokio::time::sleep(IDLE_CHECK).await;
        if !pod.is_idle() || *clients.borrow() > 0 {
            since = Instant::now();
        }
    }
}

/// The clients, one after the other. Only our own user is let in.
fn accept(
    listener: UnixListener,
    clients: watch::Sender<usize>,
) -> impl Stream<Item = io::Result<Client>> + Send {
    unfold((listener, clients), async |(listener, clients)| {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: not to be asked again at once.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    return Some((Err(error), (listener, clients)));
                }
            };
            let ours = rustix::process::geteuid().as_raw();
            match stream.peer_cred() {
                Ok(peer) if peer.uid() == ours => {
                    let client = Client::new(stream, clients.clone());
                    return Some((Ok(client), (listener, clients)));
                }
                Ok(peer) => tracing::warn!(uid = peer.uid(), "refuse a client of another user"),
                Err(error) => tracing::warn!(%error, "refuse a client that can't be identified"),
            }
        }
    })
}

/// A connection that is counted.
struct Client {
    stream: UnixStream,
    clients: watch::Sender<usize>,
}

impl Client {
    fn new(stream: UnixStream, clients: watch::Sender<usize>) -> Self {
        clients.send_modify(|clients| *clients += 1);
        Self { stream, clients }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.clients.send_modify(|clients| *clients -= 1);
    }
}

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Client {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
