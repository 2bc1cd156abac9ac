//! The keeper: holds one VM with an interrupt controller and one vCPU open, and never runs it.
//!
//! Why: KVM switches a static key in the scheduler when its first VM comes and its last one goes.
//! Under QEMU's multi-threaded emulation that code patching races with running code, and the host's
//! kernel oopses within some 50 cycles. While a VM is open the key stays as it is. `setup` starts
//! the keeper before anything else can open /dev/kvm, and the keeper lives as long as the host.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

/// The first argument that makes this program a keeper.
pub const ROLE: &str = "keeper";

/// linux/kvm.h; `_IO(KVMIO, n)` is 0xAE00 | n.
const KVM_CREATE_VM: libc::c_ulong = 0xAE01;
const KVM_CREATE_IRQCHIP: libc::c_ulong = 0xAE60;
const KVM_CREATE_VCPU: libc::c_ulong = 0xAE41;

/// Opens the VM, says so on standard output, and waits for ever.
pub fn main() -> ExitCode {
    match hold() {
        Ok(_vm) => {
            println!("holding");
            let _ = io::stdout().flush();
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            println!("open a VM on /dev/kvm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> io::Result<(OwnedFd, OwnedFd)> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let vm = descriptor(kvm.as_raw_fd(), KVM_CREATE_VM)?;
    // SAFETY: `vm` is an open VM descriptor; this request takes no argument and returns a number.
    if unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CREATE_IRQCHIP, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let vcpu = descriptor(vm.as_raw_fd(), KVM_CREATE_VCPU)?;
    Ok((vm, vcpu))
}

fn descriptor(on: i32, request: libc::c_ulong) -> io::Result<OwnedFd> {
    // SAFETY: both requests take an integer (machine type, vCPU id), and 0 is valid for each; no
    // memory of ours is touched. `on` is open for the call: the caller holds its owner.
    let fd = unsafe { libc::ioctl(on, request, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: KVM returned a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
