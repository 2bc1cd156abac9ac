//! The run loop of a vCPU: one thread each, one arm per exit reason.
//!
//! `machine` starts the threads; each closes its jail, and all wait at a gate until every thread's
//! is closed. A vCPU stops with the guest or when it is told to. Its thread always says so by a
//! notice, even if it panics, and then rests until the process ends: a thread's own end takes calls
//! that the jail forbids. Facts: Linux Documentation/virt/kvm/api.rst, section 5.

mod state;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_boot::VcpuState;
use kata_like_failure::one_line;
use kata_like_linux::lock;
use kata_like_linux::signal::to_thread;
use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::process::Pid;
use rustix::thread::gettid;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::bus::{Bus, Effect};

/// The least time between two signals to a vCPU that must stop or answer.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// KVM_INTERNAL_ERROR_EMULATION and its neighbours.
const INTERNAL_ERRORS: [(u32, &str); 3] = [
    (1, "it can't emulate an instruction"),
    (2, "an event came while it delivered another"),
    (3, "it could not deliver an event"),
];

/// Why a vCPU runs no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEnd {
    Reset,
    TripleFault,
    /// KVM or a device failed; one line says how.
    Failed(String),
    /// The host has no memory for the guest; one line says so.
    OutOfMemory(String),
    /// We told it to stop.
    Stopped,
}

/// What the threads share.
pub struct Shared {
    bus: Bus,
    user_exits: AtomicU64,
    stop: AtomicBool,
    threads: Vec<Thread>,
    gate: Barrier,
}

/// What the machine knows of a vCPU's thread.
#[derive(Default)]
struct Thread {
    id: OnceLock<Pid>,
    /// The vCPU runs no more.
    over: AtomicBool,
    question: Question,
}

/// Asks a vCPU's thread what the vCPU does.
#[derive(Default)]
struct Question {
    open: AtomicBool,
    answer: Mutex<Option<VcpuState>>,
}

pub struct Vcpus {
    shared: Arc<Shared>,
    process: Pid,
}

impl Vcpus {
    /// Starts a thread per vCPU in `process`, which is this one. Each does its `first` before all
    /// else; none runs before [`Vcpus::open_gate`]. Each calls `ended` once.
    pub fn start<F: FnOnce() + Send + 'static>(
        process: Pid,
        vcpus: Vec<(VcpuFd, F)>,
        bus: Bus,
        ended: impl Fn(VcpuEnd) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        // The handler does nothing: the signal's arrival makes KVM_RUN return.
        register_signal_handler(SIGRTMIN(), interrupt)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
        let shared = Arc::new(Shared {
            bus,
            user_exits: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            threads: vcpus.iter().map(|_| Thread::default()).collect(),
            gate: Barrier::new(vcpus.len() + 1),
        });
        for (id, (mut vcpu, first)) in vcpus.into_iter().enumerate() {
            let (shared, ended) = (shared.clone(), ended.clone());
            let body = move || {
                let own = shared.threads.get(id);
                let _ = own.map(|own| own.id.set(gettid()));
                first();
                shared.gate.wait();
                let end = catch_unwind(AssertUnwindSafe(|| shared.run(&mut vcpu, id)));
                let panicked = |_| VcpuEnd::Failed(format!("the thread of vCPU {id} panicked"));
                ended(end.unwrap_or_else(panicked));
                if let Some(own) = own {
                    own.over.store(true, Ordering::SeqCst);
                }
                kata_like_jail::rest();
            };
            let thread = thread::Builder::new().name(format!("vcpu{id}"));
            thread.spawn(body)?;
        }
        Ok(Self { shared, process })
    }

    /// Lets the vCPUs run.
    pub fn open_gate(&self) {
        self.shared.gate.wait();
    }

    /// How many exits KVM has handed to us so far.
    pub fn user_exits(&self) -> u64 {
        self.shared.user_exits.load(Ordering::Relaxed)
    }

    /// Stops all vCPUs; waits for them, at most until `deadline`. A thread that is stuck in a
    /// device is left behind, since the process is about to end.
    pub fn stop(&self, deadline: Duration) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.kick_while(deadline, |thread| !thread.over.load(Ordering::SeqCst));
    }

    /// Takes each vCPU out of the guest for a moment and reads what it does. `None`: it did not
    /// come out within `deadline`.
    pub fn states(&self, deadline: Duration) -> Vec<Option<VcpuState>> {
        let questions = || self.shared.threads.iter().map(|thread| &thread.question);
        for question in questions() {
            question.take();
            question.open.store(true, Ordering::SeqCst);
        }
        self.kick_while(deadline, |thread| {
            thread.question.open.load(Ordering::SeqCst)
        });
        questions().map(Question::take).collect()
    }

    /// Signals the vCPUs for which `wanted` is true until there are none, at most for `deadline`.
    fn kick_while(&self, deadline: Duration, wanted: impl Fn(&Thread) -> bool) {
        let end = Instant::now() + deadline;
        while Instant::now() < end {
            let mut any = false;
            for thread in self.shared.threads.iter().filter(|thread| wanted(thread)) {
                any = true;
                if let Some(id) = thread.id.get() {
                    // A signal that comes just before KVM_RUN is lost; the next one is not.
                    let _ = to_thread(self.process, *id, SIGRTMIN());
                }
            }
            if !any {
                return;
            }
            thread::park_timeout(KICK_INTERVAL);
        }
    }
}

impl Question {
    /// Answers an open question, on the vCPU's thread.
    fn answer(&self, vcpu: &VcpuFd) {
        if self.open.load(Ordering::SeqCst) {
            *self.lock() = state::of(vcpu).ok();
            self.open.store(false, Ordering::SeqCst);
        }
    }

    /// Takes the answer. If there is none, takes the question back.
    fn take(&self) -> Option<VcpuState> {
        self.open.store(false, Ordering::SeqCst);
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<VcpuState>> {
        // Only one assignment happens under this lock.
        lock(&self.answer)
    }
}

impl Shared {
    fn run(&self, vcpu: &mut VcpuFd, id: usize) -> VcpuEnd {
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return VcpuEnd::Stopped;
            }
            if let Some(thread) = self.threads.get(id) {
                thread.question.answer(vcpu);
            }
            let exit = vcpu.run();
            self.user_exits.fetch_add(1, Ordering::Relaxed);
            match exit {
                Ok(VcpuExit::MmioRead(address, data)) => self.bus.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    if let Err(error) = self.bus.write(address, data) {
                        return VcpuEnd::Failed(one_line(&error));
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => self.bus.port_read(port, data),
                Ok(VcpuExit::IoOut(port, data)) => {
                    if self.bus.port_write(port, data) == Effect::Reset {
                        return VcpuEnd::Reset;
                    }
                }
                Ok(VcpuExit::Shutdown) => return VcpuEnd::TripleFault,
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::InternalError) => return VcpuEnd::Failed(internal_error(vcpu, id)),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return VcpuEnd::Failed(format!(
                        "run vCPU {id}: the CPU refuses to enter the guest, reason {reason:#x} on host CPU {cpu}"
                    ));
                }
                Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                    return VcpuEnd::Failed(format!(
                        "run vCPU {id}: the host can't give {size} bytes of guest memory at {gpa:#x}"
                    ));
                }
                Ok(other) => {
                    return VcpuEnd::Failed(format!("run vCPU {id}: unexpected exit {other:?}"));
                }
                Err(error) => match error.errno() {
                    libc::EINTR | libc::EAGAIN => {}
                    libc::EFAULT => {
                        return VcpuEnd::OutOfMemory(format!(
                            "run vCPU {id}: the host can't give guest memory that it promised \
                            (out of memory, or a limit of huge pages)"
                        ));
                    }
                    _ => {
                        return VcpuEnd::Failed(format!("run vCPU {id}: KVM_RUN: {error}"));
                    }
                },
            }
        }
    }
}

fn internal_error(vcpu: &mut VcpuFd, id: usize) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: after KVM_EXIT_INTERNAL_ERROR the union's valid member is `internal`. All its members
    // are plain integers, for which any bytes are valid.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    let what = INTERNAL_ERRORS
        .iter()
        .find(|(number, _)| *number == suberror)
        .map_or("for an unknown reason", |(_, what)| *what);
    let at = vcpu
        .get_regs()
        .map_or(String::new(), |regs| format!(", at {:#x}", regs.rip));
    format!("run vCPU {id}: KVM can't go on: {what} (suberror {suberror}{at})")
}
