//! The pod from inside: its containers by name, and what they share.
//!
//! Called by `service.rs`, once for each call of the host. A name is taken from the begin of a
//! create to the end of the delete. No lock is held over a wait.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use kata_like_failure::{Failure, Kind, Step, one_line};
use kata_like_linux::lock;
use oci_spec::runtime::LinuxNamespaceType;
use rustix::system::{sethostname, uname};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::container::{Container, Surroundings};
use crate::deadline::blocking;
use crate::device;
use crate::disks;
use crate::events::{Event, Events};
use crate::forward;
use crate::resolver;
use crate::runner::Joined;
use crate::spec::Creation;
use crate::stdio::port::{StreamPort, Token};
use crate::storage::{self, VolumeHolders};
use crate::write_back;

/// The largest lead of the guest's clock that we accept, in nanoseconds. At boot the request may be
/// up to 1 s old; after a step of the host's clock it is fresh.
const AHEAD_AT_START: i128 = 1_000_000_000;
const AHEAD: i128 = 2_000_000;

/// How long a call of Shutdown waits for the end.
const END_WAIT: Duration = Duration::from_millis(500);

/// The containers of the one pod of this machine.
pub struct Pod {
    containers: Mutex<HashMap<String, Arc<Container>>>,
    around: Arc<Surroundings>,
    dialled_at_ns: i64,
    started: AtomicBool,
    /// Whether the end is done. `None`: nobody has asked for it.
    ending: OnceLock<watch::Receiver<bool>>,
}

/// What the host does not have yet of what containers have written.
pub struct Unwritten {
    /// In whole pages, of all containers.
    pub dirty_bytes: u64,
    /// How many containers still have processes.
    pub containers: usize,
}

/// What a pod's start gives.
pub struct Started {
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// When the agent dialled the host: CLOCK_BOOTTIME in nanoseconds.
    pub dialled_at_ns: i64,
}

impl Pod {
    /// An empty pod. Must be called on the runtime.
    pub fn new(streams: StreamPort, dialled_at_ns: i64) -> Self {
        let around = Surroundings {
            events: Events::default(),
            tokens: streams.serve(),
            volumes: VolumeHolders::default(),
        };
        Self {
            containers: Mutex::new(HashMap::new()),
            around: Arc::new(around),
            dialled_at_ns,
            started: AtomicBool::new(false),
            ending: OnceLock::new(),
        }
    }

    /// Sets the clock and the host name, and mounts the shares. A pod without shares can only
    /// start.
    pub async fn start(&self, host_time_ns: i64, hostname: &str) -> Result<Started, Failure> {
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(Failure::wrong_state("the pod", "started", "new"));
        }
        set_clock(host_time_ns, AHEAD_AT_START)?;
        if !hostname.is_empty() {
            let what = format!("take the host's name {hostname:?}");
            sethostname(hostname.as_bytes()).step(|| what)?;
        }
        let missing = blocking("mount the pod's shares", storage::mount_shares).await?;
        for tag in missing {
            log::warn!("the share {tag} is missing: no container can be created");
        }
        Ok(Started {
            kernel_release: uname().release().to_string_lossy().into_owned(),
            dialled_at_ns: self.dialled_at_ns,
        })
    }

    /// The first `most` events after the `received` first ones; see [`Events::after`].
    pub async fn events_after(
        &self,
        received: u64,
        most: usize,
        patience: Duration,
    ) -> Result<Vec<Event>, Failure> {
        self.around.events.after(received, most, patience).await
    }

    /// Follows a step of the host's clock, in either direction.
    pub fn set_time(&self, host_time_ns: i64) -> Result<(), Failure> {
        set_clock(host_time_ns, AHEAD)
    }

    /// Joins a port of the guest's loopback to the stream with this token.
    pub async fn connect(&self, port: u16, token: Token) -> Result<(), Failure> {
        forward::connect(&self.around.tokens, port, token).await
    }

    /// Serves names at this address. The host passes the questions on to its own server.
    pub async fn serve_names(&self, address: IpAddr) -> Result<(), Failure> {
        resolver::serve(address, self.around.clone()).await
    }

    /// Makes a container up to its first instruction. Returns its init's pid.
    pub async fn create(&self, name: &str, mut creation: Creation) -> Result<u32, Failure> {
        if !self.started.load(Ordering::Relaxed) {
            return Err(Failure::wrong_state("the pod", "new", "started"));
        }
        self.around.events.have_room()?;
        disks::renumber(&mut creation.spec, &creation.disks, device::disk)?;
        let mut joins = creation.joins.iter();
        let users = joins.find(|(kind, _)| *kind == LinuxNamespaceType::User);
        if let Some((_, owner)) = users.cloned() {
            creation.take_users(&owner, self.container(&owner)?.made_of())?;
        }
        let memory_volumes = creation.memory_volumes.clone();
        let around = self.around.clone();
        let container = Arc::new(Container::new(name.into(), creation, around));
        let joined = self.join(&container).await?;
        {
            let mut containers = self.containers();
            if containers.contains_key(name) {
                let text = format!("container {name} exists already");
                return Err(Failure::new(Kind::AlreadyExists, text));
            }
            containers.insert(name.into(), container.clone());
        }
        let result = async {
            if !memory_volumes.is_empty() {
                let make = move || storage::make_memory_volumes(&memory_volumes);
                blocking("make the pod's volumes in memory", make).await?;
            }
            container.create(joined).await
        };
        let result = result.await;
        if result.is_err() {
            self.containers().remove(name);
        }
        result
    }

    async fn join(&self, container: &Container) -> Result<Vec<Joined>, Failure> {
        let mut joined = Vec::new();
        for (kind, name) in container.joins() {
            let kind = *kind;
            let namespace = self.container(name)?.namespace(kind).await?;
            joined.push(Joined { kind, namespace });
        }
        Ok(joined)
    }

    /// Finds a container by its name.
    pub fn container(&self, name: &str) -> Result<Arc<Container>, Failure> {
        let container = self.containers().get(name).cloned();
        container.ok_or_else(|| Failure::new(Kind::NotFound, format!("no container {name}")))
    }

    /// Deletes a container and all that it holds.
    pub async fn delete(&self, name: &str) -> Result<(), Failure> {
        let container = self.container(name)?;
        container.delete().await?;
        // A create that failed has freed the name, and another container may have it by now.
        let mut containers = self.containers();
        if containers
            .get(name)
            .is_some_and(|now| Arc::ptr_eq(now, &container))
        {
            containers.remove(name);
        }
        Ok(())
    }

    /// Ends all containers, so that the host has what they have written, and waits a moment.
    /// Returns whether that is done. Nothing is unmounted: that goes with the machine.
    pub async fn end(&self) -> bool {
        let mut done = self.ending.get_or_init(|| self.begin_end()).clone();
        // The sender is dropped once it has said so.
        timeout(END_WAIT, done.wait_for(|done| *done)).await.is_ok()
    }

    /// Counts what the host does not have yet of what containers have written.
    pub fn unwritten(&self) -> Unwritten {
        let dirty_bytes = write_back::dirty_bytes().unwrap_or_else(|error| {
            log::warn!("ask how much is dirty: {error}");
            0
        });
        let all: Vec<_> = self.containers().values().cloned().collect();
        Unwritten {
            dirty_bytes,
            containers: all
                .iter()
                .filter(|container| container.has_processes())
                .count(),
        }
    }

    /// Has no deadline of its own: the host asks how much is left, and has one.
    fn begin_end(&self) -> watch::Receiver<bool> {
        let (tell, done) = watch::channel(false);
        let all: Vec<_> = self.containers().values().cloned().collect();
        tokio::spawn(async move {
            let ends = all.iter().map(|container| container.end());
            for result in futures::future::join_all(ends).await {
                if let Err(error) = result {
                    log::warn!("end the pod: {}", one_line(&error));
                }
            }
            if let Err(error) = write_back::write_back().await {
                log::warn!("end the pod: {}", one_line(&error));
            }
            tell.send_replace(true);
        });
        done
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        // Held for single operations only. None of them leaves it half done.
        lock(&self.containers)
    }
}

/// Sets CLOCK_REALTIME to the host's time, unless it is right.
fn set_clock(host_time_ns: i64, ahead: i128) -> Result<(), Failure> {
    let now = clock_gettime(ClockId::Realtime);
    let now = i128::from(now.tv_sec) * 1_000_000_000 + i128::from(now.tv_nsec);
    if is_right(now, host_time_ns, ahead) {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: host_time_ns.div_euclid(1_000_000_000),
        tv_nsec: host_time_ns.rem_euclid(1_000_000_000),
    };
    clock_settime(ClockId::Realtime, time).step(|| format!("set the clock to {host_time_ns} ns"))
}

/// Time has passed since the host wrote its time. So a clock behind that time is wrong, and a clock
/// not far ahead of it may be right.
fn is_right(now: i128, host_time_ns: i64, ahead: i128) -> bool {
    (0..ahead).contains(&(now - i128::from(host_time_ns)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_follows_the_host_in_both_directions() {
        const HOUR: i128 = 3_600_000_000_000;
        let host = 1_700_000_000_000_000_000;
        let now = i128::from(host);
        for (now, right) in [
            (now, true),
            (now + 1_000_000, true),
            (now + 3_000_000, false),
            (now - 1, false),
            (now - HOUR, false),
            (now + HOUR, false),
        ] {
            assert_eq!(is_right(now, host, AHEAD), right, "{now}");
        }
        assert!(is_right(now + 900_000_000, host, AHEAD_AT_START));
        assert!(!is_right(now, i64::MAX, AHEAD));
        assert!(!is_right(now, i64::MIN, AHEAD));
    }
}
