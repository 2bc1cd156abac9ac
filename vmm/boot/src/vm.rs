//! The VMM's boot request, the commands it obeys and what it reports.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use crate::{BOOT_DEADLINE, Channel, ChannelError, PrintkLayout, VERSION, VmState};

/// The size of the header before each frame of a tap, in bytes: `struct virtio_net_hdr_v1` (virtio
/// 1.2, 5.1.6).
pub const TAP_HEADER: usize = 12;

/// The host's pages behind guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// A memfd advised huge: 2 MiB pages if the host allows them, else 4 KiB.
    Transparent,
    /// A hugetlb memfd of 2 MiB pages; fails if the host's pool is too small.
    Hugetlb,
}

/// One virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmShare {
    /// The tag by which the guest mounts it: 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
}

/// Everything that a VM is made from, except the descriptors in [`VmFds`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmBoot {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// The user and group id that the VMM takes; not 0.
    pub uid: u32,
    /// Guest memory in bytes; a multiple of 2 MiB, at least 64 MiB.
    pub memory_bytes: u64,
    /// Number of vCPUs; 1 to 32.
    pub vcpus: u8,
    /// The host's pages behind guest memory.
    pub huge_pages: HugePages,
    /// The vsock port of the host that the agent dials once.
    pub agent_port: u32,
    /// The vsock port of the guest to which each connection to the `streams` socket goes.
    pub stream_port: u32,
    /// The virtio-fs devices, at most two; each has a vhost-user socket in [`VmFds::shares`].
    pub shares: Vec<VmShare>,
    /// The layout of the guest's log. Without it there is no guest log.
    pub printk: Option<PrintkLayout>,
}

/// The descriptors beside a [`VmBoot`], in this order.
#[derive(Debug)]
pub struct VmFds {
    /// `/dev/kvm`, opened for reading and writing.
    pub kvm: OwnedFd,
    /// The guest kernel, an ELF image; only read.
    pub kernel: OwnedFd,
    /// The initrd; only read.
    pub initrd: OwnedFd,
    /// A connected stream socket. The guest's one connection to `agent_port` is joined to it.
    pub agent: OwnedFd,
    /// A listening stream socket. Each connection to it becomes one to `stream_port`.
    pub streams: OwnedFd,
    /// A connected vhost-user socket per share of the request.
    pub shares: Vec<OwnedFd>,
}

const FIXED_FDS: usize = 5;

impl VmBoot {
    /// Sends the request, for the shim. The descriptors can be closed afterwards.
    pub fn send(&self, fds: &VmFds, to: &Channel) -> Result<(), ChannelError> {
        let mut all: Vec<BorrowedFd> = vec![
            fds.kvm.as_fd(),
            fds.kernel.as_fd(),
            fds.initrd.as_fd(),
            fds.agent.as_fd(),
            fds.streams.as_fd(),
        ];
        all.extend(fds.shares.iter().map(AsFd::as_fd));
        to.send(self, &all)
    }

    /// Receives the request, for the VMM. It must come within ten seconds. Checks version and
    /// number of descriptors, but no values.
    pub fn receive(from: &Channel) -> Result<(Self, VmFds), ChannelError> {
        let (boot, fds): (Self, _) = from.receive_within(BOOT_DEADLINE)?;
        if boot.version != VERSION {
            return Err(ChannelError::Version {
                theirs: boot.version,
                ours: VERSION,
            });
        }
        let (got, wanted) = (fds.len(), FIXED_FDS + boot.shares.len());
        let mut rest = fds.into_iter();
        let mut next = || rest.next().ok_or(ChannelError::Descriptors { got, wanted });
        let fixed = VmFds {
            kvm: next()?,
            kernel: next()?,
            initrd: next()?,
            agent: next()?,
            streams: next()?,
            shares: rest.collect(),
        };
        if got != wanted {
            return Err(ChannelError::Descriptors { got, wanted });
        }
        Ok((boot, fixed))
    }
}

/// What the shim may ask of a running VMM. One [`VmReport`] answers each command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmCommand {
    /// Counts exits and memory. Answer: [`VmReport::Figures`].
    Figures,
    /// Tells new lines of the guest's log. Answer: [`VmReport::Log`].
    ReadLog,
    /// Fills the entropy device's slot. Answer: [`VmReport::SlotFilled`] or [`VmReport::Refused`].
    AddEntropy,
    /// Fills a free slot with a disk. The descriptor beside the command is a block device or a
    /// regular file, open for reading and, unless `read_only`, for writing. Its content is never
    /// interpreted, and the VMM asks nothing of it. Answer: [`VmReport::SlotFilled`] or
    /// [`VmReport::Refused`].
    AddDisk {
        /// Whether the disk refuses writes.
        read_only: bool,
        /// Its size; at least 512.
        bytes: u64,
        /// The size of its own blocks in bytes; a power of two from 512 to 65,536.
        block_size: u32,
    },
    /// Empties a disk's slot that its driver has let go. Answer: [`VmReport::SlotEmptied`] or
    /// [`VmReport::Refused`].
    RemoveDisk {
        /// The number that [`VmReport::SlotFilled`] gave.
        slot: u32,
    },
    /// Fills a free slot with a network interface. The descriptor beside the command is a tap,
    /// attached with `IFF_NO_PI` and `IFF_VNET_HDR`, non-blocking, with headers of [`TAP_HEADER`]
    /// bytes. Answer: [`VmReport::SlotFilled`] or [`VmReport::Refused`].
    AddInterface {
        /// The Ethernet address.
        mac: [u8; 6],
        /// In bytes, at least 68.
        mtu: u16,
    },
    /// Empties an interface's slot that its driver has let go. Answer: [`VmReport::SlotEmptied`] or
    /// [`VmReport::Refused`].
    RemoveInterface {
        /// The number that [`VmReport::SlotFilled`] gave.
        slot: u32,
    },
    /// Tells what each vCPU does and how far each queue has come. This takes the vCPUs out of the
    /// guest for a moment. Answer: [`VmReport::State`].
    State,
    /// Ends the VM. Answer: [`VmReport::Ended`].
    Stop,
}

/// What a VMM tells the shim, unasked or as an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmReport {
    /// The VM is made and the jail is closed. The first KVM_RUN comes next.
    Running,
    /// The agent has dialled; these were the stats at that moment.
    AgentConnected(Figures),
    /// Answers [`VmCommand::Figures`].
    Figures(Figures),
    /// Answers [`VmCommand::State`].
    State(VmState),
    /// Answers [`VmCommand::ReadLog`].
    Log {
        /// Whole lines of printable ASCII; 40 KiB at most.
        text: String,
        /// Whether the next such command will have more.
        more: bool,
    },
    /// Answers [`VmCommand::AddEntropy`], [`VmCommand::AddDisk`] and [`VmCommand::AddInterface`]:
    /// the guest can bind the device as `virtio-mmio.<slot>`, counted from 0.
    SlotFilled {
        /// The number in the guest's `virtio-mmio.N`.
        slot: u32,
    },
    /// Answers [`VmCommand::RemoveDisk`] and [`VmCommand::RemoveInterface`]: the VMM has closed the
    /// descriptor.
    SlotEmptied,
    /// The command could not be carried out. The VM goes on.
    Refused {
        /// One line: what was asked, and why not.
        why: String,
    },
    /// The last message: the VM has ended, and the process ends.
    Ended(End),
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// The kind of end, which decides the exit status.
    pub reason: EndReason,
    /// One line for the user: step, object and cause.
    pub detail: String,
    /// The guest log's last lines, oldest first, cleaned of control characters.
    pub log_tail: Vec<String>,
    /// What of the guest's log was not asked for, as in [`VmReport::Log`].
    #[serde(default)]
    pub log: String,
}

/// The kinds of end. Each has an exit status of the VMM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndReason {
    /// The shim sent [`VmCommand::Stop`] or went away.
    Stopped,
    /// The guest asked for a reset by port 0x64. The shim knows whether the agent announced it.
    Reset,
    /// The guest's kernel panicked and reset the machine.
    Panic,
    /// The guest's kernel panicked because it had no memory left.
    GuestOutOfMemory,
    /// The host could not give memory that it had promised.
    HostOutOfMemory,
    /// The guest triple-faulted.
    TripleFault,
    /// The VM could not be made, or the host's KVM or the fs server failed.
    Failed,
}

impl EndReason {
    /// The VMM's exit status for this end.
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Stopped => 0,
            Self::Reset => 10,
            Self::Panic | Self::GuestOutOfMemory => 11,
            Self::TripleFault => 12,
            Self::Failed | Self::HostOutOfMemory => 1,
        }
    }

    /// Whether more memory might have prevented it.
    pub fn is_for_memory(self) -> bool {
        matches!(self, Self::GuestOutOfMemory | Self::HostOutOfMemory)
    }
}

/// Exits and memory of a VM since its first KVM_RUN, from KVM's binary statistics
/// (KVM_GET_STATS_FD, Linux Documentation/virt/kvm/api.rst 4.133) and the VMM's own counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Nanoseconds of CLOCK_MONOTONIC between the first KVM_RUN and this report.
    pub elapsed_ns: u64,
    /// Exits of all vCPUs.
    pub exits: u64,
    /// Exits that KVM handed to the VMM.
    pub user_exits: u64,
    /// Nested page faults.
    pub page_faults: u64,
    /// Pages of 2 MiB that are mapped into the guest now.
    pub huge_pages: u64,
    /// Bytes of guest memory that are resident on the host.
    pub resident_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot() -> VmBoot {
        VmBoot {
            version: VERSION,
            uid: 1000,
            memory_bytes: 128 << 20,
            vcpus: 1,
            huge_pages: HugePages::Transparent,
            agent_port: 1,
            stream_port: 2,
            shares: vec![VmShare {
                tag: "rootfs".into(),
            }],
            printk: None,
        }
    }

    fn fds(shares: usize) -> VmFds {
        let fd = || Channel::pair().unwrap().0.into_fd();
        VmFds {
            kvm: fd(),
            kernel: fd(),
            initrd: fd(),
            agent: fd(),
            streams: fd(),
            shares: (0..shares).map(|_| fd()).collect(),
        }
    }

    #[test]
    fn a_boot_request_arrives_whole() {
        let (shim, vmm) = Channel::pair().unwrap();
        boot().send(&fds(1), &shim).unwrap();
        let (got, got_fds) = VmBoot::receive(&vmm).unwrap();
        assert_eq!((got, got_fds.shares.len()), (boot(), 1));
    }

    #[test]
    fn a_missing_or_needless_descriptor_is_refused() {
        for shares in [0, 2] {
            let (shim, vmm) = Channel::pair().unwrap();
            boot().send(&fds(shares), &shim).unwrap();
            let refused = VmBoot::receive(&vmm);
            assert!(matches!(refused, Err(ChannelError::Descriptors { .. })));
        }
    }

    #[test]
    fn another_version_is_refused_with_both_numbers() {
        let (shim, vmm) = Channel::pair().unwrap();
        let other = VmBoot {
            version: VERSION + 1,
            ..boot()
        };
        other.send(&fds(1), &shim).unwrap();
        let line = VmBoot::receive(&vmm).unwrap_err().to_string();
        let both = [VERSION + 1, VERSION].map(|number| format!("version {number}"));
        assert!(both.iter().all(|words| line.contains(words)), "{line}");
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let mut document = serde_json::to_value(boot()).unwrap();
        document["kernel_path"] = "/etc/passwd".into();
        assert!(serde_json::from_value::<VmBoot>(document).is_err());
    }
}
