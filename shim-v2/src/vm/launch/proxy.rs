//! The proxy's process: its start, the questions that it is asked, and its end.
//!
//! Called by `machine` and `agent`. One task takes what the proxy says, which is the answer to a
//! question that waits, once. A proxy that says anything else was taken over, and is ended.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kata_like_boot::{ChannelError, VERSION};
use kata_like_linux::lock;
use kata_like_linux::watch::Watched;
use kata_like_proxy::wire::{self, Answer, Ask, Method, ProxyBoot, Question, Report, Request};
use tokio::sync::{oneshot, watch};

use super::child::{Control, OWN_START, clean, getting_on, last_act, next, start};
use super::parts::Parts;
use crate::spawn::Child;
use kata_like_failure::{Failure, Kind, one_line};

/// The most questions without an answer.
const MOST_ASKED: usize = 1024;

/// The proxy. Clones refer to the same one; the last one dropped kills it.
#[derive(Clone, Debug)]
pub struct Proxy(Arc<Running>);

#[derive(Debug)]
struct Running {
    child: Child,
    control: Arc<Watched<Control>>,
    asked: Arc<Mutex<Asked>>,
    over: watch::Receiver<Option<String>>,
}

/// Who waits for an answer, by the question's number.
#[derive(Debug, Default)]
struct Asked {
    last: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// No answer comes any more.
    over: bool,
}

impl Proxy {
    /// Starts it as the user `uid`, and waits until its jail is closed. `agent` is the connection
    /// of the agent, non-blocking.
    pub async fn start(
        parts: &Parts,
        cgroup: BorrowedFd<'_>,
        uid: u32,
        agent: UnixStream,
    ) -> Result<Self, Failure> {
        let (child, control) = start("proxy", &parts.proxy, Some(cgroup), &parts.place)?;
        Self::begin(child, control, uid, agent).await
    }

    /// Goes on with a proxy that was born.
    pub(super) async fn begin(
        child: Child,
        control: Watched<Control>,
        uid: u32,
        agent: UnixStream,
    ) -> Result<Self, Failure> {
        let (tell, over) = watch::channel(None);
        let proxy = Self(Arc::new(Running {
            child: child.clone(),
            control: Arc::new(control),
            asked: Arc::default(),
            over,
        }));
        let control = Arc::clone(&proxy.0.control);
        let version = VERSION;
        ProxyBoot { version, uid }
            .send(agent.as_fd(), control.get_ref())
            .map_err(|cause| Failure::failed("send the boot request to the proxy", cause))?;
        drop(agent);
        let (first, wanted) = (next::<Report>(&control), "its jail is closed");
        match getting_on("proxy", wanted, &child, OWN_START, first).await? {
            Ok(Report::Ready) => {}
            Ok(Report::Failed { why }) => {
                let why = format!("start the proxy: {}", clean(&why));
                return Err(Failure::new(Kind::Failed, why));
            }
            Ok(Report::Answer { .. }) => {
                let why = "start the proxy: it answers what it was not asked";
                return Err(Failure::new(Kind::Failed, why));
            }
            Err(cause) => {
                let exit = last_act(&child).await;
                let step = format!("wait for the proxy, which {exit}");
                return Err(Failure::failed(step, cause));
            }
        }
        let asked = Arc::clone(&proxy.0.asked);
        tokio::spawn(async move {
            let why = follow(&control, &asked, &child).await;
            tell.send_replace(Some(why));
            let mut asked = lock(&asked);
            asked.over = true;
            asked.waiting.clear();
        });
        Ok(proxy)
    }

    pub fn child(&self) -> &Child {
        &self.0.child
    }

    /// Waits for its end, and tells why it came.
    pub fn ended(&self) -> impl Future<Output = String> + Send + 'static + use<> {
        let mut over = self.0.over.clone();
        async move {
            match over.wait_for(Option::is_some).await {
                Ok(over) => over.clone().unwrap_or_default(),
                Err(_) => "the proxy's watcher is gone".to_owned(),
            }
        }
    }

    /// Has the agent called, with a request in protobuf's form. The call goes on if the caller
    /// leaves.
    pub async fn call(
        &self,
        method: Method,
        limit: Duration,
        request: Vec<u8>,
    ) -> Result<Answer, Failure> {
        let (request, file) = Request::new(request)
            .map_err(|cause| Failure::failed("keep a request for the agent", cause))?;
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let call = Ask::Call {
            method,
            limit_ms,
            request,
        };
        let fds: Vec<BorrowedFd> = file.iter().map(AsFd::as_fd).collect();
        self.ask(call, &fds).await
    }

    /// The next events, once there are some.
    pub async fn events(&self) -> Result<Answer, Failure> {
        self.ask(Ask::Events, &[]).await
    }

    async fn ask(&self, ask: Ask, fds: &[BorrowedFd<'_>]) -> Result<Answer, Failure> {
        let (tell, answer) = oneshot::channel();
        let id = {
            let mut asked = lock(&self.0.asked);
            if asked.waiting.len() >= MOST_ASKED {
                let why = format!("ask the guest: it owes {MOST_ASKED} answers");
                return Err(Failure::new(Kind::Failed, why));
            }
            asked.last += 1;
            let id = asked.last;
            match asked.over {
                true => drop(tell),
                false => drop(asked.waiting.insert(id, tell)),
            }
            id
        };
        let sent = wire::send(&self.0.control, &Question { id, ask }, fds).await;
        if let Err(error) = sent {
            lock(&self.0.asked).waiting.remove(&id);
            if !matches!(error, ChannelError::Closed) {
                return Err(Failure::failed("ask the proxy", error));
            }
        }
        match answer.await {
            Ok(answer) => Ok(answer),
            Err(_) => Err(Failure::new(Kind::Failed, self.ended().await)),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill();
    }
}

/// Hands answers on until the proxy's end, and tells why it ended.
async fn follow(control: &Watched<Control>, asked: &Mutex<Asked>, child: &Child) -> String {
    let why = loop {
        match next::<Report>(control).await {
            Ok(Report::Answer { id, answer }) => {
                let waiting = lock(asked).waiting.remove(&id);
                let Some(waiting) = waiting else {
                    child.kill();
                    break Some("it answers what it was not asked".to_owned());
                };
                // Who asked may be gone.
                let _ = waiting.send(answer);
            }
            Ok(Report::Failed { why }) => break Some(clean(&why)),
            Ok(Report::Ready) => {
                child.kill();
                break Some("it says twice that it is ready".to_owned());
            }
            Err(ChannelError::Closed) => break None,
            Err(error) => {
                // What can't be understood is not listened to further.
                child.kill();
                break Some(format!(
                    "it sent what can't be read: {}",
                    clean(&one_line(&error))
                ));
            }
        }
    };
    let exit = last_act(child).await;
    match why {
        Some(why) => format!("the proxy failed: {why}"),
        None => format!("the proxy {exit}"),
    }
}
