//! A container's stats within a second, however its guest is.
//!
//! containerd asks one task after the other, with no limit of its own: a guest that is late with
//! its figures would hold up those of the whole node. So a call to the guest goes on by itself, one
//! at most for a container, and a caller that can't wait for it gets the last figures.

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;
use kata_like_proxy::Stats as Figures;
use tokio::sync::watch;
use tokio::time::timeout;

/// What is known of a container's figures.
#[derive(Debug, Default)]
pub(super) struct Stats(Mutex<Known>);

#[derive(Default)]
struct Known {
    last: Option<Arc<Figures>>,
    asking: Option<Asking>,
}

impl fmt::Debug for Known {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str("Known")
    }
}

/// A call to the guest.
struct Asking {
    since: Instant,
    answer: watch::Receiver<Option<Answer>>,
}

type Answer = Result<Arc<Figures>, Arc<Failure>>;

impl Stats {
    /// The guest's answer if it is there within `limit`, or else the last one that was good. `ask`
    /// is the call, which is made if none is under way.
    pub(super) async fn within<F>(
        &self,
        limit: Duration,
        ask: impl FnOnce() -> F,
    ) -> Option<Result<Arc<Figures>, Failure>>
    where
        F: Future<Output = Result<Figures, Failure>> + Send + 'static,
    {
        let (mut answer, since) = {
            let mut known = lock(&self.0);
            known.take_answer();
            let asking = known.asking.get_or_insert_with(|| Asking::begin(ask()));
            (asking.answer.clone(), asking.since)
        };
        let left = limit.saturating_sub(since.elapsed());
        let answered = match timeout(left, answer.wait_for(Option::is_some)).await {
            Ok(Ok(answer)) => answer.clone(),
            // Late, or the call has panicked.
            _ => None,
        };
        let mut known = lock(&self.0);
        known.take_answer();
        match answered {
            Some(Ok(stats)) => Some(Ok(stats)),
            Some(Err(error)) if error.kind() != Kind::DeadlineExceeded => {
                Some(Err(Failure::new(error.kind(), error.one_line())))
            }
            _ => known.last.clone().map(Ok),
        }
    }
}

impl Known {
    /// Forgets a call that has ended, and keeps its answer if it is a good one.
    fn take_answer(&mut self) {
        let Some(asking) = &self.asking else {
            return;
        };
        let answer = asking.answer.borrow().clone();
        let over = asking.answer.has_changed().is_err();
        if let Some(Ok(stats)) = &answer {
            self.last = Some(Arc::clone(stats));
        }
        if answer.is_some() || over {
            self.asking = None;
        }
    }
}

impl Asking {
    fn begin(call: impl Future<Output = Result<Figures, Failure>> + Send + 'static) -> Self {
        let (tell, answer) = watch::channel(None);
        tokio::spawn(async move {
            let answer = call.await.map(Arc::new).map_err(Arc::new);
            tell.send_replace(Some(answer));
        });
        Self {
            since: Instant::now(),
            answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn figures(memory_usage: u64) -> Figures {
        Figures {
            memory_usage,
            ..Default::default()
        }
    }

    fn usage(answer: Option<Result<Arc<Figures>, Failure>>) -> Option<u64> {
        answer.map(|answer| answer.unwrap().memory_usage)
    }

    const LIMIT: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn a_late_guest_s_last_figures_are_given_at_once() {
        let (stats, calls) = (Stats::default(), Arc::new(AtomicU32::new(0)));
        let (answer, answered) = watch::channel(false);
        let ask = |usage: u64| {
            let (calls, mut answered) = (Arc::clone(&calls), answered.clone());
            move || async move {
                calls.fetch_add(1, Ordering::SeqCst);
                answered.wait_for(|it| *it).await.unwrap();
                Ok(figures(usage))
            }
        };
        assert!(stats.within(LIMIT, ask(1)).await.is_none(), "none yet");
        // The call is under way, and known to be late: nobody waits for it again.
        let begin = Instant::now();
        for _ in 0..50 {
            assert!(stats.within(LIMIT, ask(2)).await.is_none());
        }
        assert!(begin.elapsed() < LIMIT * 10, "{:?}", begin.elapsed());
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        // Its answer is kept for the next one who can't wait.
        answer.send_replace(true);
        until_answered(&stats).await;
        answer.send_replace(false);
        assert_eq!(usage(stats.within(LIMIT, ask(3)).await), Some(1));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        answer.send_replace(true);
        until_answered(&stats).await;
        let now = stats.within(Duration::from_secs(60), ask(4)).await;
        assert_eq!(usage(now), Some(4));
    }

    async fn until_answered(stats: &Stats) {
        let answer = lock(&stats.0).asking.as_ref().map(|it| it.answer.clone());
        let answered = answer.unwrap().wait_for(Option::is_some).await.is_ok();
        assert!(answered);
    }

    #[tokio::test]
    async fn what_the_guest_refuses_is_told() {
        const LONG: Duration = Duration::from_secs(60);
        let stats = Stats::default();
        let good = || async { Ok(figures(5)) };
        assert_eq!(usage(stats.within(LONG, good).await), Some(5));
        let none = || async { Err(Failure::new(Kind::NotFound, "no such container")) };
        let refused = stats.within(LONG, none).await.unwrap().unwrap_err();
        assert_eq!(refused.kind(), Kind::NotFound);
        assert_eq!(refused.one_line(), "no such container");
        // A guest that is late, and a call that breaks down.
        let late = || async { Err(Failure::new(Kind::DeadlineExceeded, "late")) };
        assert_eq!(usage(stats.within(LONG, late).await), Some(5));
        let breaks = || async { panic!("the call") };
        assert_eq!(usage(stats.within(LONG, breaks).await), Some(5));
        assert_eq!(usage(stats.within(LONG, good).await), Some(5));
    }
}
