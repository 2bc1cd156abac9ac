//! The VM as KVM knows it: memory slots, interrupts, notifications, vCPUs and their first state.
//!
//! Called by `machine`. Only this file, `vcpu` and `figures` speak to KVM. Facts: Linux
//! Documentation/virt/kvm/api.rst.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid;
use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS, START_INFO};
use crate::memory::Memory;

const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const RFLAGS_RESERVED: u64 = 2;

/// Offsets of LVT LINT0 and LINT1 in the local APIC's page, and their delivery modes.
const LAPIC_LINT: [(usize, u32); 2] = [(0x350, 0x700), (0x360, 0x400)];

/// Why KVM gives no VM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// KVM's version is another one; it has been fixed since 2007.
    #[error("use /dev/kvm: its API version is {0}, not {KVM_API_VERSION}: this is no KVM")]
    NoKvm(i32),
    /// This KVM is too old, or lacks an extension.
    #[error("use /dev/kvm: it lacks {0}")]
    Lacks(&'static str),
    /// No VM could be made; the usual reason is another hypervisor.
    #[error("create a virtual machine: the CPU's virtualisation is in use by another hypervisor")]
    Busy(#[source] errno::Error),
    #[error("{step}")]
    Ioctl {
        step: &'static str,
        #[source]
        source: errno::Error,
    },
    /// There are more CPUID entries than KVM takes.
    #[error("set the guest's CPUID: too many leaves")]
    Cpuid,
    /// The layout names an address that KVM can't have: a bug of ours.
    #[error("find guest memory at {0:#x} in our own")]
    Address(u64),
}

fn ioctl(step: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Ioctl { step, source }
}

pub struct Vm {
    fd: VmFd,
    supported: CpuId,
    /// KVM maps it into the VM. It must outlive `fd`: it is dropped after it.
    _memory: Arc<Memory>,
}

impl Vm {
    /// Makes a VM with this memory, an interrupt controller and no vCPU.
    pub fn new(kvm: OwnedFd, memory: Arc<Memory>) -> Result<Self, KvmError> {
        // SAFETY: we own the descriptor and give it up here. Whether it is KVM's is checked next;
        // an ioctl to any other descriptor fails without touching our memory.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::NoKvm(version));
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("ask KVM which CPU features it supports"))?;
        let fd = kvm.create_vm().map_err(|source| match source.errno() {
            libc::EBUSY => KvmError::Busy(source),
            _ => ioctl("create a virtual machine")(source),
        })?;
        fd.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(ioctl("place KVM's identity map"))?;
        fd.set_tss_address(KVM_TSS)
            .map_err(ioctl("place KVM's TSS"))?;
        fd.create_irq_chip()
            .map_err(ioctl("create the VM's interrupt controllers"))?;
        add_memory(&fd, &memory)?;
        Ok(Self {
            fd,
            supported,
            _memory: memory,
        })
    }

    /// The CPU features that KVM supports.
    pub fn supported_cpuid(&self) -> &CpuId {
        &self.supported
    }

    /// The VM's descriptor, for its statistics.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Makes vCPU `id` of `count`. Number 0 begins at `entry`; the others wait for its start-up
    /// IPI.
    pub fn create_vcpu(&self, id: u8, count: u8, entry: GuestAddress) -> Result<VcpuFd, KvmError> {
        let vcpu = self
            .fd
            .create_vcpu(u64::from(id))
            .map_err(ioctl("create a vCPU"))?;
        let cpuid = cpuid::for_vcpu(&self.supported, id, count).ok_or(KvmError::Cpuid)?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(ioctl("set a vCPU's CPUID"))?;
        set_msrs(&vcpu)?;
        set_local_apic(&vcpu)?;
        if id == 0 {
            enter_by_pvh(&vcpu, entry)?;
        }
        Ok(vcpu)
    }

    /// From now on a write to `irq` raises interrupt `pin` in the guest.
    pub fn connect_interrupt(&self, irq: &EventFd, pin: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(irq, pin)
            .map_err(ioctl("connect a device's interrupt"))
    }

    /// From now on the guest's 32-bit write of `value` to `address` signals `kick`, without an exit
    /// to us.
    pub fn connect_notification(
        &self,
        kick: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), value)
            .map_err(ioctl("connect a queue's notification"))
    }
}

fn add_memory(fd: &VmFd, memory: &Memory) -> Result<(), KvmError> {
    for (index, range) in (0u32..).zip(memory.ranges()) {
        let address = memory
            .ram()
            .get_host_address(range.start)
            .map_err(|_| KvmError::Address(range.start.0))?;
        let slot = kvm_userspace_memory_region {
            slot: index,
            flags: 0,
            guest_phys_addr: range.start.0,
            memory_size: range.length,
            userspace_addr: address.addr() as u64,
        };
        // SAFETY: from here on KVM writes to the slot's range whenever the guest does.
        // - The range is mapped: start and length are those of one region of `memory`.
        // - It stays mapped: `Memory` never unmaps (see its module).
        // - No reference aliases it: we reach guest memory only through volatile access.
        // - Slots are disjoint: `layout::ram_ranges` makes one below and one above 4 GiB.
        unsafe { fd.set_user_memory_region(slot) }.map_err(ioctl("give the VM its memory"))?;
    }
    Ok(())
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT, MTRR_ENABLED_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Cpuid)?;
    vcpu.set_msrs(&msrs)
        .map_err(ioctl("set a vCPU's model-specific registers"))?;
    Ok(())
}

/// LINT0 takes the external interrupt and LINT1 the NMI, as the MP table says.
fn set_local_apic(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let step = "set a vCPU's local APIC";
    let mut apic = vcpu.get_lapic().map_err(ioctl(step))?;
    for (offset, mode) in LAPIC_LINT {
        let Some(register) = apic.regs.get_mut(offset..offset + 4) else {
            continue;
        };
        for (byte, value) in register.iter_mut().zip(mode.to_le_bytes()) {
            *byte = value as libc::c_char;
        }
    }
    vcpu.set_lapic(&apic).map_err(ioctl(step))
}

/// The state that PVH promises: 32-bit protected mode, flat segments, no paging, `ebx` pointing to
/// the start info.
fn enter_by_pvh(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    let step = "set the boot vCPU's registers";
    let mut special = vcpu.get_sregs().map_err(ioctl(step))?;
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    special.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (special.ds, special.es, special.ss) = (data, data, data);
    (special.fs, special.gs) = (data, data);
    special.tr = kvm_segment {
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    special.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    special.cr3 = 0;
    special.cr4 = 0;
    special.efer = 0;
    vcpu.set_sregs(&special).map_err(ioctl(step))?;
    let general = kvm_regs {
        rip: entry.0,
        rbx: START_INFO.0,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&general).map_err(ioctl(step))
}
