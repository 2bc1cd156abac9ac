//! The run loop of a vCPU: one thread each, one arm per exit reason.
//!
//! `machine` starts the threads before the jail closes; they wait at a gate until it is closed. A
//! thread ends with the guest or when it is told to. It always says so by a notice, even if it
//! panics. Facts: Linux Documentation/virt/kvm/api.rst, section 5.

mod state;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kata_like_boot::VcpuState;
use kata_like_failure::one_line;
use kata_like_linux::lock;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

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
    questions: Vec<Question>,
    gate: Barrier,
}

/// Asks a vCPU's thread what the vCPU does.
#[derive(Default)]
struct Question {
    open: AtomicBool,
    answer: Mutex<Option<VcpuState>>,
}

pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread per vCPU; none runs before [`Vcpus::open_gate`]. Each thread calls `ended`
    /// once.
    pub fn start(
        vcpus: Vec<VcpuFd>,
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
            questions: vcpus.iter().map(|_| Question::default()).collect(),
            gate: Barrier::new(vcpus.len() + 1),
        });
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, mut vcpu) in vcpus.into_iter().enumerate() {
            let shared = shared.clone();
            let last_words = LastWords {
                ended: ended.clone(),
                end: VcpuEnd::Failed(format!("the thread of vCPU {id} panicked")),
            };
            let body = move || {
                let mut last_words = last_words;
                shared.gate.wait();
                let end = shared.run(&mut vcpu, id);
                last_words.end = end;
                drop(last_words);
            };
            threads.push(
                thread::Builder::new()
                    .name(format!("vcpu{id}"))
                    .spawn(body)?,
            );
        }
        Ok(Self { shared, threads })
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
        self.kick_while(deadline, |_, thread| !thread.is_finished());
    }

    /// Takes each vCPU out of the guest for a moment and reads what it does. `None`: it did not
    /// come out within `deadline`.
    pub fn states(&self, deadline: Duration) -> Vec<Option<VcpuState>> {
        let questions = &self.shared.questions;
        for question in questions {
            question.take();
            question.open.store(true, Ordering::SeqCst);
        }
        self.kick_while(deadline, |id, _| {
            questions
                .get(id)
                .is_some_and(|question| question.open.load(Ordering::SeqCst))
        });
        questions.iter().map(Question::take).collect()
    }

    /// Signals the vCPUs for which `wanted` is true until there are none, at most for `deadline`.
    fn kick_while(
        &self,
        deadline: Duration,
        mut wanted: impl FnMut(usize, &JoinHandle<()>) -> bool,
    ) {
        let end = Instant::now() + deadline;
        while Instant::now() < end {
            let mut any = false;
            for (id, thread) in self.threads.iter().enumerate() {
                if !wanted(id, thread) {
                    continue;
                }
                any = true;
                // A signal that comes just before KVM_RUN is lost; the next one is not.
                let _ = thread.kill(SIGRTMIN());
            }
            if !any {
                return;
            }
            thread::sleep(KICK_INTERVAL);
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

/// Reports how a thread ended when it is dropped: at the thread's end, or while it unwinds.
struct LastWords<F: Fn(VcpuEnd)> {
    ended: F,
    end: VcpuEnd,
}

impl<F: Fn(VcpuEnd)> Drop for LastWords<F> {
    fn drop(&mut self) {
        (self.ended)(self.end.clone());
    }
}

impl Shared {
    fn run(&self, vcpu: &mut VcpuFd, id: usize) -> VcpuEnd {
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return VcpuEnd::Stopped;
            }
            if let Some(question) = self.questions.get(id) {
                question.answer(vcpu);
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
