//! The pod from inside: its containers by name, and what they share.
//!
//! Called by `service.rs`, once for each call of the host. A name is taken from the moment that a
//! create begins until its delete is done. No lock is held while anything is waited for.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::system::uname;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::time::timeout;

use crate::container::{Container, Surroundings};
use crate::error::{PodError, blocking, one_line};
use crate::events::{Event, Events};
use crate::runner::Joined;
use crate::spec::GuestSpec;
use crate::stdio::Wanted;
use crate::stdio::port::StreamPort;
use crate::storage;

/// How far ahead of the host's clock ours may be before it is set back: the request has travelled.
const AHEAD: i128 = 1_000_000_000;

/// How long the end may take before the machine is reset all the same.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// The pod.
pub struct Pod {
    containers: Mutex<HashMap<String, Arc<Container>>>,
    around: Arc<Surroundings>,
    dialled_at_ns: i64,
    started: AtomicBool,
    listened_to: AtomicBool,
}

/// What a pod's start gives.
pub struct Started {
    /// The kernel's release.
    pub kernel_release: String,
    /// CLOCK_BOOTTIME in nanoseconds of the dial.
    pub dialled_at_ns: i64,
}

impl Pod {
    /// An empty pod. Must be called on the runtime.
    pub fn new(streams: StreamPort, dialled_at_ns: i64) -> Self {
        let around = Surroundings {
            events: Events::default(),
            tokens: streams.serve(),
        };
        Self {
            containers: Mutex::new(HashMap::new()),
            around: Arc::new(around),
            dialled_at_ns,
            started: AtomicBool::new(false),
            listened_to: AtomicBool::new(false),
        }
    }

    /// Sets the clock and mounts the shares. A pod without shares can only say that it is there.
    pub async fn start(&self, host_time_ns: i64) -> Result<Started, PodError> {
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(wrong_state("the pod", "started", "new"));
        }
        set_clock(host_time_ns)?;
        let missing = blocking("mount the pod's shares", storage::mount_shares).await?;
        for tag in missing {
            log::warn!("the share {tag} is missing: no container can be created");
        }
        Ok(Started {
            kernel_release: uname().release().to_string_lossy().into_owned(),
            dialled_at_ns: self.dialled_at_ns,
        })
    }

    /// Takes the one right to call [`Pod::next_event`].
    pub fn listen(&self) -> Result<(), PodError> {
        match self.listened_to.swap(true, Ordering::Relaxed) {
            true => Err(wrong_state("the stream of events", "open", "new")),
            false => Ok(()),
        }
    }

    /// The next event, in order.
    pub async fn next_event(&self) -> Event {
        self.around.events.next().await
    }

    /// Makes a container up to its first instruction; gives its init's pid.
    pub async fn create(&self, name: &str, spec: &[u8], wanted: Wanted) -> Result<u32, PodError> {
        if !self.started.load(Ordering::Relaxed) {
            return Err(wrong_state("the pod", "new", "started"));
        }
        let spec = GuestSpec::parse(spec)?;
        let container = Arc::new(Container::new(name.into(), spec, self.around.clone()));
        let joined = self.join(&container)?;
        {
            let mut containers = self.containers();
            if containers.contains_key(name) {
                let what = format!("container {name}");
                return Err(PodError::AlreadyExists { what });
            }
            containers.insert(name.into(), container.clone());
        }
        let result = container.create(joined, wanted).await;
        if result.is_err() {
            self.containers().remove(name);
        }
        result
    }

    fn join(&self, container: &Container) -> Result<Vec<Joined>, PodError> {
        let joined = container.joins().iter().map(|(kind, name)| {
            let namespace = self.container(name)?.namespace(*kind)?;
            let kind = *kind;
            Ok(Joined { kind, namespace })
        });
        joined.collect()
    }

    /// The container of this name.
    pub fn container(&self, name: &str) -> Result<Arc<Container>, PodError> {
        let container = self.containers().get(name).cloned();
        container.ok_or_else(|| PodError::NoSuchContainer {
            container: name.into(),
        })
    }

    /// Deletes a container with all it holds.
    pub async fn delete(&self, name: &str) -> Result<(), PodError> {
        let container = self.container(name)?;
        container.delete().await?;
        // A create that failed has taken its name away itself, and it may be another's by now.
        let mut containers = self.containers();
        if containers
            .get(name)
            .is_some_and(|now| Arc::ptr_eq(now, &container))
        {
            containers.remove(name);
        }
        Ok(())
    }

    /// Ends all containers, and gives the shares back. Does as much as it can in its time; the
    /// machine is reset after it in any case.
    pub async fn end(&self) {
        let names: Vec<String> = self.containers().keys().cloned().collect();
        let ending = async {
            for name in names {
                if let Err(error) = self.delete(&name).await {
                    log::warn!("end the pod: {}", one_line(&error));
                }
            }
            let unmount = || {
                rustix::fs::sync();
                storage::unmount_shares()
            };
            if let Err(error) = blocking("give the pod's shares back", unmount).await {
                log::warn!("end the pod: {}", one_line(&error));
            }
        };
        if timeout(END_DEADLINE, ending).await.is_err() {
            log::warn!("end the pod: not done after {END_DEADLINE:?}");
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        // Held for single operations only, none of which leaves it half done.
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn wrong_state(what: &str, state: &'static str, wanted: &'static str) -> PodError {
    let what = what.into();
    PodError::WrongState {
        what,
        state,
        wanted,
    }
}

/// Sets CLOCK_REALTIME by the host's. The host's time is at least what it says, for the request took
/// its way; so a clock behind it is wrong, and one ahead of it may well be right.
fn set_clock(host_time_ns: i64) -> Result<(), PodError> {
    let now = clock_gettime(ClockId::Realtime);
    let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    if (0..AHEAD).contains(&(now - i128::from(host_time_ns))) {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: host_time_ns.div_euclid(1_000_000_000),
        tv_nsec: host_time_ns.rem_euclid(1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time).map_err(PodError::failed(format!(
        "set the clock to {host_time_ns} ns"
    )))
}
