//! Steps that may block, and how long they may take.

use std::error::Error;
use std::time::Duration;

use kata_like_failure::{Failure, Step};
use tokio::time::timeout;

/// How long a step may block. A file system of the host's can be slow or stand still, and many
/// guests that start at once share the host's CPUs. The host waits longer than this for the whole
/// call, but gives up earlier on a guest that makes no progress.
pub const BLOCKING_DEADLINE: Duration = Duration::from_secs(240);

/// Runs `work`, which may block, on a thread of its own. Past the deadline the thread goes on, and
/// nobody waits for it.
pub async fn blocking<T, E>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Failure>
where
    T: Send + 'static,
    E: Into<Box<dyn Error + Send + Sync>> + Send + 'static,
{
    match timeout(BLOCKING_DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result.step(|| step),
        // It was cancelled: a panic would have ended the machine.
        Ok(Err(error)) => Err(Failure::failed(step, error)),
        Err(_) => Err(Failure::late(step, BLOCKING_DEADLINE)),
    }
}
