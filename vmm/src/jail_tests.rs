//! The lists by their length and arguments, and what a thread under each of them dies of. Each test
//! that installs one forks, since a filter never goes.

use std::collections::BTreeSet;

use rustix::process::getpid;

use super::*;
use crate::virtio::life::Life;
use crate::virtio::worker::Worker;
use crate::watchdog::Watchdog;

const KINDS: [(Kind, usize); 7] = [
    (Kind::Boot, 50),
    (Kind::Loop, 28),
    (Kind::Vcpu, 14),
    (Kind::Life, 16),
    (Kind::Net, 12),
    (Kind::Disk, 12),
    (Kind::Watchdog, 12),
];

fn calls(kind: Kind) -> BTreeSet<i64> {
    let to_us = [Check::one_of(0, &[1])];
    kind.rules(&to_us).iter().map(Rule::call).collect()
}

#[test]
fn no_list_is_longer_than_it_may_be() {
    for (kind, most) in KINDS {
        let count = calls(kind).len();
        println!("{kind:?}: {count} calls");
        assert!(count <= most, "{kind:?}: {count} calls");
    }
}

/// A thread has both lists, so a call that only its own has would kill it.
#[test]
fn what_a_thread_may_is_what_the_boot_may() {
    let boot = calls(Kind::Boot);
    for (kind, _) in KINDS {
        let more: Vec<i64> = calls(kind).difference(&boot).copied().collect();
        assert!(more.is_empty(), "{kind:?}: {more:?}");
    }
}

#[test]
fn no_thread_with_the_guest_starts_or_names_anything() {
    for (kind, _) in KINDS {
        let calls = calls(kind);
        for never in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_newfstatat,
            libc::SYS_mount,
            libc::SYS_process_vm_readv,
        ] {
            assert!(!calls.contains(&never), "{kind:?}: {never}");
        }
        if kind == Kind::Boot {
            continue;
        }
        for late in [
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_mprotect,
            libc::SYS_prctl,
            libc::SYS_eventfd2,
            libc::SYS_seccomp,
        ] {
            assert!(!calls.contains(&late), "{kind:?}: {late}");
        }
    }
}

/// Runs `act` under the list of `kind` in a child, which tells it its pid. Returns the exit status,
/// or 128 + the signal that ended the child.
fn under(kind: Kind, act: impl FnOnce(i64)) -> i32 {
    // SAFETY: the child installs a filter and runs `act`, which makes system calls; glibc keeps the
    // allocator's locks sound after fork. It leaves by a system call, so nothing runs twice.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let own = getpid();
        let closed = kind
            .filter(own)
            .and_then(|filter| filter.install(Threads::Calling));
        if closed.is_err() {
            // SAFETY: exit_group takes a number.
            unsafe { libc::_exit(1) };
        }
        act(own.as_raw_nonzero().get().into());
        // SAFETY: as above. A list without it ends the child here, by the same signal; the write
        // that the tests look for has happened by then.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `pid` is our child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    match libc::WIFSIGNALED(status) {
        true => 128 + libc::WTERMSIG(status),
        false => libc::WEXITSTATUS(status),
    }
}

/// Makes a system call under a list. True: it was made; false: it killed the thread's process.
fn passes(kind: Kind, call: i64, arguments: [i64; 4]) -> bool {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let [a, b, c, d] = arguments;
    let status = under(kind, |_| {
        // SAFETY: the tests pass numbers, null pointers and -1 for descriptors. Each call fails, or
        // makes a mapping that nobody uses.
        unsafe { libc::syscall(call, a, b, c, d, -1, 0) };
        let _ = rustix::io::write(&writer, b"x");
    });
    assert!(status == 0 || status == 128 + libc::SIGSYS, "{status}");
    drop(writer);
    rustix::io::read(&reader, &mut [0u8; 1]).unwrap() == 1
}

const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;

#[test]
fn no_thread_makes_code() {
    let (data, code) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC);
    for (kind, _) in KINDS {
        for (protection, fine) in [(data, true), (code, false)] {
            let arguments = [0, 4096, protection.into(), PRIVATE];
            assert_eq!(passes(kind, libc::SYS_mmap, arguments), fine, "{kind:?}");
        }
    }
    assert!(passes(
        Kind::Boot,
        libc::SYS_mprotect,
        [0, 0, data.into(), 0]
    ));
    assert!(!passes(
        Kind::Boot,
        libc::SYS_mprotect,
        [0, 0, code.into(), 0]
    ));
}

#[test]
fn a_signal_goes_to_the_process_itself_and_to_no_other() {
    for kind in [Kind::Boot, Kind::Loop] {
        let own = |group: i64| {
            let status = under(kind, |own| {
                let group = if group == 0 { own } else { group };
                // SAFETY: tgkill takes numbers; signal 0 does nothing to anybody.
                unsafe { libc::syscall(libc::SYS_tgkill, group, group, 0) };
            });
            status == 0
        };
        assert!(own(0) && !own(1), "{kind:?}");
    }
    assert!(!passes(Kind::Vcpu, libc::SYS_tgkill, [1, 1, 0, 0]));
}

#[test]
fn an_ioctl_is_of_the_threads_own() {
    let run = [-1, 0xae80, 0, 0];
    let create = [-1, 0xae01, 0, 0];
    let offloads = [-1, 0x4004_54d0, 0, 0];
    let pushed_input = [-1, 0x5412, 0, 0]; // TIOCSTI
    for (kind, fine) in [
        (Kind::Boot, [true, true, true, false]),
        (Kind::Vcpu, [true, false, false, false]),
        (Kind::Life, [false, false, true, false]),
        (Kind::Loop, [false; 4]),
        (Kind::Disk, [false; 4]),
    ] {
        let each = [run, create, offloads, pushed_input];
        let passed = each.map(|arguments| passes(kind, libc::SYS_ioctl, arguments));
        assert_eq!(passed, fine, "{kind:?}");
    }
}

/// A process that may set the owner of a descriptor's signals may have the kernel send SIGKILL.
#[test]
fn no_descriptor_sends_signals() {
    const F_SETSIG: i32 = 10; // fcntl.h; the crate libc lacks it
    for command in [libc::F_SETOWN, F_SETSIG, libc::F_NOTIFY] {
        let arguments = [-1, command.into(), 1, 0];
        assert!(!passes(Kind::Boot, libc::SYS_fcntl, arguments));
        assert!(!passes(Kind::Loop, libc::SYS_fcntl, arguments));
    }
}

/// Every kind of thread but the vCPUs', as the machine starts them: each closes its jail and lives.
#[test]
fn threads_start_in_the_boots_jail_and_close_their_own() {
    let status = under(Kind::Boot, |own| {
        let process = Pid::from_raw(own as i32).unwrap();
        let start = || -> Result<(), Box<dyn std::error::Error>> {
            let mut jails = Jails::new(process);
            let door = jails.door(Kind::Watchdog)?;
            Watchdog::start(|| door.close())?;
            let door = jails.door(Kind::Life)?;
            Life::start(|| door.close())?;
            for kind in [Kind::Net, Kind::Disk, Kind::Vcpu] {
                for door in jails.doors(kind, 2)? {
                    Worker::start(format!("{kind:?}"), || door.close())?;
                }
            }
            let own = Kind::Loop.filter(process)?;
            jails.closed()?;
            Ok(own.install(Threads::Calling)?)
        };
        let status = start().map_or(2, |()| 0);
        // Nobody holds the threads any more, and yet they live.
        std::thread::park_timeout(Duration::from_millis(50));
        std::process::exit(status);
    });
    assert_eq!(status, 0);
}
