//! containerd's events, as `ctr events` prints them, each with the moment it arrived.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::{Patience, TestResult, failure};

/// One event.
#[derive(Clone, Debug)]
pub struct Event {
    /// `/tasks/exit` and so on.
    pub topic: String,
    /// The fields of the event.
    pub fields: Value,
    /// When its line was read.
    pub at: Instant,
}

impl Event {
    /// The container that it is about.
    pub fn container(&self) -> &str {
        self.fields["container_id"].as_str().unwrap_or_default()
    }

    /// The process that it is about: the container's id or an exec's.
    pub fn process(&self) -> &str {
        self.fields["id"]
            .as_str()
            .or(self.fields["exec_id"].as_str())
            .unwrap_or_default()
    }

    /// The exit status; the field is left out when it is 0.
    pub fn status(&self) -> u64 {
        self.fields["exit_status"].as_u64().unwrap_or(0)
    }
}

#[derive(Default)]
struct Seen {
    events: Mutex<Vec<Event>>,
    news: Condvar,
}

/// A running `ctr events`.
pub struct Events {
    child: Child,
    seen: Arc<Seen>,
}

impl Events {
    /// Starts listening. Events before this are not seen.
    pub fn listen(mut ctr: Command) -> TestResult<Self> {
        let mut child = ctr
            .arg("events")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let seen = Arc::new(Seen::default());
        let stdout = child
            .stdout
            .take()
            .ok_or_else(|| failure("no output of ctr events"))?;
        let shared = Arc::clone(&seen);
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(event) = parse(&line) {
                    shared
                        .events
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(event);
                    shared.news.notify_all();
                }
            }
        });
        Ok(Self { child, seen })
    }

    /// All events so far that are about a container, in order of arrival.
    pub fn of(&self, container: &str) -> Vec<Event> {
        let events = self
            .seen
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        events
            .iter()
            .filter(|event| event.container() == container)
            .cloned()
            .collect()
    }

    /// Waits for the first event that fits.
    pub fn wait(
        &self,
        what: &str,
        deadline: Duration,
        fits: impl Fn(&Event) -> bool,
    ) -> TestResult<Event> {
        let patience = Patience::new(deadline);
        let mut events = self
            .seen
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(event) = events.iter().find(|event| fits(event)) {
                return Ok(event.clone());
            }
            let left = patience.left();
            if left.is_zero() {
                let topics: Vec<_> = events
                    .iter()
                    .map(|event| (&event.topic, event.container()))
                    .collect();
                return Err(failure(format!(
                    "no {what} within {deadline:?}; seen: {topics:?}"
                )));
            }
            events = self
                .seen
                .news
                .wait_timeout(events, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the exit event of a container's init, or of an exec of it.
    pub fn exit(&self, container: &str, process: &str, deadline: Duration) -> TestResult<Event> {
        self.wait(
            &format!("exit of {process} in {container}"),
            deadline,
            |event| {
                event.topic == "/tasks/exit"
                    && event.container() == container
                    && event.process() == process
            },
        )
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `DATE TIME ZONE ZONE NAMESPACE TOPIC {json}`
fn parse(line: &str) -> Option<Event> {
    let at = Instant::now();
    let (head, _) = line.split_once(" {")?;
    let json = &line[head.len() + 1..];
    let topic = head.split_whitespace().last()?.to_owned();
    Some(Event {
        topic,
        fields: serde_json::from_str(json).ok()?,
        at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_ctr_becomes_an_event() {
        let event = parse(
            r#"2026-11-24 03:05:50.1 +0000 UTC default /tasks/exit {"container_id":"a","id":"b","exit_status":137}"#,
        )
        .unwrap();
        assert_eq!(
            (
                event.topic.as_str(),
                event.container(),
                event.process(),
                event.status()
            ),
            ("/tasks/exit", "a", "b", 137)
        );
    }
}
