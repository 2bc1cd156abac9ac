//! Real guests under real KVM: how they start, which devices they get later, how they end.
//!
//! `devices` tests what passes through vsock and fs; here an fs device is unbound and bound again.
//!
//! Needs a `/dev/kvm` that runs 64-bit guests, root, a C compiler, the guest kernel as
//! `KATA_LIKE_KERNEL` with its `printk.json` beside it, and the fs server's binary as
//! `KATA_LIKE_FSD`. So it runs inside the test host.

mod inputs;
#[path = "../parts/mod.rs"]
mod parts;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use inputs::{faulting_kernel, init, setup};
use kata_like_boot::{Activity, Channel, EndReason, HugePages, VcpuState, VmCommand, VmReport};
use kata_like_limits::{Patience, in_time};
use parts::guest::{Guest, Setup};
use parts::host::disk;
use parts::server::FsServer;
use parts::{cpio, kernel, temporary};
use rustix::process::Signal;

/// init runs on every vCPU and asks for a reset; the VMM says so and ends.
#[test]
fn a_guest_boots_and_resets() {
    // Memory from the minimum to some above 4 GiB.
    for (vcpus, memory_mib) in [(1, 64), (2, 256), (4, 5 << 10)] {
        let guest = Guest::start(&Setup {
            memory_mib,
            ..setup("reset", vcpus)
        });
        let end = guest.end();
        assert_eq!(end.reason, EndReason::Reset, "{end:?}");
        let said = format!("init: {vcpus} cpus, reset");
        assert!(
            end.log_tail.iter().any(|line| line.contains(&said)),
            "{end:?}"
        );
    }
}

/// A device is filled in and bound long after boot, while two vCPUs run: virtio-mmio can't
/// hot-plug.
#[test]
fn a_device_is_added_after_boot_under_two_vcpus() {
    let mut guest = Guest::start(&setup("entropy", 2));
    assert_eq!(guest.report(), VmReport::Running);
    guest.wait_for("init: 2 cpus");
    let filled = guest.ask(VmCommand::AddEntropy);
    if matches!(filled, VmReport::Refused { .. }) {
        // Without RDRAND the device is there from the start, and its slot is taken.
        assert!(format!("{filled:?}").contains("already"), "{filled:?}");
    } else {
        assert_eq!(filled, VmReport::SlotFilled { slot: 3 });
        let again = guest.ask(VmCommand::AddEntropy);
        assert!(matches!(again, VmReport::Refused { .. }), "{again:?}");
    }
    guest.wait_for("entropy: 32 bytes, random");
}

/// The guest's kernel accepts its CPUs, however many there are, also more than eight.
#[test]
fn the_guest_s_kernel_has_no_complaint_about_its_cpus() {
    for vcpus in [1, 2, 10] {
        let mut guest = Guest::start(&setup("cpus", vcpus));
        guest.wait_until_running();
        let log = guest.wait_for(&format!("init: {vcpus} cpus"));
        for complaint in ["WARNING", "BUG:", "XSAVE consistency", "[Firmware Bug]"] {
            assert!(!log.contains(complaint), "{complaint:?} in:\n{log}");
        }
        let log = guest.wait_for("cpus: ");
        // One package, a core each, no shared thread, and no virtualisation to nest with.
        let wanted = format!("cpus: 1 packages, {vcpus} cores, threads alone, nesting none");
        assert!(log.contains(&wanted), "{log}");
    }
}

/// Disks come long after boot, under two vCPUs, and go. They leave their slots free, and nothing
/// else.
#[test]
fn disks_come_and_go_after_boot() {
    let mut guest = Guest::start(&setup("disks", 2));
    guest.wait_until_running();
    guest.wait_for("init: 2 cpus");
    let before = guest.holdings();
    for round in 1..=2 {
        let writable = disk(&format!("disk {round}."));
        let slot = |slot| VmReport::SlotFilled { slot };
        let kept = disk("to be kept");
        assert_eq!(guest.add_disk(&writable, false), slot(12));
        assert_eq!(guest.add_disk(&kept, true), slot(13));
        let log = guest.wait_for(&format!("disk {round}: over"));
        for line in [
            format!("disk {round}: wrote 1048576, synced 0, read 1048576 of '{round}'"),
            format!("disk {round}: size {}", 64 << 20),
            format!("disk {round}: read-only 512 bytes, for writing -1"),
        ] {
            assert!(log.contains(&line), "no {line:?} in:\n{log}");
        }
        let mut written = vec![0; 1 << 20];
        writable.read_exact_at(&mut written, 1 << 20).unwrap();
        assert!(written.iter().all(|byte| *byte == b'0' + round));
        guest.remove_disk(12);
        guest.remove_disk(13);
        assert_eq!(guest.holdings(), before);
    }
    assert_eq!(
        guest.add_disk(&disk("disk 3."), false),
        VmReport::SlotFilled { slot: 12 }
    );
    guest.wait_for("disk 3: held");
    for refusal in [
        guest.ask(VmCommand::RemoveDisk { slot: 12 }),
        guest.ask(VmCommand::RemoveDisk { slot: 13 }),
        guest.ask(VmCommand::RemoveDisk { slot: 2 }),
    ] {
        assert!(matches!(refusal, VmReport::Refused { .. }), "{refusal:?}");
    }
    for slot in 13..16 {
        let filled = guest.add_disk(&disk("more"), false);
        assert_eq!(filled, VmReport::SlotFilled { slot });
    }
    let full = guest.add_disk(&disk("too many"), false);
    assert!(format!("{full:?}").contains("all 4 slots"), "{full:?}");
}

#[test]
fn a_panic_is_told_with_its_reason() {
    let end = Guest::start(&setup("panic", 1)).end();
    assert_eq!(end.reason, EndReason::Panic, "{end:?}");
    assert!(end.detail.contains("Attempted to kill init"), "{end:?}");
}

/// The first instruction is undefined: without an interrupt table that is a triple fault.
#[test]
fn a_triple_fault_is_told() {
    let image = temporary(&faulting_kernel());
    let end = Guest::start_with(&setup("none", 1), image, temporary(&cpio(&[]))).end();
    assert_eq!(end.reason, EndReason::TripleFault, "{end:?}");
}

/// From the first KVM_RUN on the process owns nothing that it could misuse.
#[test]
fn the_running_vmm_is_jailed() {
    let mut guest = Guest::start(&setup("hang", 1));
    guest.wait_until_running();
    let process = format!("/proc/{}", guest.vmm.id());
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let uid = guest.uid.to_string();
    let ids = [uid.as_str(); 4].join("\t");
    let none = "0000000000000000";
    for line in [
        format!("Uid:\t{ids}"),
        format!("Gid:\t{ids}"),
        "Groups:\t ".to_owned(),
        format!("CapEff:\t{none}"),
        format!("CapPrm:\t{none}"),
        format!("CapBnd:\t{none}"),
        "NoNewPrivs:\t1".to_owned(),
        "Seccomp:\t2".to_owned(),
    ] {
        assert!(
            status.lines().any(|found| found == line),
            "{line:?} in {status}"
        );
    }
    let threads = fs::read_dir(format!("{process}/task")).unwrap();
    let threads: Vec<_> = threads.map(|thread| thread.unwrap().path()).collect();
    // Loop, watchdog, life, vCPU, interfaces, disks; some kernels have one of KVM's own.
    assert!(matches!(threads.len(), 16 | 17), "{}", threads.len());
    for thread in threads {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        // That of the boot, and its own.
        for line in ["Seccomp:\t2", "Seccomp_filters:\t2"] {
            assert!(status.contains(line), "{status}");
        }
    }
    let root = fs::read_dir(format!("{process}/root")).unwrap();
    assert_eq!(root.count(), 0, "the root directory is not empty");
    let mounts = |of: &str| fs::read_link(format!("{of}/ns/mnt")).unwrap();
    assert_ne!(mounts(&process), mounts("/proc/self"));
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    for (what, most) in [
        ("Max core file size", 0),
        ("Max file size", 0),
        ("Max open files", 1280),
        ("Max processes", 17),
        ("Max address space", 512 << 20),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(what));
        let words: Vec<&str> = line.unwrap_or_default().split_whitespace().collect();
        let most = most.to_string();
        assert_eq!(words[..2], [&most, &most], "{what} in {limits}");
    }
}

/// A pool of huge pages that is too small is an error of one line; a large enough one serves.
#[test]
fn memory_of_huge_pages_is_claimed_at_once() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let before = fs::read_to_string(POOL).unwrap();
    let huge = || Setup {
        huge_pages: HugePages::Hugetlb,
        ..setup("reset", 1)
    };
    fs::write(POOL, "0").unwrap();
    let refused = Guest::start(&huge()).end();
    fs::write(POOL, "128").unwrap();
    let served = Guest::start(&huge()).end();
    fs::write(POOL, before).unwrap();
    assert_eq!(refused.reason, EndReason::Failed, "{refused:?}");
    let words = "128 pages of 2 MiB needed, 0 free";
    assert!(refused.detail.contains(words), "{refused:?}");
    assert_eq!(served.reason, EndReason::Reset, "{served:?}");
}

/// A jailed VMM says where each vCPU stands, as often as the shim asks.
#[test]
fn what_each_vcpu_does_is_told() {
    const KERNEL: u64 = 0xffff_ffff_8000_0000;
    let mut idle = Guest::start(&setup("hang", 2));
    idle.wait_until_running();
    idle.wait_for("init: 2 cpus, hang");
    for vcpus in halted(&mut idle) {
        assert_eq!(vcpus.len(), 2);
        for vcpu in vcpus {
            assert!(vcpu.rip >= KERNEL && vcpu.privilege == 0, "{vcpu:?}");
            assert!(vcpu.interrupts && vcpu.in_service.is_empty(), "{vcpu:?}");
        }
    }
    let mut busy = Guest::start(&setup("spin", 1));
    busy.wait_until_running();
    busy.wait_for("init: 1 cpus, spin");
    std::thread::sleep(Duration::from_millis(200));
    let (mut programs, asked) = (0, 5);
    for _ in 0..asked {
        let vcpus = busy.state().vcpus;
        let [Some(vcpu)] = &vcpus[..] else {
            panic!("{vcpus:?}");
        };
        assert_eq!(vcpu.activity, Activity::Running, "{vcpu:?}");
        // A timer's interrupt may be in service just then.
        programs += usize::from(vcpu.privilege == 3 && vcpu.rip < KERNEL);
    }
    assert!(programs > 0, "never in the program that spins");
}

/// What the vCPUs of an idle guest do, twice: each time as soon as all are halted.
fn halted(guest: &mut Guest) -> [Vec<VcpuState>; 2] {
    let mut once = || {
        let patience = Patience::new(Duration::from_secs(20));
        loop {
            let vcpus: Option<Vec<VcpuState>> = guest.state().vcpus.into_iter().collect();
            match vcpus {
                Some(vcpus) if vcpus.iter().all(|vcpu| vcpu.activity == Activity::Halted) => {
                    return vcpus;
                }
                other => assert!(!patience.is_over(), "{other:?}"),
            }
        }
    };
    [once(), once()]
}

/// Whatever the guest does, a stop or a lost shim ends the process at once.
#[test]
fn a_guest_that_spins_or_sleeps_is_stopped() {
    for scenario in ["spin", "hang"] {
        let mut guest = Guest::start(&setup(scenario, 2));
        assert_eq!(guest.report(), VmReport::Running);
        guest.wait_for(scenario);
        guest.control.send(&VmCommand::Stop, &[]).unwrap();
        let asked = Instant::now();
        assert_eq!(guest.end().reason, EndReason::Stopped);
        assert!(
            in_time(asked.elapsed(), Duration::from_secs(2)),
            "{:?}",
            asked.elapsed()
        );
    }
    let mut guest = Guest::start(&setup("spin", 1));
    guest.wait_until_running();
    let (unused, _) = Channel::pair().unwrap();
    drop(std::mem::replace(&mut guest.control, unused));
    let left = Instant::now();
    assert_eq!(guest.vmm.wait().unwrap().code(), Some(0));
    assert!(
        in_time(left.elapsed(), Duration::from_secs(2)),
        "{:?}",
        left.elapsed()
    );
}

/// The stats of a boot to init: later work is measured against them.
#[test]
fn the_figures_count_exits_and_memory() {
    let mut guest = Guest::start(&setup("hang", 1));
    guest.wait_until_running();
    guest.wait_for("init: 1 cpus");
    let figures = guest.figures();
    println!("boot to init: {figures:?}");
    assert!(
        figures.exits > figures.user_exits && figures.user_exits > 50,
        "{figures:?}"
    );
    assert!(figures.resident_bytes > 8 << 20, "{figures:?}");
    assert!(figures.resident_bytes <= 256 << 20, "{figures:?}");
}

/// Each bad input gives one line that names what is wrong, and the process is gone.
#[test]
fn bad_input_fails_in_one_line() {
    let file = || -> OwnedFd { File::open(kernel()).unwrap().into() };
    let good = cpio(&[("init", 0o100755, init())]);
    let image = fs::read(kernel()).unwrap();
    let small = Setup {
        memory_mib: 64,
        ..setup("reset", 1)
    };
    let large_initrd = vec![0; 48 << 20];
    let none = setup("reset", 0);
    let huge = Setup {
        memory_mib: 1 << 20,
        ..setup("reset", 1)
    };
    let normal = setup("reset", 1);
    let no_kvm = Setup {
        kvm: "/dev/null",
        ..setup("reset", 1)
    };
    let cases = [
        (
            &normal,
            temporary(&image[..image.len() / 2]),
            temporary(&good),
            "complete",
        ),
        (&normal, temporary(b"#!/bin/sh\n"), temporary(&good), "ELF"),
        (&normal, file(), temporary(b""), "empty"),
        (
            &normal,
            file(),
            temporary(b"no archive\n"),
            "no cpio archive",
        ),
        (
            &normal,
            file(),
            temporary(&good[..good.len() / 2]),
            "cut off",
        ),
        (&huge, file(), temporary(&good), "the host has"),
        (&small, file(), temporary(&large_initrd), "memory"),
        (&none, file(), temporary(&good), "vCPUs"),
        (&no_kvm, file(), temporary(&good), "no KVM"),
    ];
    for (setup, kernel_image, initrd, word) in cases {
        let end = Guest::start_with(setup, kernel_image, initrd).end();
        assert_eq!(end.reason, EndReason::Failed, "{end:?}");
        assert!(
            end.detail.contains(word) && !end.detail.contains('\n'),
            "{end:?}"
        );
    }
}

/// A device that the guest has reset serves again. The server's death ends the VM.
#[test]
fn a_share_is_bound_again_and_its_server_missed() {
    let server = FsServer::start(&["rootfs", "volumes"]);
    fs::write(server.path("rootfs/greeting"), "from the host").unwrap();
    let volume = server.mount("volumes/v");
    let mut guest = Guest::start(&Setup {
        shares: server.connections(),
        ..setup("fs", 2)
    });
    guest.wait_until_running();
    let log = guest.wait_for("fs: from the host");
    assert!(!log.contains("no second bind"), "{log}");
    let answer = fs::read_to_string(volume.join("answer"));
    assert_eq!(answer.unwrap_or_default(), "from the guest", "{log}");
    server.signal(Signal::KILL);
    let died = Instant::now();
    let end = guest.end();
    assert!(
        in_time(died.elapsed(), Duration::from_secs(1)),
        "{:?}",
        died.elapsed()
    );
    assert_eq!(end.reason, EndReason::Failed, "{end:?}");
    assert!(end.detail.contains("fs server is gone"), "{end:?}");
}

/// A server that hangs when the guest's driver switches its device on counts as dead.
#[test]
fn a_share_whose_server_hangs_ends_the_vm() {
    let server = FsServer::start(&["rootfs", "volumes"]);
    let connections = server.connections();
    server.signal(Signal::STOP);
    let mut guest = Guest::start(&Setup {
        shares: connections,
        ..setup("fs", 1)
    });
    guest.wait_until_running();
    let started = Instant::now();
    let end = guest.end();
    assert!(in_time(started.elapsed(), Duration::from_secs(20)));
    assert_eq!(end.reason, EndReason::Failed, "{end:?}");
    let words = ["rootfs", "has not answered for 10s"];
    assert!(
        words.iter().all(|word| end.detail.contains(word)),
        "{end:?}"
    );
}
