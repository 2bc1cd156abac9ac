//! How often somebody who may be hostile is asked for the next events.

use std::time::Duration;

use tokio::time::{Instant, sleep};

/// What each answer costs, and how much may be owed: 200 answers at once, then 50 a second.
const COST: Duration = Duration::from_millis(20);
const CREDIT: Duration = Duration::from_secs(4);

/// At once after a quiet time, and not faster than it can be handled for ever.
#[derive(Debug)]
pub struct Pace {
    /// Until when all answers so far have been paid for.
    paid: Instant,
}

impl Pace {
    /// Nothing is owed.
    #[allow(
        clippy::new_without_default,
        reason = "it begins at a time, which is no default"
    )]
    pub fn new() -> Self {
        Self {
            paid: Instant::now(),
        }
    }

    /// To be waited for before each question.
    pub async fn keep(&mut self) {
        let now = Instant::now();
        self.paid = self.paid.max(now) + COST;
        let owed = self.paid.duration_since(now);
        if let Some(wait) = owed.checked_sub(CREDIT) {
            sleep(wait).await;
        }
    }
}
