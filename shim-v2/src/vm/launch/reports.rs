//! What a VMM reports, followed to its end.
//!
//! Called by `vmm`. An answer goes to the one who asked first. What a VMM says may be the guest's
//! word by now: lines are cleaned and cut.

use std::collections::VecDeque;
use std::sync::Mutex;

use kata_like_boot::{ChannelError, End, EndReason, Figures, VmReport};
use kata_like_linux::watch::Watched;
use tokio::sync::{oneshot, watch};

use super::child::{Control, clean, last_act, next};
use super::guest_log::GuestLog;
use crate::spawn::Child;
use kata_like_failure::one_line;
use kata_like_linux::lock;

/// As many lines of the guest's log go into an error.
const TAIL_IN_ERROR: usize = 3;

/// How far a VM has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Running,
    Connected(Figures),
}

/// Who waits for an answer of the VMM, in the order of the commands.
pub(super) type Pending = Mutex<VecDeque<oneshot::Sender<VmReport>>>;

/// Why a VMM ended.
#[derive(Debug)]
pub(super) struct VmmEnd {
    pub(super) why: String,
    /// Whether more memory might have prevented it.
    pub(super) for_memory: bool,
    /// Whether the line has the guest log's last lines.
    pub(super) has_log: bool,
}

/// Follows a VMM's reports to its end, and tells why it ended.
pub(super) async fn follow(
    control: &Watched<Control>,
    pending: &Pending,
    phase: &watch::Sender<Phase>,
    log: &GuestLog,
    child: &Child,
) -> VmmEnd {
    let mut last = None;
    let broken = loop {
        match next::<VmReport>(control).await {
            Ok(VmReport::Running) => {
                phase.send_replace(Phase::Running);
            }
            Ok(VmReport::AgentConnected(figures)) => {
                phase.send_replace(Phase::Connected(figures));
            }
            Ok(VmReport::Ended(end)) => {
                log.append(&end.log);
                last = Some(end);
            }
            Ok(answer) => {
                // Here and not where it was asked for: who asked may be gone.
                if let VmReport::Log { text, .. } = &answer {
                    log.append(text);
                }
                let waiting = lock(pending).pop_front();
                if let Some(waiting) = waiting {
                    let _ = waiting.send(answer);
                }
            }
            Err(ChannelError::Closed) => break None,
            Err(error) => {
                // What can't be understood is not obeyed further.
                child.kill();
                break Some(one_line(&error));
            }
        }
    };
    let exit = last_act(child).await;
    let why = match (last, broken) {
        (Some(end), _) => return reason(&end),
        (None, Some(broken)) => format!("the VMM sent what can't be read: {}", clean(&broken)),
        (None, None) => format!("the VMM {exit}, without a reason"),
    };
    VmmEnd {
        why,
        for_memory: false,
        has_log: false,
    }
}

/// The reason of an end, with the last lines of the guest's log; all of them go to the shim's log.
fn reason(end: &End) -> VmmEnd {
    if end.reason == EndReason::Stopped {
        return VmmEnd {
            why: clean(&end.detail),
            for_memory: false,
            has_log: false,
        };
    }
    for line in end.log_tail.iter().take(200) {
        tracing::warn!("guest: {}", clean(line));
    }
    let log = in_error(&end.log_tail);
    VmmEnd {
        why: format!("{}{log}", clean(&end.detail)),
        for_memory: end.reason.is_for_memory(),
        has_log: !log.is_empty(),
    }
}

pub(super) fn in_error(tail: &[String]) -> String {
    let from = tail.len().saturating_sub(TAIL_IN_ERROR);
    match tail.get(from..) {
        None | Some([]) => String::new(),
        Some(lines) => {
            let lines: Vec<String> = lines.iter().map(|line| clean(line)).collect();
            format!("; the guest's log ends with: {}", lines.join(" | "))
        }
    }
}
