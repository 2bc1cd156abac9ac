//! User ids for the pod's VMM and its proxy that are nobody's: no other pod's, and no user's.

use std::sync::Arc;
use std::time::Duration;

use kata_like_config::state::{StateFolder, UIDS, proxy_uid};
use nix::errno::Errno;
use nix::unistd::{Uid, User};
use tokio::sync::oneshot;

use crate::steps::blocking;
use kata_like_failure::{Failure, Kind};

/// How long the host's database of users may take to answer. One that asks a server which is gone
/// takes minutes; no pod waits for that, since nobody gives out these numbers.
const ANSWER: Duration = Duration::from_secs(1);
/// How many numbers are tried.
const TRIES: usize = 16;

/// Takes the VMM's, which gives the proxy's ([`proxy_uid`]); both are free again when the state
/// folder is removed.
pub(super) async fn take(state: &Arc<StateFolder>) -> Result<u32, Failure> {
    for _ in 0..TRIES {
        let folder = Arc::clone(state);
        let uid = blocking(move || {
            let taken = folder.take_uid();
            taken.map_err(|cause| Failure::failed("take a user id for the VMM", cause))
        });
        let uid = uid.await?;
        let proxy = proxy_uid(uid);
        let (vmm_s, proxy_s) = tokio::join!(is_somebody_s(uid), is_somebody_s(proxy));
        if !vmm_s && !proxy_s {
            return Ok(uid);
        }
        tracing::info!("user id {uid} or {proxy} is a user's of this host: the pod takes others");
    }
    let (first, last) = (UIDS.start, UIDS.end - 1);
    Err(Failure::new(
        Kind::Failed,
        format!(
            "take a user id for the VMM: this host has users with {TRIES} of the numbers tried, of {first} to {last}"
        ),
    ))
}

/// Whether a user of the host has this number, as the name service switch knows it: files, and
/// whatever else nsswitch.conf(5) names, which may be asked over a network. Blocks for as long as
/// that takes.
fn is_known(uid: u32) -> nix::Result<bool> {
    match User::from_uid(Uid::from_raw(uid)) {
        // What some services say of a number that they don't know (getpwuid(3), "ERRORS").
        Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => Ok(false),
        answer => Ok(answer?.is_some()),
    }
}

async fn is_somebody_s(uid: u32) -> bool {
    let (tell, answer) = oneshot::channel();
    // Not a thread of the runtime's: one that gets no answer would keep the shim from ending.
    let thread = std::thread::Builder::new();
    let asked = thread.spawn(move || {
        // It fails where nobody waits any more.
        let _ = tell.send(is_known(uid));
    });
    if let Err(error) = asked {
        tracing::warn!("start a thread that looks up user id {uid}: {error}");
    }
    let why = match tokio::time::timeout(ANSWER, answer).await {
        Ok(Ok(Ok(known))) => return known,
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(_)) => "nobody asks".to_owned(),
        Err(_) => format!("no answer within {ANSWER:?}"),
    };
    tracing::warn!("look up user id {uid}, which is taken for nobody's: {why}");
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_known_and_not_every_number_is() {
        assert!(is_known(0).unwrap());
        assert!(!is_known(UIDS.start).unwrap());
    }
}
