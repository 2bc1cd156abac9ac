//! The lists by their length and arguments, and what a thread under each of them dies of. Each test
//! that installs one forks, since a filter never goes.

use rustix::process::getpid;

use super::*;
use crate::virtio::life::Life;
use crate::virtio::worker::Worker;
use crate::watchdog::Watchdog;

/// Each kind of thread, and how many calls it may make in a release build.
const KINDS: [(&Thread, usize); 7] = [
    (&vmm::BOOT, 47),
    (&vmm::LOOP, 26),
    (&vmm::VCPU, 10),
    (&vmm::LIFE, 14),
    (&vmm::NET, 11),
    (&vmm::DISK, 12),
    (&vmm::WATCHDOG, 10),
];

#[test]
fn no_list_is_longer_than_it_may_be() {
    for (kind, most) in KINDS {
        let count = kind.calls().len();
        assert!(count <= most, "{}: {count} calls", kind.name);
    }
}

/// A thread has both lists, so a call that only its own has would kill it.
#[test]
fn what_a_thread_may_is_what_the_boot_may() {
    let boot = vmm::BOOT.calls();
    for (kind, _) in KINDS {
        let calls = kind.calls();
        let more: Vec<_> = calls.difference(&boot).collect();
        assert!(more.is_empty(), "{}: {more:?}", kind.name);
    }
}

#[test]
fn no_thread_with_the_guest_starts_or_names_anything() {
    for (kind, _) in KINDS {
        let calls = kind.calls();
        for never in [
            "open",
            "openat",
            "socket",
            "connect",
            "bind",
            "execve",
            "fork",
            "vfork",
            "kill",
            "ptrace",
            "newfstatat",
            "mount",
            "process_vm_readv",
            "clone3",
        ] {
            assert!(!calls.contains(never), "{}: {never}", kind.name);
        }
        if kind == &vmm::BOOT {
            continue;
        }
        for late in ["clone", "mprotect", "prctl", "eventfd2", "seccomp"] {
            assert!(!calls.contains(late), "{}: {late}", kind.name);
        }
    }
}

/// Runs `act` under the list of `kind` in a child, which tells it its pid. Returns the exit status,
/// or 128 + the signal that ended the child.
fn under(kind: &Thread, act: impl FnOnce(i64)) -> i32 {
    // SAFETY: the child installs a filter and runs `act`, which makes system calls; glibc keeps the
    // allocator's locks sound after fork. It leaves by a system call, so nothing runs twice.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let own = getpid();
        let closed = filter(kind, own).and_then(|filter| filter.install(Threads::Calling));
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
fn passes(kind: &Thread, call: i64, arguments: [i64; 4]) -> bool {
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
            assert_eq!(
                passes(kind, libc::SYS_mmap, arguments),
                fine,
                "{}",
                kind.name
            );
        }
    }
    assert!(passes(
        &vmm::BOOT,
        libc::SYS_mprotect,
        [0, 0, data.into(), 0]
    ));
    assert!(!passes(
        &vmm::BOOT,
        libc::SYS_mprotect,
        [0, 0, code.into(), 0]
    ));
}

#[test]
fn a_signal_goes_to_the_process_itself_and_to_no_other() {
    for kind in [&vmm::BOOT, &vmm::LOOP] {
        let own = |group: i64| {
            let status = under(kind, |own| {
                let group = if group == 0 { own } else { group };
                // SAFETY: tgkill takes numbers; signal 0 does nothing to anybody.
                unsafe { libc::syscall(libc::SYS_tgkill, group, group, 0) };
            });
            status == 0
        };
        assert!(own(0) && !own(1), "{}", kind.name);
    }
    assert!(!passes(&vmm::VCPU, libc::SYS_tgkill, [1, 1, 0, 0]));
}

#[test]
fn an_ioctl_is_of_the_threads_own() {
    let run = [-1, 0xae80, 0, 0];
    let create = [-1, 0xae01, 0, 0];
    let offloads = [-1, 0x4004_54d0, 0, 0];
    let pushed_input = [-1, 0x5412, 0, 0]; // TIOCSTI
    for (kind, fine) in [
        (&vmm::BOOT, [true, true, true, false]),
        (&vmm::VCPU, [true, false, false, false]),
        (&vmm::LIFE, [false, false, true, false]),
        (&vmm::LOOP, [false; 4]),
        (&vmm::DISK, [false; 4]),
    ] {
        let each = [run, create, offloads, pushed_input];
        let passed = each.map(|arguments| passes(kind, libc::SYS_ioctl, arguments));
        assert_eq!(passed, fine, "{}", kind.name);
    }
}

/// A process that may set the owner of a descriptor's signals may have the kernel send SIGKILL.
#[test]
fn no_descriptor_sends_signals() {
    const F_SETSIG: i32 = 10; // fcntl.h; the crate libc lacks it
    for command in [libc::F_SETOWN, F_SETSIG, libc::F_NOTIFY] {
        let arguments = [-1, command.into(), 1, 0];
        assert!(!passes(&vmm::BOOT, libc::SYS_fcntl, arguments));
        assert!(!passes(&vmm::LOOP, libc::SYS_fcntl, arguments));
    }
}

/// The C library's thread starts with `clone` when `clone3` is not there; what else `clone` makes
/// is nothing that the boot needs.
#[test]
fn the_boot_starts_threads_and_no_process() {
    let thread = 0x3d_0f00; // pthread_create(3) of glibc, as strace shows it
    for flags in [
        i64::from(libc::SIGCHLD),
        i64::from(libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD),
        i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD),
        thread | i64::from(libc::CLONE_NEWUSER),
    ] {
        assert!(
            !passes(&vmm::BOOT, libc::SYS_clone, [flags, 0, 0, 0]),
            "{flags:#x}"
        );
    }
    let status = under(&vmm::BOOT, |_| {
        // SAFETY: the filter answers; the kernel sees none of the arguments.
        unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
        // SAFETY: errno is the thread's own.
        let told = unsafe { *libc::__errno_location() };
        if told != libc::ENOSYS {
            // SAFETY: exit_group takes a number.
            unsafe { libc::_exit(3) };
        }
    });
    assert_eq!(status, 0);
    assert!(!passes(&vmm::LOOP, libc::SYS_clone3, [0; 4]));
}

/// Every kind of thread but the vCPUs', as the machine starts them: each closes its jail and lives.
#[test]
fn threads_start_in_the_boots_jail_and_close_their_own() {
    let status = under(&vmm::BOOT, |own| {
        let process = Pid::from_raw(own as i32).unwrap();
        let start = || -> Result<(), Box<dyn std::error::Error>> {
            let mut jails = Jails::new(process);
            let door = jails.door(&vmm::WATCHDOG)?;
            Watchdog::start(|| door.close())?;
            let door = jails.door(&vmm::LIFE)?;
            Life::start(|| door.close())?;
            for kind in [&vmm::NET, &vmm::DISK, &vmm::VCPU] {
                for door in jails.doors(kind, 2)? {
                    Worker::start(kind.name.to_owned(), || door.close())?;
                }
            }
            let own = filter(&vmm::LOOP, process)?;
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
