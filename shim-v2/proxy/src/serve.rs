//! Answers the shim's questions, for as long as the shim is there.

use std::sync::Arc;
use std::time::Duration;

use kata_like_agent_protocol::MOST_EVENTS;
use kata_like_agent_protocol::agent_ttrpc::AgentClient;
use kata_like_boot::{Channel, ChannelError};
use kata_like_linux::watch::Watched;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;

use crate::call::call;
use crate::event::Event;
use crate::follow::follow;
use crate::gate::{Gate, Offence};
use crate::wire::{self, Answer, Ask, Question, Report};

/// How many events may wait to be asked for. The guest waits with more.
const WAITING: usize = 256;

/// The shim's questions on one end, the agent's connection on the other.
struct Proxy {
    control: Control,
    client: Client,
    offence: Offence,
}

/// The proxy's end of the control socket, for the event loop.
pub type Control = Arc<Watched<Channel>>;

/// Answers questions until the shim is gone. Needs a runtime of tokio; `control` is non-blocking.
///
/// # Errors
/// The control socket's, and a question that is none.
pub async fn serve(control: Control, agent: UnixStream) -> Result<(), ChannelError> {
    let (client, offence) = connect(agent);
    let proxy = Arc::new(Proxy {
        control,
        client,
        offence,
    });
    wire::send(&proxy.control, &Report::Ready, &[]).await?;
    let mut events = None;
    loop {
        let (Question { id, ask }, fds) = match wire::receive(&proxy.control).await {
            Ok(question) => question,
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        };
        match ask {
            Ask::Call {
                method,
                limit_ms,
                request,
            } => {
                let proxy = Arc::clone(&proxy);
                tokio::spawn(async move {
                    let limit = Duration::from_millis(limit_ms);
                    let answer = match request.bytes(fds) {
                        Ok(bytes) => {
                            call(&proxy.client, &proxy.offence, method, limit, bytes).await
                        }
                        Err(error) => Answer::Broken {
                            why: format!("take the request: {error}"),
                        },
                    };
                    proxy.answer(id, answer).await;
                });
            }
            Ask::Events => {
                let asked = events.get_or_insert_with(|| {
                    let (ask, asked) = mpsc::channel(1);
                    tokio::spawn(Arc::clone(&proxy).tell_events(asked));
                    ask
                });
                // Fails where the shim has been told that there are no more.
                let _ = asked.send(id).await;
            }
        }
    }
}

impl Proxy {
    /// An answer that the shim does not take any more is nobody's.
    async fn answer(&self, id: u64, answer: Answer) {
        let report = Report::Answer { id, answer };
        let _ = wire::send(&self.control, &report, &[]).await;
    }

    /// Follows the agent's events from now on, and tells some for each question in `asked`.
    async fn tell_events(self: Arc<Self>, mut asked: mpsc::Receiver<u64>) {
        let (events, mut happened) = mpsc::channel::<Event>(WAITING);
        let agent = AgentClient::new(self.client.clone());
        let followed = tokio::spawn(follow(agent, Arc::clone(&self.offence), events));
        while let Some(id) = asked.recv().await {
            let mut some = Vec::new();
            if happened.recv_many(&mut some, MOST_EVENTS).await > 0 {
                self.answer(id, Answer::Events(some)).await;
                continue;
            }
            let why = match followed.await {
                Ok(why) => why,
                Err(panic) => panic.to_string(),
            };
            return self.answer(id, Answer::Broken { why }).await;
        }
    }
}

/// The client of an agent on this connection, and what the guest does to have it ended.
fn connect(connection: UnixStream) -> (Client, Offence) {
    let gate = Gate::new(connection);
    let offence = gate.offence();
    (Client::new(Socket::new(gate)), offence)
}

/// The same, as those who follow events have it.
#[cfg(test)]
pub(crate) fn client(connection: UnixStream) -> (AgentClient, Offence) {
    let (client, offence) = connect(connection);
    (AgentClient::new(client), offence)
}
