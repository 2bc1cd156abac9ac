//! The keeper: holds one VM with an interrupt controller and one vCPU open, and never runs it.
//!
//! Why: KVM switches a static key in the scheduler when its first VM comes and its last one goes.
//! Under QEMU's multi-threaded emulation that code patching races with running code, and the host's
//! kernel oopses within some 50 cycles. While a VM is open the key stays as it is. `setup` starts
//! the keeper before anything else can open /dev/kvm, and the keeper lives as long as the host.

use std::io::{self, Write};
use std::process::ExitCode;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// The first argument that makes this program a keeper.
pub const ROLE: &str = "keeper";

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
            println!("hold a VM: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The VM and its vCPU; an error says which step failed.
fn hold() -> Result<(VmFd, VcpuFd), String> {
    let failed = |step: &'static str| move |errno| format!("{step}: {errno}");
    let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
    let vm = kvm.create_vm().map_err(failed("make a VM"))?;
    vm.create_irq_chip()
        .map_err(failed("make its interrupt controller"))?;
    let vcpu = vm.create_vcpu(0).map_err(failed("make its vCPU"))?;
    Ok((vm, vcpu))
}
