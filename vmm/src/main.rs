//! The process: boot request in, jail, run, report and exit status out.
//!
//! The shim starts it with one connected socket as descriptor 3 and nothing else (crate `boot`). All
//! that it ever says goes there.

use std::os::fd::{FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::ExitCode;

use kata_like_boot::{CONTROL_FD, Channel, End, EndReason, VmBoot, VmReport};
use kata_like_failure::one_line;
use kata_like_vmm::machine::Machine;

fn main() -> ExitCode {
    // One arena for all threads: where many threads have many, the C library looks at how many CPUs there are, and at
    // how memory may be overcommitted, in files that the jail forbids.
    // SAFETY: takes two numbers, and no other thread is there that could allocate meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // The standard hook reads files for a backtrace, which the jail forbids.
    set_hook(Box::new(|panic| eprintln!("kata-like-vmm: {panic}")));
    // SAFETY: descriptor 3 is this process's by contract and nothing in it has touched it; where it
    // is not open, every call on it fails with EBADF.
    let control = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let end = match start(&control) {
        Ok(machine) => run(machine, &control),
        Err(detail) => End {
            reason: EndReason::Failed,
            detail,
            log_tail: Vec::new(),
        },
    };
    let status = end.reason.exit_status();
    let last = VmReport::Ended(end);
    if let (Err(_), VmReport::Ended(end)) = (control.send(&last, &[]), &last) {
        // The shim is gone, or this was typed by hand: the status, and a line where one may be read.
        eprintln!("kata-like-vmm: {}", end.detail);
    }
    // Not `return`: a vCPU thread that did not stop must not hold the process up.
    std::process::exit(status.into())
}

/// A bug's panic is an end like others, as long as this thread can still say so.
fn run(machine: Machine, control: &Channel) -> End {
    catch_unwind(AssertUnwindSafe(|| machine.run(control))).unwrap_or_else(|_| End {
        reason: EndReason::Failed,
        detail: "run the VM: the VMM panicked, its standard error says where".to_owned(),
        log_tail: Vec::new(),
    })
}

fn start(control: &Channel) -> Result<Machine, String> {
    kata_like_jail::close_other_fds(&[CONTROL_FD]).map_err(|error| one_line(&error))?;
    let (boot, fds) = VmBoot::receive(control)
        .map_err(|error| format!("take the VMM's boot request: {}", one_line(&error)))?;
    // A shim that never reads must not hold the VM's thread up.
    control
        .set_nonblocking()
        .map_err(|error| one_line(&error))?;
    Machine::build(boot, fds).map_err(|error| one_line(&error))
}
