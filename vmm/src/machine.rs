//! The machine: puts the parts together, runs them, says how it ended.
//!
//! Called by `main`. The order is: memory, jail of the process, VM, kernel, devices, vCPUs, jails
//! of the threads, run. Before `run` an error is the whole answer; from then on every end is an
//! [`End`].

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kata_like_boot::{
    Channel, ChannelError, End, EndReason, Figures, VmBoot, VmCommand, VmFds, VmReport, VmState,
};
use kata_like_failure::one_line;
use kata_like_jail::lists::vmm;
use kata_like_jail::seccomp::Threads;
use rustix::process::getpid;

use crate::bus::Bus;
use crate::cpuid;
use crate::figures::Stats;
use crate::jail::{self, Bounds, Jails};
use crate::kernel::{self, KernelError};
use crate::kvm::{KvmError, Vm};
use crate::layout::{ENTROPY_SLOT, FS_SLOT, FS_SLOTS, MAX_VCPUS, VSOCK_SLOT};
use crate::log::{GuestLog, News};
use crate::memory::{Memory, MemoryError};
use crate::mptable::{self, MpTableError};
use crate::reactor::{Event, Notices, Notifier, Reactor, ReactorError};
use crate::slots::{Slots, SlotsError};
use crate::vcpu::{VcpuEnd, Vcpus};
use crate::virtio::block::Disk;
use crate::virtio::fs::{BadShare, Fs};
use crate::virtio::life::Life;
use crate::virtio::rng::Entropy;
use crate::virtio::vsock::{Endpoints, Vsock};
use crate::virtio::{Device, DeviceError};
use crate::watchdog::Watchdog;

/// How long the vCPUs may take to stop; then the process ends without them.
const STOP_DEADLINE: Duration = Duration::from_millis(500);

/// How long the vCPUs may take to say what they do. Devices wait meanwhile.
const STATE_DEADLINE: Duration = Duration::from_millis(500);

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "each variant is its source's step")]
pub enum BuildError {
    #[error("{vcpus} vCPUs: must be 1 to {MAX_VCPUS}")]
    Vcpus { vcpus: u8 },
    #[error("{0} shares: at most {FS_SLOTS}")]
    Shares(usize),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    #[error(transparent)]
    Share(#[from] BadShare),
    #[error(transparent)]
    Slots(#[from] SlotsError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    #[error(transparent)]
    Jail(#[from] kata_like_jail::JailError),
    #[error("{step}")]
    Io {
        step: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// What other threads and devices tell the machine.
enum Notice {
    Vcpu(VcpuEnd),
    AgentConnected,
}

/// A machine that is ready to run.
pub struct Machine {
    /// Dropped, it takes the devices' connections with it.
    _vm: Vm,
    memory: Arc<Memory>,
    slots: Slots,
    vcpus: Vcpus,
    reactor: Reactor,
    notices: Notices<Notice>,
    log: GuestLog,
    vm_stats: Option<Stats>,
    vcpu_stats: Vec<Option<Stats>>,
    started: Instant,
}

impl Machine {
    /// Builds the machine. The process gives up what it has before it reads a byte of the guest's
    /// kernel; each thread closes its jail before this returns. Only `control` and the descriptors
    /// of the request stay open.
    pub fn build(boot: VmBoot, mut fds: VmFds) -> Result<Self, BuildError> {
        let count = boot.vcpus;
        if count == 0 || count > MAX_VCPUS {
            return Err(BuildError::Vcpus { vcpus: count });
        }
        if boot.shares.len() > FS_SLOTS {
            return Err(BuildError::Shares(boot.shares.len()));
        }
        let memory = Arc::new(Memory::new(boot.memory_bytes, boot.huge_pages)?);
        let process = getpid();
        let bounds = Bounds {
            uid: boot.uid,
            memory_bytes: boot.memory_bytes,
            vcpus: count,
        };
        jail::confine(bounds, process)?;
        let vm = Vm::new(fds.kvm, memory.clone())?;
        let entry = kernel::load(memory.ram(), memory.ranges(), fds.kernel, fds.initrd)?;
        mptable::write(memory.ram(), count)?;

        let mut jails = Jails::new(process);
        let reactor = Reactor::new()?;
        let (notifier, notices) = reactor.notices()?;
        let mut slots = Slots::new(&vm, memory.ram(), &reactor)?;
        let shares = std::mem::take(&mut fds.shares);
        fill_shares(&slots, &boot, shares, &mut jails)?;
        let vsock = vsock(&boot, fds.agent, fds.streams, notifier.clone())?;
        slots.fill(VSOCK_SLOT, vsock)?;
        if !cpuid::has_rdrand(vm.supported_cpuid()) {
            slots.fill(ENTROPY_SLOT, Box::new(Entropy))?;
        }
        slots.start_workers(&mut jails)?;
        let door = jails.door(&vmm::LIFE)?;
        let life = Life::start(|| door.close())
            .map_err(thread("start the thread that switches devices"))?;

        let cpus = (0..count)
            .map(|id| vm.create_vcpu(id, count, entry))
            .collect::<Result<Vec<_>, _>>()?;
        let vm_stats = Stats::of(vm.fd());
        let vcpu_stats = cpus.iter().map(Stats::of).collect();
        let ended = move |end| notifier.send(Notice::Vcpu(end));
        let doors = jails.doors(&vmm::VCPU, cpus.len())?.into_iter();
        let firsts = doors.map(|door| || door.close());
        let cpus = cpus.into_iter().zip(firsts).collect();
        let vcpus = Vcpus::start(process, cpus, Bus::new(slots.all(), life), ended)
            .map_err(thread("start a thread per vCPU"))?;
        let own = jail::filter(&vmm::LOOP, process)?;
        jails.closed()?;
        own.install(Threads::Calling)?;
        Ok(Self {
            log: GuestLog::new(boot.printk, memory.ram().clone()),
            _vm: vm,
            memory,
            slots,
            vcpus,
            reactor,
            notices,
            vm_stats,
            vcpu_stats,
            started: Instant::now(),
        })
    }

    /// Runs the guest until it ends, and obeys `control`. A vCPU can't hang it.
    pub fn run(mut self, control: &Channel) -> End {
        let end = match self.reactor.watch_control(control) {
            Ok(()) => self.run_until_end(control),
            Err(error) => (EndReason::Failed, one_line(&error)),
        };
        self.vcpus.stop(STOP_DEADLINE);
        let log = self.log.news().text;
        let log_tail = self.log.tail();
        let (reason, detail) = match (end, self.log.panic()) {
            ((EndReason::Reset | EndReason::TripleFault, _), Some(line)) => {
                (panic_reason(&line, &log_tail), line)
            }
            (end, _) => end,
        };
        End {
            reason,
            detail,
            log_tail,
            log,
        }
    }

    fn run_until_end(&mut self, control: &Channel) -> (EndReason, String) {
        let report = |report: VmReport| match control.send(&report, &[]) {
            Ok(()) => Ok(()),
            Err(error) => Err((EndReason::Stopped, one_line(&error))),
        };
        let mut step = || -> Result<(), (EndReason, String)> {
            report(VmReport::Running)?;
            self.started = Instant::now();
            self.vcpus.open_gate();
            loop {
                let events = self
                    .reactor
                    .wait()
                    .map_err(|error| (EndReason::Failed, one_line(&error)))?;
                for event in events {
                    match event {
                        Event::Device { slot, token } => self
                            .slots
                            .ready(slot, token)
                            .map_err(|error| (EndReason::Failed, one_line(&error)))?,
                        Event::Control => report(self.obey(control)?)?,
                        Event::Notice => {
                            for notice in self.notices.take() {
                                match notice {
                                    Notice::AgentConnected => {
                                        report(VmReport::AgentConnected(self.figures()))?;
                                    }
                                    Notice::Vcpu(end) => return Err(vcpu_ended(end)),
                                }
                            }
                        }
                    }
                }
            }
        };
        match step() {
            Ok(()) => (EndReason::Failed, "the event loop ended".to_owned()),
            Err(end) => end,
        }
    }

    /// Carries out one command; the report is its answer.
    fn obey(&mut self, control: &Channel) -> Result<VmReport, (EndReason, String)> {
        let (command, fds) = match control.receive::<VmCommand>() {
            Ok(message) => message,
            Err(ChannelError::Closed) => {
                let why = "the shim went away: its end of the control socket is closed";
                return Err((EndReason::Stopped, why.to_owned()));
            }
            Err(error @ ChannelError::Io { .. }) => {
                return Err((EndReason::Stopped, one_line(&error)));
            }
            Err(error) => {
                return Ok(VmReport::Refused {
                    why: one_line(&error),
                });
            }
        };
        Ok(match command {
            VmCommand::Stop => {
                return Err((EndReason::Stopped, "stopped by the shim".to_owned()));
            }
            VmCommand::Figures => VmReport::Figures(self.figures()),
            VmCommand::State => VmReport::State(VmState {
                vcpus: self.vcpus.states(STATE_DEADLINE),
                queues: self.slots.queue_states(),
            }),
            VmCommand::ReadLog => {
                let News { text, more } = self.log.news();
                VmReport::Log { text, more }
            }
            VmCommand::AddEntropy => {
                let added = self.slots.fill(ENTROPY_SLOT, Box::new(Entropy));
                filled(added.map(|()| ENTROPY_SLOT))
            }
            VmCommand::AddDisk {
                read_only,
                bytes,
                block_size,
            } => filled(only(fds, "a disk").and_then(|file| {
                let disk = Disk::new(file, bytes, block_size, read_only);
                self.slots.add_disk(disk.map_err(SlotsError::Disk)?)
            })),
            VmCommand::RemoveDisk { slot } => emptied(self.slots.remove_disk(slot as usize)),
            VmCommand::AddInterface { mac, mtu } => filled(
                only(fds, "an interface").and_then(|tap| self.slots.add_interface(tap, mac, mtu)),
            ),
            VmCommand::RemoveInterface { slot } => {
                emptied(self.slots.remove_interface(slot as usize))
            }
        })
    }

    fn figures(&self) -> Figures {
        let sum = |name| {
            let vcpus = self.vcpu_stats.iter().flatten();
            vcpus.map(|stats| stats.get(name)).sum()
        };
        Figures {
            elapsed_ns: u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX),
            exits: sum("exits"),
            user_exits: self.vcpus.user_exits(),
            page_faults: sum("pf_taken"),
            huge_pages: self
                .vm_stats
                .as_ref()
                .map_or(0, |stats| stats.get("pages_2m")),
            resident_bytes: self.memory.resident_bytes(),
        }
    }
}

/// How many of the log's last lines may say what a panic comes from.
const LAST_WORDS: usize = 3;

/// What the guest's kernel says of its panic, in the panic's own line or in its last ones: the
/// words are those of mm/oom_kill.c (`out_of_memory`).
fn panic_reason(line: &str, log_tail: &[String]) -> EndReason {
    let last = log_tail.iter().rev().take(LAST_WORDS);
    let mut lines = last.map(String::as_str).chain([line]);
    match lines.any(|line| line.to_ascii_lowercase().contains("out of memory")) {
        true => EndReason::GuestOutOfMemory,
        false => EndReason::Panic,
    }
}

fn vcpu_ended(end: VcpuEnd) -> (EndReason, String) {
    match end {
        VcpuEnd::Reset => (EndReason::Reset, "the guest asked for a reset".to_owned()),
        VcpuEnd::TripleFault => (
            EndReason::TripleFault,
            "the guest triple-faulted".to_owned(),
        ),
        VcpuEnd::Failed(why) => (EndReason::Failed, why),
        VcpuEnd::OutOfMemory(why) => (EndReason::HostOutOfMemory, why),
        VcpuEnd::Stopped => (EndReason::Stopped, "a vCPU was stopped".to_owned()),
    }
}

/// The one descriptor beside a command.
fn only(fds: Vec<OwnedFd>, what: &'static str) -> Result<OwnedFd, SlotsError> {
    match <[OwnedFd; 1]>::try_from(fds) {
        Ok([fd]) => Ok(fd),
        Err(fds) => Err(SlotsError::Descriptors {
            what,
            got: fds.len(),
        }),
    }
}

fn filled(slot: Result<usize, SlotsError>) -> VmReport {
    match slot {
        Ok(slot) => VmReport::SlotFilled { slot: slot as u32 }, // one of a few
        Err(error) => VmReport::Refused {
            why: one_line(&error),
        },
    }
}

fn emptied(result: Result<(), SlotsError>) -> VmReport {
    match result {
        Ok(()) => VmReport::SlotEmptied,
        Err(error) => VmReport::Refused {
            why: one_line(&error),
        },
    }
}

/// A file system device for each share.
fn fill_shares(
    slots: &Slots,
    boot: &VmBoot,
    connections: Vec<OwnedFd>,
    jails: &mut Jails,
) -> Result<(), BuildError> {
    let door = jails.door(&vmm::WATCHDOG)?;
    let watchdog =
        Watchdog::start(|| door.close()).map_err(thread("start the watchdog's thread"))?;
    for (index, (share, connection)) in boot.shares.iter().zip(connections).enumerate() {
        let device = Fs::new(&share.tag, connection, watchdog.clone())?;
        slots.fill(FS_SLOT + index, Box::new(device))?;
    }
    Ok(())
}

fn thread(step: &'static str) -> impl FnOnce(std::io::Error) -> BuildError {
    move |source| BuildError::Io { step, source }
}

/// The vsock device, with the agent's one connection and the streams.
fn vsock(
    boot: &VmBoot,
    agent: OwnedFd,
    streams: OwnedFd,
    notifier: Notifier<Notice>,
) -> Result<Box<dyn Device>, DeviceError> {
    Ok(Box::new(Vsock::new(Endpoints {
        agent_port: boot.agent_port,
        stream_port: boot.stream_port,
        agent,
        streams,
        on_agent: Box::new(move || notifier.send(Notice::AgentConnected)),
    })?))
}
