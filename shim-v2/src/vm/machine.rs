//! A VM's processes: VMM, fs server and proxy, started side by side and stopped together.
//!
//! Called by `pod` as it brings a pod up: [`Vm::start`], [`Vm::booted`], [`Vm::guest`],
//! [`Vm::follow`].

use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;

use kata_like_agent_protocol::{AGENT_PORT, STREAM_PORT};
use kata_like_boot::{CachePolicy, FsdBoot, FsdFds, FsdShare, VERSION, VmBoot, VmShare};
use kata_like_config::Config;
use kata_like_config::state::{StateError, StateFolder, name, proxy_uid};
use tokio::sync::mpsc;

use super::agent::{Agent, Event};
use super::guest::Guest;
use super::launch::{Fsd, Parts, Proxy, Resources, Vmm, any_ended, log_figures};
use crate::selinux::Labels;
use crate::share::PARTS;
use crate::spawn::Child;
use crate::spec::MemorySize;
use kata_like_failure::{Failure, Kind};

/// How long each process may take to be gone once it is told to.
const STOP: Duration = Duration::from_secs(1);
/// How many events may wait. The guest waits with more.
const EVENTS: usize = 256;
/// How long the VM's own end may come after that of the agent's events.
const OWN_END: Duration = Duration::from_millis(700);

/// In bytes.
const PAGE: u64 = 4096;
/// As many files each guest may have the host remember, however small it is.
const FEWEST_FILES: u64 = 128 << 10;
/// And no more, however large: the kernel's own limit for a process is about this (fs.nr_open).
const MOST_FILES: u64 = 1_000_000;

/// A VM's processes. Dropped, they are killed.
#[derive(Debug)]
pub struct Vm {
    vmm: Vmm,
    fsd: Fsd,
    proxy: Proxy,
}

impl Vm {
    /// Starts VMM, fs server and proxy in the cgroup `leaf`. `tree` is the pod's share. The VMM
    /// waits on its end of their sockets until the server is there.
    pub async fn start(
        parts: &Parts,
        boot: &VmBoot,
        state: &StateFolder,
        tree: OwnedFd,
        leaf: BorrowedFd<'_>,
        labels: &Labels,
    ) -> Result<Self, Failure> {
        let (sockets, shares) = vhost_user_sockets(state)?;
        let failed = |cause| Failure::failed("make the agent's socket", cause);
        let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let streams = state.listen(name::STREAMS);
        let streams =
            streams.map_err(|cause| Failure::failed("make the socket for streams", cause))?;
        let log = state.create_file(name::GUEST_LOG);
        let log =
            log.map_err(|cause| Failure::failed("make the file of the guest's log", cause))?;
        let resources = Resources {
            log,
            agent: theirs.into(),
            streams: streams.into(),
            shares,
        };
        let serve = fsd_boot(boot.memory_bytes);
        let (fsd, vmm, proxy) = tokio::join!(
            Fsd::start(parts, leaf, &serve, FsdFds { tree, sockets }),
            Vmm::start(parts, leaf, boot, resources),
            Proxy::start(parts, leaf, proxy_uid(boot.uid), ours),
        );
        // The server's failure first: the VMM's is its consequence.
        let started = fsd.and_then(|fsd| Ok((fsd, vmm?, proxy?)));
        let (fsd, vmm, proxy) = started.map_err(|error| labels.blame(error))?;
        Ok(Self { vmm, fsd, proxy })
    }

    /// The pids of VMM, fs server and proxy.
    pub fn pids(&self) -> [u32; 3] {
        [self.vmm.child(), self.fsd.child(), self.proxy.child()].map(|child| child.pid)
    }

    /// Waits until a part has ended, and tells why.
    fn ended(&self) -> impl Future<Output = String> + Send + 'static + use<> {
        any_ended(self.vmm.ended(), self.fsd.ended(), self.proxy.ended())
    }

    /// Waits until the agent has dialled, as long as the guest gets on with its boot.
    pub async fn booted(&self, patience: Duration) -> Result<(), Failure> {
        let over = self.ended();
        tokio::pin!(over);
        let failed = |why| Err(Failure::new(Kind::Failed, why));
        let figures = tokio::select! {
            dialled = self.vmm.agent_dialled(patience) => match dialled {
                // Of two that end together the cause is told.
                Err(_) if self.vmm.has_ended() => return failed(over.await),
                dialled => dialled?,
            },
            why = &mut over => return failed(why),
        };
        log_figures("the agent's dial", &figures);
        Ok(())
    }

    /// The guest of a VM that has booted: makes the first call.
    pub async fn guest(&self, state: Arc<StateFolder>, sandbox: &str) -> Result<Guest, Failure> {
        let agent = Agent::new(self.proxy.clone(), self.vmm.clone());
        let started = agent.start_pod().await?;
        tracing::debug!(
            kernel = started.kernel_release,
            agent = started.agent_version,
            "pod started"
        );
        Ok(Guest::new(agent, self.vmm.clone(), state, sandbox))
    }

    /// Follows the guest's events. From now on the end of any part ends the VM, which is the last
    /// event. Where the VM lacked memory, its reason has `memory`.
    pub fn follow(&self, guest: &Guest, memory: MemorySize) -> mpsc::Receiver<Event> {
        let (events, happened) = mpsc::channel(EVENTS);
        let events_over = guest.agent.follow_events(events.clone());
        // Children only: this task must not keep the VM alive.
        let parts = [self.vmm.child(), self.fsd.child(), self.proxy.child()].map(Child::clone);
        let over = self.ended();
        let lacked_memory = self.vmm.lacked_memory();
        let (ending, sandbox) = (guest.ending(), Arc::clone(&guest.sandbox));
        tokio::spawn(async move {
            tokio::pin!(over);
            let reason = tokio::select! {
                why = &mut over => why,
                why = events_over => {
                    // The VM's end takes the agent along, and knows more of why.
                    let own = tokio::time::timeout(OWN_END, &mut over).await;
                    own.unwrap_or_else(|_| why.unwrap_or_default())
                }
            };
            parts.iter().for_each(Child::kill);
            if !ending.is_wanted() {
                let reason = match lacked_memory() {
                    true => format!("{reason}; {memory}"),
                    false => reason,
                };
                tracing::error!(sandbox = %sandbox, "the sandbox has ended: {reason}");
                let _ = events.send(Event::Ended { reason }).await;
            }
        });
        happened
    }

    /// Ends VMM, fs server and proxy.
    pub async fn stop(&self) {
        self.vmm.stop(STOP).await;
        tokio::join!(self.fsd.child().end(STOP), self.proxy.child().end(STOP),);
    }
}

/// A vhost-user socket for each share: the file server listens, the VMM is connected. Nothing of
/// them stays in the folder.
fn vhost_user_sockets(state: &StateFolder) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), Failure> {
    const NAME: &str = "share.sock";
    let failed =
        |cause: StateError| Failure::failed("make a socket between VMM and fs server", cause);
    let (mut listening, mut connected) = (Vec::new(), Vec::new());
    for _ in PARTS {
        listening.push(state.listen(NAME).map_err(failed)?.into());
        connected.push(state.connect(NAME).map_err(failed)?.into());
        let removed = rustix::fs::unlinkat(state, NAME, rustix::fs::AtFlags::empty());
        removed.map_err(|errno| {
            Failure::failed("remove a socket's name", std::io::Error::from(errno))
        })?;
    }
    Ok((listening, connected))
}

/// The guest may make the host remember one file for each of its pages: with 2 KiB for a file, that
/// is at most half as much memory as the guest has.
fn files(memory_bytes: u64) -> u64 {
    (memory_bytes / PAGE).clamp(FEWEST_FILES, MOST_FILES)
}

fn fsd_boot(memory_bytes: u64) -> FsdBoot {
    let [rootfs, volumes] = PARTS;
    let share = |directory: &str, cache| FsdShare {
        directory: directory.to_owned(),
        cache,
    };
    FsdBoot {
        version: VERSION,
        shares: vec![
            share(rootfs, CachePolicy::Private),
            share(volumes, CachePolicy::Shared),
        ],
        files: files(memory_bytes),
        memory_bytes,
    }
}

/// What a VM is booted with whose VMM has this user id.
pub fn boot(config: &Config, memory_bytes: u64, vcpus: u8, parts: &Parts, uid: u32) -> VmBoot {
    VmBoot {
        version: VERSION,
        uid,
        memory_bytes,
        vcpus,
        huge_pages: match config.hugepages {
            kata_like_config::HugePages::Transparent => kata_like_boot::HugePages::Transparent,
            kata_like_config::HugePages::Hugetlb => kata_like_boot::HugePages::Hugetlb,
        },
        agent_port: AGENT_PORT,
        stream_port: STREAM_PORT,
        shares: PARTS
            .map(|tag| VmShare {
                tag: tag.to_owned(),
            })
            .into(),
        printk: parts.printk(),
    }
}
