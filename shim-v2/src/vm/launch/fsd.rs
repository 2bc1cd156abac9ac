//! The fs server's process: its start, and what it says when it ends.
//!
//! Called by `machine`. The server is ready when it says that it serves; before that its only
//! message is why it will not.

use std::os::fd::BorrowedFd;

use kata_like_boot::{FsdBoot, FsdFds, FsdReport};
use tokio::sync::watch;

use super::child::{OWN_START, clean, getting_on, last_act, next, start};
use super::parts::Parts;
use crate::spawn::{Child, Exit};
use kata_like_failure::{Failure, Kind};

/// How the fs server ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsdEnd {
    /// It ended by itself, as it does when the VM is gone: the cause is to be sought there.
    pub expected: bool,
    pub why: String,
}

/// The fs server.
#[derive(Debug)]
pub struct Fsd {
    child: Child,
    over: watch::Receiver<Option<FsdEnd>>,
}

impl Fsd {
    /// Starts it and waits until it serves every share.
    pub async fn start(
        parts: &Parts,
        cgroup: BorrowedFd<'_>,
        boot: &FsdBoot,
        fds: FsdFds,
    ) -> Result<Self, Failure> {
        let (child, control) = start("fs server", &parts.fsd, Some(cgroup), &parts.place)?;
        let (tell, over) = watch::channel(None);
        let fsd = Self { child, over };
        boot.send(&fds, control.get_ref())
            .map_err(|cause| Failure::failed("send the boot request to the fs server", cause))?;
        drop(fds);
        let (first, wanted) = (next::<FsdReport>(&control), "it serves the pod's share");
        match getting_on("fs server", wanted, &fsd.child, OWN_START, first).await? {
            Ok(FsdReport::Serving) => {}
            Ok(FsdReport::Failed { why }) => {
                return Err(Failure::new(
                    Kind::Failed,
                    format!("start the fs server: {}", clean(&why)),
                ));
            }
            Err(cause) => {
                let exit = last_act(&fsd.child).await;
                let step = format!("wait for the fs server, which {exit}");
                return Err(Failure::failed(step, cause));
            }
        }
        let child = fsd.child.clone();
        tokio::spawn(async move {
            let mut why = None;
            while let Ok(report) = next::<FsdReport>(&control).await {
                if let FsdReport::Failed { why: line } = report {
                    why = Some(clean(&line));
                }
            }
            let exit = last_act(&child).await;
            tell.send_replace(Some(FsdEnd {
                // It ends like that when the VMM has closed its connections.
                expected: why.is_none() && exit == Exit::Status(0),
                why: match why {
                    Some(why) => format!("the fs server failed: {why}"),
                    None => format!("the fs server {exit}"),
                },
            }));
        });
        Ok(fsd)
    }

    pub fn child(&self) -> &Child {
        &self.child
    }

    /// Waits for its end, and tells why it came.
    pub fn ended(&self) -> impl Future<Output = FsdEnd> + Send + 'static + use<> {
        let mut over = self.over.clone();
        async move {
            let end = over.wait_for(Option::is_some).await;
            end.ok()
                .and_then(|end| end.clone())
                .unwrap_or_else(|| FsdEnd {
                    expected: false,
                    why: "the fs server's watcher is gone".to_owned(),
                })
        }
    }
}

impl Drop for Fsd {
    fn drop(&mut self) {
        self.child.kill();
    }
}
