//! Steps that build on one another, and the way back.
//!
//! A pod's sandbox and a container are each made by a list of steps ([`Build`]). What a step has
//! made it hands to [`Undo`] at once, so nothing is left when a later step fails, and the end takes
//! the same way as a failure: in reverse order.
//!
//! Before and after each step and before each way back is a [`point`] at which tests make the shim
//! fail, if it was built for that.

use std::fmt::{self, Display};
use std::future::Future;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use kata_like_failure::{Failure, Kind};
use kata_like_linux::lock;

#[cfg(feature = "fail-points")]
mod fail_points;
#[cfg(feature = "fail-points")]
pub use fail_points::point;

/// Nothing: this build has no fail points.
#[cfg(not(feature = "fail-points"))]
pub fn point(_moment: &str, _step: impl Display) -> std::future::Ready<Result<(), Failure>> {
    std::future::ready(Ok(()))
}

/// Something that is made step by step.
pub trait Build {
    /// One of the steps. Its text names it in logs and errors.
    type Step: Copy + Display + Send + Sync + 'static;

    /// All steps in their order.
    fn order(&self) -> &'static [Self::Step];

    /// Does one step, and hands each thing that it makes to `undo` before it goes on.
    fn make(
        &mut self,
        step: Self::Step,
        undo: &Undo,
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// Does all steps. When one fails, undoes what was made, and answers the failure.
pub async fn build<B: Build>(builder: &mut B, undo: &Undo) -> (Times, Result<(), Failure>) {
    let mut times = Times::new();
    for &step in builder.order() {
        if let Err(error) = one(builder, step, undo).await {
            times.failed = times.last.elapsed();
            undo.run().await;
            return (times, Err(error));
        }
        times.done(step.to_string());
    }
    (times, Ok(()))
}

async fn one<B: Build>(builder: &mut B, step: B::Step, undo: &Undo) -> Result<(), Failure> {
    point("before", step).await?;
    builder.make(step, undo).await?;
    point("after", step).await
}

/// What steps have made, each with the way to undo it. Dropped, it drops what it holds.
pub struct Undo(Mutex<Option<Vec<BoxFuture<'static, ()>>>>);

impl Default for Undo {
    fn default() -> Self {
        Self(Mutex::new(Some(Vec::new())))
    }
}

impl fmt::Debug for Undo {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        to.write_str("Undo")
    }
}

impl Undo {
    /// Keeps the way to undo something. If all has been undone meanwhile, undoes it now and fails.
    pub async fn push(
        &self,
        undo: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), Failure> {
        let undo: BoxFuture<'static, ()> = Box::pin(undo);
        let too_late = {
            let mut stack = self.stack();
            match stack.as_mut() {
                Some(stack) => {
                    stack.push(undo);
                    None
                }
                None => Some(undo),
            }
        };
        let Some(undo) = too_late else {
            return Ok(());
        };
        undo.await;
        Err(Failure::new(Kind::NotFound, "it was deleted meanwhile"))
    }

    /// The place that [`back_to`](Self::back_to) leads back to.
    pub fn mark(&self) -> usize {
        self.stack().as_ref().map_or(0, Vec::len)
    }

    /// Undoes in reverse order what was pushed since `mark`.
    pub async fn back_to(&self, mark: usize) {
        loop {
            let last = {
                let mut stack = self.stack();
                match stack.as_mut() {
                    Some(stack) if stack.len() > mark => stack.pop(),
                    _ => None,
                }
            };
            match last {
                Some(undo) => way_back(undo).await,
                None => return,
            }
        }
    }

    /// Undoes everything in reverse order. Nothing can be pushed from now on.
    pub async fn run(&self) {
        let stack = self.stack().take();
        for undo in stack.into_iter().flatten().rev() {
            way_back(undo).await;
        }
    }

    /// Whether [`run`](Self::run) was called.
    pub fn is_undone(&self) -> bool {
        self.stack().is_none()
    }

    fn stack(&self) -> MutexGuard<'_, Option<Vec<BoxFuture<'static, ()>>>> {
        lock(&self.0)
    }
}

/// Undoes one thing. That can't fail, so neither can its point.
async fn way_back(undo: BoxFuture<'static, ()>) {
    let _ = point("before", "undo").await;
    undo.await;
}

/// The steps that were done, and how long each took.
#[derive(Debug)]
pub struct Times {
    begin: Instant,
    last: Instant,
    failed: Duration,
    done: Vec<(String, Duration)>,
}

impl Times {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            begin: now,
            last: now,
            failed: Duration::ZERO,
            done: Vec::new(),
        }
    }

    fn done(&mut self, step: String) {
        let now = Instant::now();
        self.done.push((step, now - self.last));
        self.last = now;
    }

    /// How long all steps took.
    pub fn total(&self) -> Duration {
        self.last - self.begin
    }

    /// How long the failed step took, and which steps were done before it.
    pub fn failure(&self) -> String {
        let failed = self.failed.as_millis();
        match self.done.is_empty() {
            true => format!("failed after {failed} ms"),
            false => format!("failed after {failed} ms; done before: {self}"),
        }
    }
}

impl Display for Times {
    fn fmt(&self, to: &mut fmt::Formatter) -> fmt::Result {
        for (index, (step, took)) in self.done.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(to, "{comma}{step} {} ms", took.as_millis())?;
        }
        Ok(())
    }
}

/// Runs blocking work where it may block.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| Err(Failure::failed("wait for a blocking step", panic)))
}

#[cfg(test)]
pub mod tests {
    use std::sync::Arc;

    use super::*;

    /// Stands in for the steps of a real list: it writes down what it makes and undoes.
    struct Recorder<S: 'static> {
        order: &'static [S],
        fails: Option<usize>,
        begun: usize,
        log: Arc<Mutex<Vec<String>>>,
    }

    impl<S: Copy + Display + Send + Sync> Build for Recorder<S> {
        type Step = S;

        fn order(&self) -> &'static [S] {
            self.order
        }

        async fn make(&mut self, step: S, undo: &Undo) -> Result<(), Failure> {
            self.log.lock().unwrap().push(step.to_string());
            let (log, name) = (Arc::clone(&self.log), step.to_string());
            undo.push(async move { log.lock().unwrap().push(format!("undo {name}")) })
                .await?;
            let number = self.begun;
            self.begun += 1;
            match self.fails == Some(number) {
                true => Err(Failure::new(Kind::Failed, format!("{step} failed"))),
                false => Ok(()),
            }
        }
    }

    /// Runs a real list with each of its steps failing in turn, after it has made something: what
    /// was made is undone in reverse, once, and no later step begins. `wanted` is the list.
    pub async fn check<S: Copy + Display + Send + Sync>(order: &'static [S], wanted: &[&str]) {
        let names: Vec<_> = order.iter().map(ToString::to_string).collect();
        assert_eq!(names, wanted);
        for fails in (0..order.len()).map(Some).chain([None]) {
            let log = Arc::default();
            let undo = Undo::default();
            let mut recorder = Recorder {
                order,
                fails,
                begun: 0,
                log: Arc::clone(&log),
            };
            let (times, built) = build(&mut recorder, &undo).await;
            let begun = fails.map_or(order.len(), |number| number + 1);
            match (fails, built) {
                (Some(number), Err(error)) => {
                    assert_eq!(error.to_string(), format!("{} failed", names[number]));
                    assert!(times.failure().starts_with("failed after "));
                    assert!(undo.is_undone());
                }
                (None, Ok(())) => {
                    assert_eq!(log.lock().unwrap().len(), order.len(), "nothing is undone");
                    undo.run().await;
                }
                other => panic!("{other:?}"),
            }
            let undone = names[..begun].iter().rev();
            let undone = undone.map(|name| format!("undo {name}"));
            let all: Vec<_> = names[..begun].iter().cloned().chain(undone).collect();
            assert_eq!(*log.lock().unwrap(), all);
            undo.run().await;
            assert_eq!(log.lock().unwrap().len(), all.len(), "undone once");
        }
    }

    #[tokio::test]
    async fn the_way_back_can_be_gone_in_two_parts() {
        let (undo, log) = (Undo::default(), Arc::new(Mutex::new(Vec::new())));
        let push = async |name: &'static str| {
            let log = Arc::clone(&log);
            undo.push(async move { log.lock().unwrap().push(name) })
                .await
        };
        push("a").await.unwrap();
        let mark = undo.mark();
        push("b").await.unwrap();
        push("c").await.unwrap();
        undo.back_to(mark).await;
        assert_eq!(*log.lock().unwrap(), ["c", "b"]);
        undo.run().await;
        assert_eq!(*log.lock().unwrap(), ["c", "b", "a"]);
        // What comes too late does not stay.
        let late = push("d").await.unwrap_err();
        assert_eq!(late.to_string(), "it was deleted meanwhile");
        assert_eq!(log.lock().unwrap().last(), Some(&"d"));
    }
}
