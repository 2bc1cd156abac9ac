//! The name servers on the loopback of the pod's namespace, as the guest can ask them: the agent
//! listens in their place and tells of each question, and the answer is fetched here.
//!
//! Called by `pod_network`: before a container starts, with what its resolv.conf names by then
//! (Docker writes it after Create), and for each question. A guest reaches port 53 of those
//! addresses, and nothing else.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::namespace::Namespace;
use super::resolver::{self, ResolvConf};
use crate::steps::blocking;
use crate::vm::agent::NameQuestion;
use crate::vm::guest::Guest;
use kata_like_failure::Failure;
use kata_like_linux::lock;

/// How long an answer may take. Most programs that ask wait five seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to read a resolv.conf: it may lie on a network's file system.
const READ: Duration = Duration::from_secs(5);
/// How many questions may be under way: all that the agent takes, by UDP and TCP. Others get no
/// answer.
const AT_ONCE: usize = 128;

/// The name servers that the guest may ask.
#[derive(Debug)]
pub(super) struct Names {
    namespace: Arc<Namespace>,
    servers: Mutex<HashSet<IpAddr>>,
    under_way: Arc<Semaphore>,
}

impl Names {
    /// None, yet.
    pub(super) fn new(namespace: Arc<Namespace>) -> Self {
        Self {
            namespace,
            servers: Mutex::default(),
            under_way: Arc::new(Semaphore::new(AT_ONCE)),
        }
    }

    /// Has the agent listen in the place of the name servers that a container's resolv.conf names
    /// on loopback. What fails is only logged: the container has its network, and may need no
    /// names.
    pub(super) async fn serve(&self, guest: &Guest, container: &str, conf: &ResolvConf) {
        if let Err(error) = self.serve_named(guest, conf.clone()).await {
            let error = error.during("serve the name servers on the pod's loopback");
            tracing::warn!(container, "{}", error.one_line());
        }
    }

    async fn serve_named(&self, guest: &Guest, conf: ResolvConf) -> Result<(), Failure> {
        let path = conf.path.display().to_string();
        let failed = |why: Box<dyn std::error::Error + Send + Sync>| {
            Failure::failed(format!("read {path}"), why)
        };
        let read = tokio::task::spawn_blocking(move || conf.on_loopback());
        let named = match timeout(READ, read).await {
            Ok(Ok(named)) => named.map_err(|error| failed(error.into()))?,
            Ok(Err(panic)) => return Err(failed(panic.into())),
            Err(late) => return Err(failed(late.into())),
        };
        for address in named {
            if self.servers().contains(&address) {
                continue;
            }
            let namespace = Arc::clone(&self.namespace);
            if !blocking(move || resolver::is_served(namespace.as_fd(), address)).await? {
                tracing::debug!("nobody listens at {address} in the pod's namespace");
                continue;
            }
            // Before the first question can come. Where two containers start at once, one asks the
            // agent.
            if self.servers().insert(address)
                && let Err(error) = guest.agent.serve_names(address).await
            {
                self.servers().remove(&address);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Fetches the answer to a question of the guest's, in a task of its own.
    pub(super) fn answer(&self, guest: &Guest, question: NameQuestion) {
        let NameQuestion { address, tcp, .. } = question;
        if !self.servers().contains(&address) {
            tracing::debug!("the guest asks a name server that it was not given");
            return;
        }
        let Ok(permit) = Arc::clone(&self.under_way).try_acquire_owned() else {
            tracing::debug!("the guest asks more questions for names at once than its agent takes");
            return;
        };
        let (guest, namespace) = (guest.clone(), Arc::clone(&self.namespace));
        tokio::spawn(async move {
            let _permit = permit;
            let exchange = async {
                let mut stream = guest.open_stream(question.token).await?;
                let namespace = namespace.copy()?;
                let failed = |error| Failure::failed("carry it to and from the guest", error);
                let asked = resolver::read_message(&mut stream).await.map_err(failed)?;
                let answer = resolver::ask(namespace, address, tcp, asked).await?;
                let written = resolver::write_message(&mut stream, &answer).await;
                written.map_err(failed)
            };
            let why = tokio::select! {
                done = timeout(PATIENCE, exchange) => match done {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.one_line(),
                    Err(_) => format!("no answer within {PATIENCE:?}"),
                },
                _ = guest.vmm.ended() => return,
            };
            tracing::debug!("a question of the guest's to the name server at {address}: {why}");
        });
    }

    fn servers(&self) -> MutexGuard<'_, HashSet<IpAddr>> {
        lock(&self.servers)
    }
}
