//! What each vCPU of a VM does, and how far each queue of its devices has come. The shim asks for
//! this when a guest shows no progress.
//!
//! All of it is the guest's word or follows from it. Each text is one line.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many vCPUs are in [`VmState::short`].
const SHORT: usize = 2;

/// A VM at one moment. Its text is one line, of about 100 bytes for each vCPU and each queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// By number. `None`: the vCPU did not leave the guest, or a device, in time.
    pub vcpus: Vec<Option<VcpuState>>,
    /// The queues of all devices that the guest's drivers have switched on.
    pub queues: Vec<QueueState>,
}

/// A vCPU just after it has left the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// KVM's view of the vCPU.
    pub activity: Activity,
    /// The address of the next instruction.
    pub rip: u64,
    /// The privilege level: 0 for the kernel, 3 for a program.
    pub privilege: u8,
    /// Whether the vCPU takes interrupts (RFLAGS.IF).
    pub interrupts: bool,
    /// The vectors that wait in the local APIC (IRR); hexadecimal in the text.
    pub pending: Vec<u8>,
    /// The vectors in service (ISR).
    pub in_service: Vec<u8>,
    /// TSC ticks until the local APIC's deadline. Below 0: the deadline has passed without an
    /// interrupt. `None`: no deadline is set.
    pub timer: Option<i64>,
}

/// What a vCPU does, by `struct kvm_mp_state` (Linux Documentation/virt/kvm/api.rst 4.38).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// It executes instructions.
    Running,
    /// It has executed HLT and waits for an interrupt.
    Halted,
    /// It waits for its start-up IPI from the boot processor.
    NotStarted,
}

/// A queue of an active device (virtio 1.2, 2.7). The indices are the ring's own 16-bit numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// N of the guest's `virtio-mmio.N`.
    pub slot: u32,
    /// The kind of the device, for example `Vsock`.
    pub device: String,
    /// The device's InterruptStatus: the bits that the driver has not acknowledged.
    pub interrupt: u32,
    /// The queue's number in its device, from 0.
    pub queue: u32,
    /// The driver's index: how many chains it has made available.
    pub available: u16,
    /// The device's index: how many it has given back.
    pub used: u16,
    /// `avail_event` and `used_event`, if VIRTIO_F_EVENT_IDX was negotiated.
    pub events: Option<(u16, u16)>,
}

impl VmState {
    /// What the first vCPUs do.
    pub fn short(&self) -> String {
        let vcpus = self.vcpus.iter().enumerate().take(SHORT);
        let vcpus: Vec<String> = vcpus.map(|(number, vcpu)| line(number, vcpu)).collect();
        vcpus.join("; ")
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpus = self.vcpus.iter().enumerate();
        let vcpus = vcpus.map(|(number, vcpu)| line(number, vcpu));
        let queues = self.queues.iter().map(QueueState::to_string);
        to.write_str(&vcpus.chain(queues).collect::<Vec<_>>().join("; "))
    }
}

fn line(number: usize, vcpu: &Option<VcpuState>) -> String {
    match vcpu {
        Some(vcpu) => format!("vCPU {number} {vcpu}"),
        None => format!("vCPU {number} does not come out of the guest"),
    }
}

impl fmt::Display for VcpuState {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let activity = match self.activity {
            Activity::Running => "runs",
            Activity::Halted => "is halted",
            Activity::NotStarted => return to.write_str("is not started"),
        };
        let whose = match self.privilege {
            0 => "the kernel",
            _ => "a program",
        };
        let interrupts = if self.interrupts { "on" } else { "off" };
        write!(
            to,
            "{activity} at {:#x} in {whose}, interrupts {interrupts}, pending {:02x?}, in service {:02x?}, ",
            self.rip, self.pending, self.in_service
        )?;
        match self.timer {
            None => to.write_str("no timer"),
            Some(ticks @ 0..) => write!(to, "timer in {ticks} ticks"),
            Some(ticks) => write!(to, "timer overdue for {} ticks", ticks.unsigned_abs()),
        }
    }
}

impl fmt::Display for QueueState {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            to,
            "slot {} ({}) interrupt {:#x} queue {}: available {} used {}",
            self.slot, self.device, self.interrupt, self.queue, self.available, self.used
        )?;
        match self.events {
            Some((avail, used)) => write!(to, " avail_event {avail} used_event {used}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_is_one_line() {
        let vcpu = VcpuState {
            activity: Activity::Halted,
            rip: 0xffff_ffff_8100_0000,
            privilege: 0,
            interrupts: true,
            pending: vec![0x22, 0xec],
            in_service: Vec::new(),
            timer: Some(-7),
        };
        let state = VmState {
            vcpus: vec![Some(vcpu), None, None],
            queues: vec![QueueState {
                slot: 2,
                device: "Vsock".to_owned(),
                interrupt: 1,
                queue: 1,
                available: 3,
                used: 2,
                events: Some((3, 0)),
            }],
        };
        let vcpus = "vCPU 0 is halted at 0xffffffff81000000 in the kernel, interrupts on, \
            pending [22, ec], in service [], timer overdue for 7 ticks; \
            vCPU 1 does not come out of the guest";
        assert_eq!(state.short(), vcpus);
        let queue =
            "slot 2 (Vsock) interrupt 0x1 queue 1: available 3 used 2 avail_event 3 used_event 0";
        let third = "vCPU 2 does not come out of the guest";
        assert_eq!(state.to_string(), format!("{vcpus}; {third}; {queue}"));
    }
}
