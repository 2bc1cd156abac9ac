//! The process: boot request in, jail, run, report and exit status out.
//!
//! The shim starts it with one connected socket as descriptor 3 and nothing else (crate `boot`). All
//! that it ever says goes there; it prints nothing.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use kata_like_boot::{CONTROL_FD, Channel, End, EndReason, VmBoot, VmReport};
use kata_like_vmm::machine::Machine;
use kata_like_vmm::one_line;
use rustix::fs::OFlags;

fn main() -> ExitCode {
    // SAFETY: descriptor 3 is this process's by contract and nothing in it has touched it; where it
    // is not open, every call on it fails with EBADF.
    let control = Channel::from_fd(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    let end = match start(&control) {
        Ok(machine) => machine.run(&control),
        Err(detail) => End {
            reason: EndReason::Failed,
            detail,
            log_tail: Vec::new(),
        },
    };
    let status = end.reason.exit_status();
    // The shim may be gone: then the status is all that is left to say.
    let _ = control.send(&VmReport::Ended(end), &[]);
    // Not `return`: a vCPU thread that did not stop must not hold the process up.
    std::process::exit(status.into())
}

fn start(control: &Channel) -> Result<Machine, String> {
    kata_like_jail::close_other_fds(&[CONTROL_FD]).map_err(|error| one_line(&error))?;
    let (boot, fds) = VmBoot::receive(control).map_err(|error| one_line(&error))?;
    // A shim that never reads must not hold the VM's thread up: a full socket is then an error.
    rustix::fs::fcntl_getfl(control)
        .and_then(|flags| rustix::fs::fcntl_setfl(control, flags | OFlags::NONBLOCK))
        .map_err(|errno| format!("make the control socket non-blocking: {errno}"))?;
    Machine::build(boot, fds).map_err(|error| one_line(&error))
}
