//! The VMM, the fs server and the proxy: started with open descriptors, and watched.
//!
//! Called by `machine`. Each child is born in the pod's cgroup with one socket, descriptor 3; all
//! it is to use comes over that socket (`kata_like_boot`), opened here, so a missing file or a lack
//! of permission is found and told before anything runs. A child that ends closes its socket and
//! makes its pidfd readable; what it said last, or how it ended, is the reason that [`Vmm::ended`],
//! [`Fsd::ended`] and [`Proxy::ended`] give. Dropped, a child is killed.

use std::time::Duration;

mod child;
mod fsd;
mod guest_log;
mod parts;
mod proxy;
mod reports;
mod vmm;

pub use fsd::{Fsd, FsdEnd};
pub use parts::{Parts, Place};
pub use proxy::Proxy;
pub use vmm::{DiskFile, Resources, Vmm, log_figures};

/// How long one child's end may take to follow the other's that caused it.
const CONSEQUENCE: Duration = Duration::from_millis(500);
/// How long an end may take to be seen that came together with another's.
const AT_ONCE: Duration = Duration::from_millis(200);

/// Waits until the VMM or the fs server has ended. Each ends when the other does: the answer is the
/// cause, not the consequence.
pub async fn either_ended(
    vmm: impl Future<Output = String>,
    fsd: impl Future<Output = FsdEnd>,
) -> String {
    tokio::pin!(vmm, fsd);
    tokio::select! {
        why = &mut vmm => match tokio::time::timeout(CONSEQUENCE, fsd).await {
            Ok(end) if !end.expected => end.why,
            _ => why,
        },
        end = &mut fsd => match end.expected {
            false => end.why,
            true => tokio::time::timeout(CONSEQUENCE, vmm).await.unwrap_or(end.why),
        },
    }
}

/// Waits until any of the three has ended, and answers the cause: see [`either_ended`]. The proxy
/// ends by nobody else's end.
pub async fn any_ended(
    vmm: impl Future<Output = String>,
    fsd: impl Future<Output = FsdEnd>,
    proxy: impl Future<Output = String>,
) -> String {
    let others = either_ended(vmm, fsd);
    tokio::pin!(others);
    tokio::select! {
        why = &mut others => why,
        // What takes all of them at once, as the OOM killer does, is known by the VMM's end.
        why = proxy => tokio::time::timeout(AT_ONCE, others).await.unwrap_or(why),
    }
}

#[cfg(test)]
mod tests;
