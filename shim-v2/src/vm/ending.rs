//! How long an end may take: as long as what containers have written becomes less in the guest.
//!
//! Called by `pod` before VMM and fs server are stopped, and after a process was killed. We ask the
//! agent again and again how much is left; it answers within a second. Nothing is cut off as long
//! as that becomes less. Where it does not, what is left is lost, and the log says how much.

use std::time::{Duration, Instant};

use super::agent::Unwritten;
use super::guest::Guest;

/// For how long what is left may not become less at the end of a pod.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same for a process that was killed: giving back much memory takes its time, too, and a lock
/// that it waits for may hold it for half a minute.
pub const KILL_PATIENCE: Duration = Duration::from_secs(60);
/// The same for a placeholder, which has neither.
pub const PLACEHOLDER_PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks at one.
const LOOK: Duration = Duration::from_secs(2);
/// For how long it may become less: a guest that gives its bytes back one by one is not waited for.
const LIMIT: Duration = Duration::from_secs(240);

/// Has the guest end its containers and write back what they have written.
pub async fn write_back(guest: &Guest) {
    let mut watch = Watch::new(PATIENCE);
    let why = loop {
        if guest.vmm.has_ended() {
            return; // why it has ended was told
        }
        match guest.agent.shutdown().await {
            Ok(None) => return,
            Ok(Some(left)) => {
                if let Err(why) = watch.goes_on(left) {
                    break why;
                }
            }
            Err(_) if guest.vmm.has_ended() => return,
            Err(error) => break error.one_line(),
        }
    };
    tracing::error!(
        sandbox = %guest.sandbox,
        "the guest is stopped before it has written everything back: {why}; {}",
        watch.lost()
    );
}

/// Waits until a process that was killed is gone, or the VM is. The error is why there is nothing
/// to wait for.
pub async fn killed(
    guest: &Guest,
    patience: Duration,
    is_gone: impl Fn() -> bool,
) -> Result<(), String> {
    let mut watch = Watch::new(patience);
    loop {
        tokio::time::sleep(LOOK).await;
        if is_gone() || guest.is_ending() {
            return Ok(());
        }
        match guest.agent.unwritten().await {
            Ok(left) => watch.goes_on(left)?,
            Err(_) if guest.is_ending() => return Ok(()),
            Err(error) => return Err(error.one_line()),
        }
    }
}

/// What was left at last, the least that it was, and since when.
struct Watch {
    patience: Duration,
    begun: Instant,
    last: Option<Unwritten>,
    least: Option<Unwritten>,
    since: Instant,
}

impl Watch {
    fn new(patience: Duration) -> Self {
        let now = Instant::now();
        Self {
            patience,
            begun: now,
            last: None,
            least: None,
            since: now,
        }
    }

    /// Whether there is reason to wait on; why not, if there is none.
    fn goes_on(&mut self, left: Unwritten) -> Result<(), String> {
        self.last = Some(left);
        let less = self.least.is_none_or(|least| {
            left.dirty_bytes < least.dirty_bytes || left.containers < least.containers
        });
        if less {
            let least = self.least.unwrap_or(left);
            self.least = Some(Unwritten {
                dirty_bytes: left.dirty_bytes.min(least.dirty_bytes),
                containers: left.containers.min(least.containers),
            });
            self.since = Instant::now();
        }
        if self.since.elapsed() >= self.patience {
            return Err(format!(
                "what is left to write was not less for {:?}",
                self.patience
            ));
        }
        if self.begun.elapsed() >= LIMIT {
            return Err(format!("it was not done after {LIMIT:?}"));
        }
        Ok(())
    }

    /// What is lost if nothing more is waited for.
    fn lost(&self) -> String {
        match self.last {
            Some(left) => format!(
                "{} bytes are lost, {} of its containers had processes",
                left.dirty_bytes, left.containers
            ),
            None => "how many bytes are lost is not known".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(dirty_bytes: u64, containers: u32) -> Unwritten {
        Unwritten {
            dirty_bytes,
            containers,
        }
    }

    #[test]
    fn a_guest_is_waited_for_while_less_and_less_is_left() {
        let mut watch = Watch::new(PATIENCE);
        assert!(watch.lost().contains("not known"));
        assert_eq!(watch.goes_on(left(100, 2)), Ok(()));
        for (now, goes_on) in [
            (left(100, 1), true), // a container less
            (left(90, 1), true),
            (left(95, 1), false),
            (left(90, 1), false), // it was as little before
            (left(89, 2), true),
            (left(89, 1), false),
            (left(89, 0), true),
        ] {
            watch.since = Instant::now().checked_sub(PATIENCE).unwrap();
            assert_eq!(watch.goes_on(now).is_ok(), goes_on, "{now:?}");
        }
        assert!(watch.lost().starts_with("89 bytes are lost, 0 of"));
        watch.begun = Instant::now().checked_sub(LIMIT).unwrap();
        let why = watch.goes_on(left(1, 0)).unwrap_err();
        assert_eq!(why, "it was not done after 240s");
    }
}
