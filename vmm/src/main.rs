//! The process: boot request in, jail, run, report and exit status out.
//!
//! The shim starts it with one connected socket as descriptor 3 and nothing else (crate `boot`). It
//! says everything there.

use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};
use std::process::ExitCode;

use kata_like_boot::{CONTROL_FD, Channel, End, EndReason, VmBoot, VmReport};
use kata_like_failure::one_line;
use kata_like_linux::fd::inherited;
use kata_like_vmm::machine::Machine;

fn main() -> ExitCode {
    // One arena for all threads. With many threads and arenas the C library reads files to learn
    // the number of CPUs and the overcommit policy; the jail forbids that. SAFETY: the call takes
    // two numbers, and no other thread exists that could allocate meanwhile.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // The standard hook reads files for a backtrace, which the jail forbids.
    set_hook(Box::new(|panic| {
        // Standard error may be a file, and those can't be written to in the jail.
        let _ = writeln!(io::stderr(), "kata-like-vmm: {panic}");
    }));
    let control = match inherited(CONTROL_FD) {
        Ok(control) => Channel::from_fd(control),
        Err(error) => {
            // A person started the program.
            eprintln!("kata-like-vmm: take the control socket, descriptor {CONTROL_FD}: {error}");
            std::process::exit(EndReason::Failed.exit_status().into());
        }
    };
    let end = match start(&control) {
        Ok(machine) => run(machine, &control),
        Err(detail) => End {
            reason: EndReason::Failed,
            detail,
            log_tail: Vec::new(),
            log: String::new(),
        },
    };
    let status = end.reason.exit_status();
    let last = VmReport::Ended(end);
    if let (Err(_), VmReport::Ended(end)) = (control.send(&last, &[]), &last) {
        // The shim is gone, or a person started the program: print a line, and exit with the
        // status.
        let _ = writeln!(io::stderr(), "kata-like-vmm: {}", end.detail);
    }
    // Not `return`: a vCPU thread that did not stop must not delay the exit.
    std::process::exit(status.into())
}

/// A panic is an end like others, as long as this thread can still report it.
fn run(machine: Machine, control: &Channel) -> End {
    catch_unwind(AssertUnwindSafe(|| machine.run(control))).unwrap_or_else(|_| End {
        reason: EndReason::Failed,
        detail: "run the VM: the VMM panicked, its standard error says where".to_owned(),
        log_tail: Vec::new(),
        log: String::new(),
    })
}

fn start(control: &Channel) -> Result<Machine, String> {
    kata_like_jail::close_other_fds(&[CONTROL_FD]).map_err(|error| one_line(&error))?;
    let (boot, fds) = VmBoot::receive(control)
        .map_err(|error| format!("take the VMM's boot request: {}", one_line(&error)))?;
    // A shim that never reads must not block the VM's thread.
    control
        .set_nonblocking()
        .map_err(|error| one_line(&error))?;
    Machine::build(boot, fds).map_err(|error| one_line(&error))
}
