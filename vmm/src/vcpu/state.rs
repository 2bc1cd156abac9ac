//! What a vCPU does, as KVM tells it while the vCPU's thread is outside the guest.

use kata_like_boot::{Activity, VcpuState};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_lapic_state, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

/// Offsets of the first registers in the local APIC's page: eight of 32 bits, 16 bytes apart.
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

const INTERRUPTS: u64 = 1 << 9;

/// Reads the state. Call it on the vCPU's own thread.
pub fn of(vcpu: &VcpuFd) -> Result<VcpuState, errno::Error> {
    let activity = match vcpu.get_mp_state()?.mp_state {
        KVM_MP_STATE_RUNNABLE => Activity::Running,
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::NotStarted,
    };
    let registers = vcpu.get_regs()?;
    let apic = vcpu.get_lapic()?;
    Ok(VcpuState {
        activity,
        rip: registers.rip,
        privilege: vcpu.get_sregs()?.ss.dpl,
        interrupts: registers.rflags & INTERRUPTS != 0,
        pending: vectors(&apic, REQUESTED),
        in_service: vectors(&apic, IN_SERVICE),
        timer: timer(vcpu)?,
    })
}

/// The numbers of the bits that are set among the 256 from `first` on.
fn vectors(apic: &kvm_lapic_state, first: usize) -> Vec<u8> {
    let is_set = |vector: &u8| {
        let at = first + usize::from(vector / 32) * 16 + usize::from(vector % 32 / 8);
        let byte = apic.regs.get(at).copied().unwrap_or(0) as u8; // a C char
        byte & 1 << (vector % 8) != 0
    };
    (0..=u8::MAX).filter(is_set).collect()
}

fn timer(vcpu: &VcpuFd) -> Result<Option<i64>, errno::Error> {
    let entry = |index| kvm_msr_entry {
        index,
        ..Default::default()
    };
    let mut msrs = Msrs::from_entries(&[entry(MSR_TSC), entry(MSR_TSC_DEADLINE)])
        .map_err(|_| errno::Error::new(libc::ENOMEM))?;
    vcpu.get_msrs(&mut msrs)?;
    Ok(match msrs.as_slice() {
        [now, deadline] if deadline.data != 0 => {
            Some(deadline.data.wrapping_sub(now.data).cast_signed())
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vector_is_found_in_its_register() {
        let mut apic = kvm_lapic_state::default();
        apic.regs[REQUESTED + 0x10] = 1 << 2; // 34 is bit 2 of the second register
        apic.regs[REQUESTED + 0x73] = -128; // 255 the last of the last
        assert_eq!(vectors(&apic, REQUESTED), [34, 255]);
        assert!(vectors(&apic, IN_SERVICE).is_empty());
    }
}
