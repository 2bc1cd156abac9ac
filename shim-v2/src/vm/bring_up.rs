//! The steps from nothing to an agent that answers, and the way back.
//!
//! Called by `sandbox`. [`Machine`] holds what each step has made and takes it down in reverse,
//! whatever fails. A failure's text has the steps that were done before it and how long each took.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kata_like_agent_protocol::{AGENT_PORT, STREAM_PORT};
use kata_like_boot::{CachePolicy, FsdBoot, FsdFds, FsdShare, VERSION, VmBoot, VmShare};
use kata_like_config::Config;
use kata_like_config::state::{self, Process, Record, StateFolder, name};
use rustix::fs::OFlags;
use tokio::net::UnixStream;

use super::clock::Clock;
use super::machine::{Machine, Steps};
use super::memory::{self, MemoryNames};
use super::{Inner, Sandbox, limits, namespace, resolver};
use crate::cgroup::{self, Cgroup, LEAF};
use crate::file_systems;
use crate::selinux::Labels;
use crate::share::{PARTS, Share, volumes};
use crate::spec::{self, MemorySize, NetworkPart, Split};
use crate::stand_in::StandIn;
use crate::vm::agent::Agent;
use crate::vm::cleanup;
use crate::vm::launch::{Fsd, Parts, Resources, Vmm, either_over, log_figures};
use crate::vm::request::{SandboxEvent, SandboxRequest};
use kata_like_failure::{Failure, Kind};

/// Starts a sandbox; what was made is taken down again if a step fails.
pub(super) async fn start(request: SandboxRequest) -> Result<Arc<Sandbox>, Failure> {
    let (mut machine, mut steps) = (Machine::default(), Steps::new());
    let id = request.id.clone();
    match bring_up(request, &mut machine, &mut steps).await {
        Ok(sandbox) => {
            let took = steps.begin.elapsed().as_millis();
            tracing::info!(sandbox = id, "sandbox started in {took} ms ({steps})");
            *sandbox.machine.lock().await = Some(machine);
            Ok(sandbox)
        }
        Err(error) => {
            let failed = steps.last.elapsed().as_millis();
            let before = match steps.done.is_empty() {
                true => String::new(),
                false => format!("; done before: {steps}"),
            };
            machine.take_down().await;
            Err(error.during(format!(
                "start sandbox {id} (failed after {failed} ms{before})"
            )))
        }
    }
}

async fn bring_up(
    mut request: SandboxRequest,
    machine: &mut Machine,
    steps: &mut Steps,
) -> Result<Arc<Sandbox>, Failure> {
    let (config, wanted) = read(&request)?;
    let labels = (wanted.split.host.labels.clone()).on_this_host(config.selinux);
    let parts = Parts::open(&config, labels.process.clone())?;
    steps.done("read");

    let mut record = Record::new(&request.namespace, &request.id);
    let state = make_state(&request, machine, &mut record)?;
    let (cgroup, leaf) = make_cgroups(&wanted, machine, &state, &mut record)?;
    let given = &wanted.split.host.network;
    let network =
        namespace::make(&mut request, given, &cgroup, &state, machine, &mut record).await?;
    steps.done("state");

    let own = labels.clone();
    let share = blocking(move || Share::create(&state, &own).map(|share| (share, state))).await?;
    let (share, state) = (Arc::new(share.0), share.1);
    machine.share = Some(Arc::clone(&share));
    let (listening, connected) = vhost_user_sockets(&state)?;
    let (ours, theirs) =
        StdUnixStream::pair().map_err(|cause| Failure::failed("make the agent's socket", cause))?;
    let fds = FsdFds {
        tree: share.tree()?,
        sockets: listening,
    };
    let resources = Resources {
        log: make_log(&state, &labels)?,
        agent: theirs.into(),
        streams: make_streams(&state)?,
        shares: connected,
    };
    let (boot, serve) = (vm_boot(&config, &wanted, &parts), fsd_boot());
    record.uid = Some(boot.uid);
    // Side by side: the VMM waits on its end of the sockets until the server is there.
    let (fsd, vmm) = tokio::join!(
        Fsd::start(&parts, leaf.as_fd(), &serve, fds),
        Vmm::start(&parts, leaf.as_fd(), &boot, resources),
    );
    // The server's failure first: the VMM's is its consequence.
    let started = fsd.and_then(|fsd| Ok((fsd, vmm?)));
    let (fsd, vmm) = started.map_err(|error| labels.blame(error))?;
    record.fsd = process_of(fsd.child().pid);
    record.vmm = process_of(vmm.child().pid);
    let over = either_over(vmm.over(), fsd.over());
    machine.fsd = Some(fsd);
    machine.vmm = Some(vmm.clone());
    write_record(&state, &record)?;
    drop(parts);
    steps.done("VMM and fs server");

    tokio::pin!(over);
    let failed = |why| Err(Failure::new(Kind::Failed, why));
    let figures = tokio::select! {
        dialled = vmm.agent_dialled(config.boot_deadline) => match dialled {
            // Of two that end together the cause is told.
            Err(_) if vmm.is_over() => return failed(over.await),
            dialled => dialled?,
        },
        why = &mut over => return failed(why),
    };
    log_figures("the agent's dial", &figures);
    steps.done("guest's boot");

    let agent = connect(ours, vmm.clone())?;
    let clock = Clock::watch().map_err(|cause| Failure::failed("watch the host's clock", cause))?;
    let started = agent.start_pod().await?;
    tracing::debug!(
        kernel = started.kernel_release,
        agent = started.agent_version,
        "pod started"
    );
    let sandbox = Arc::new_cyclic(|me| Sandbox {
        namespace: request.namespace,
        id: request.id,
        agent,
        vmm,
        state,
        share,
        network,
        network_path: match &wanted.split.host.network {
            NetworkPart::Path(path) => Some(path.clone()),
            NetworkPart::New | NetworkPart::Pod => None,
        },
        pod_network: tokio::sync::Mutex::default(),
        forward: Mutex::default(),
        resolver: Default::default(),
        host_mounts: request.host_mounts,
        labels,
        limited: Path::new(cgroup::ROOT).join(&wanted.cgroup),
        memory: wanted.memory,
        vcpus: boot.vcpus,
        events: request.events,
        inner: Mutex::new(Inner {
            containers: std::collections::HashMap::new(),
            first: machine.stand_in.take().map(|stand_in| (cgroup, stand_in)),
            first_split: Some(wanted.split),
            memory: wanted.names,
            disks: std::collections::HashMap::new(),
            record,
        }),
        machine: tokio::sync::Mutex::new(None),
        stopping: false.into(),
        me: me.clone(),
    });
    watch(&sandbox, machine).await?;
    clock
        .follow(Arc::downgrade(&sandbox))
        .map_err(|cause| Failure::failed("watch the host's clock", cause))?;
    steps.done("agent");
    Ok(sandbox)
}

/// What the sandbox's own container asks of it.
struct Wanted {
    cgroup: PathBuf,
    split: Split,
    /// The names of its memory.
    names: MemoryNames,
    /// The VM's memory.
    memory: MemorySize,
}

fn read(request: &SandboxRequest) -> Result<(Config, Wanted), Failure> {
    let config = match &request.config_path {
        None => Config::load(),
        Some(path) => Config::load_file(path),
    };
    let config = config.map_err(|cause| Failure::failed("read the configuration", cause))?;
    let spec = spec::read(&request.bundle)?;
    let mut names = MemoryNames::default();
    let pod = spec::Pod {
        task_of: &|_| None,
        volume_name: &volumes::name,
        memory_of: &mut |source| Ok(memory::look(source)?.map(|found| names.volume(found))),
        system_of: &file_systems::of_path,
    };
    let split = spec::split(spec, &request.bundle, pod)?;
    let given = split.host.cgroups_path.as_deref();
    let cgroup = cgroup::path_of(given, &request.namespace, &request.id)
        .map_err(|cause| Failure::failed("find the sandbox's cgroup", cause))?;
    let default = u64::from(config.memory_mib) << 20;
    let memory = split.host.size.memory(default, host_memory())?;
    let wanted = Wanted {
        cgroup,
        split,
        names,
        memory,
    };
    Ok((config, wanted))
}

fn make_state(
    request: &SandboxRequest,
    machine: &mut Machine,
    record: &mut Record,
) -> Result<Arc<StateFolder>, Failure> {
    let failed = |cause: state::StateError| Failure::failed("keep the pod's state", cause);
    let create = || StateFolder::create(&request.namespace, &request.id);
    let state = match create() {
        // containerd gives no name twice: what is there is a dead shim's.
        Err(state::StateError::Exists { .. })
            if cleanup::remove_dead(&request.namespace, &request.id).map_err(failed)? =>
        {
            create()
        }
        other => other,
    };
    let state = state.map_err(failed)?;
    let state = Arc::new(state);
    machine.state = Some(Arc::clone(&state));
    machine.lock = state.try_lock().map_err(failed)?;
    record.shim = Process::current().ok();
    state.write_record(record).map_err(failed)?;
    state.create_directory(name::EMPTY).map_err(failed)?;
    Ok(state)
}

fn make_cgroups(
    wanted: &Wanted,
    machine: &mut Machine,
    state: &StateFolder,
    record: &mut Record,
) -> Result<(Cgroup, Cgroup), Failure> {
    let failed = |cause| Failure::failed("make the pod's cgroups", cause);
    // `start` has made both and gave birth to this process in the leaf: they are found here.
    let leaf = Cgroup::create(&wanted.cgroup.join(LEAF)).map_err(failed)?;
    let own = Cgroup::create(&wanted.cgroup).map_err(failed)?;
    machine.cgroups = leaf.made().to_vec();
    record.cgroups = leaf.made().to_vec();
    write_record(state, record)?;
    let limited = wanted.split.host.size.memory;
    if let Err(error) = cgroup::limits::set(&own, limited.map(|_| wanted.memory.bytes)) {
        let line = kata_like_failure::one_line(&error);
        tracing::warn!("{line}; the pod runs without this limit on the host");
    }
    Ok((own, leaf))
}

/// A vhost-user socket for each share: the file server listens, the VMM is connected. Nothing of
/// them stays in the folder.
fn vhost_user_sockets(state: &StateFolder) -> Result<(Vec<OwnedFd>, Vec<OwnedFd>), Failure> {
    const NAME: &str = "share.sock";
    let failed = |cause: state::StateError| {
        Failure::failed("make a socket between VMM and fs server", cause)
    };
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

fn fsd_boot() -> FsdBoot {
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
    }
}

/// The host's memory in bytes.
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1)))
}

fn vm_boot(config: &Config, wanted: &Wanted, parts: &Parts) -> VmBoot {
    let size = &wanted.split.host.size;
    VmBoot {
        version: VERSION,
        uid: VmBoot::own_uid(),
        memory_bytes: wanted.memory.bytes,
        vcpus: size.vcpus(config.max_vcpus, kata_like_config::online_cpus()),
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

/// The VMM appends to the log; it is handed a descriptor that can do nothing else to what is there.
fn make_log(state: &StateFolder, labels: &Labels) -> Result<std::fs::File, Failure> {
    let log = state
        .create_file(name::GUEST_LOG)
        .map_err(|cause| Failure::failed("make the file of the guest's log", cause))?;
    labels.mark("guest's log", &log);
    match rustix::fs::fcntl_setfl(&log, OFlags::APPEND) {
        Ok(()) => Ok(log),
        Err(errno) => {
            let cause = std::io::Error::from(errno);
            Err(Failure::failed("prepare the guest's log", cause))
        }
    }
}

fn make_streams(state: &StateFolder) -> Result<OwnedFd, Failure> {
    let socket = state.listen(name::STREAMS);
    socket
        .map(OwnedFd::from)
        .map_err(|cause| Failure::failed("make the socket for streams", cause))
}

fn connect(ours: StdUnixStream, vmm: Vmm) -> Result<Agent, Failure> {
    let failed = |cause| Failure::failed("take the agent's connection", cause);
    ours.set_nonblocking(true).map_err(failed)?;
    let connection = UnixStream::from_std(ours).map_err(failed)?;
    Ok(Agent::new(connection, vmm))
}

/// From now on whatever ends, ends the pod, which is told once.
async fn watch(sandbox: &Arc<Sandbox>, machine: &Machine) -> Result<(), Failure> {
    let weak = Arc::downgrade(sandbox);
    let known = move |event: &crate::vm::agent::GuestEvent| {
        weak.upgrade().is_some_and(|sandbox| sandbox.expects(event))
    };
    let weak = Arc::downgrade(sandbox);
    let asked = move |question| {
        if let Some(sandbox) = weak.upgrade() {
            resolver::answer(&sandbox, question);
        }
    };
    let events_over = sandbox
        .agent
        .follow_events(known, sandbox.events.clone(), asked)
        .await?;
    let Some(fsd) = &machine.fsd else {
        return Ok(());
    };
    // Not the sandbox's own VMM: this task must not keep it alive.
    let (vmm_child, fsd_child) = (sandbox.vmm.child().clone(), fsd.child().clone());
    let over = either_over(sandbox.vmm.over(), fsd.over());
    let weak = Arc::downgrade(sandbox);
    tokio::spawn(async move {
        tokio::pin!(over);
        let reason = tokio::select! {
            why = &mut over => why,
            why = events_over => {
                // The VM's end takes the agent along, and knows more of why.
                let own = tokio::time::timeout(Duration::from_millis(700), &mut over).await;
                own.unwrap_or_else(|_| why.unwrap_or_default())
            }
        };
        vmm_child.kill();
        fsd_child.kill();
        let Some(sandbox) = weak.upgrade() else {
            return;
        };
        let reason = limits::explained(reason, &sandbox.memory);
        if !sandbox.stopping.load(Ordering::SeqCst) {
            tracing::error!(sandbox = sandbox.id, "the sandbox has ended: {reason}");
            let _ = sandbox.events.send(SandboxEvent::Ended { reason });
        }
    });
    Ok(())
}

fn process_of(pid: u32) -> Option<Process> {
    Process::of(i32::try_from(pid).ok()?).ok()
}

/// A stand-in as the record has it.
pub(super) fn recorded(task: &str, stand_in: &StandIn) -> Option<state::StandIn> {
    Some(state::StandIn {
        task: task.to_owned(),
        process: process_of(stand_in.pid())?,
    })
}

pub(super) fn write_record(state: &StateFolder, record: &Record) -> Result<(), Failure> {
    state
        .write_record(record)
        .map_err(|cause| Failure::failed("keep the pod's state", cause))
}

/// Runs what blocks where it may.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|panic| Err(Failure::failed("wait for a blocking step", panic)))
}
