//! Each test forks, since nothing that is given up comes back. The child does one thing and reports
//! by its exit status; the test's own process stays whole. The tests need root, as the callers do.

use std::os::fd::IntoRawFd;

use caps::{CapSet, Capability};

use rustix::process::getpid;

use super::seccomp::{Check, Filter, Rule, Threads, Value};
use crate::{rule, values};

/// Runs `act` in a child. Returns its exit status, or 128 + the signal that ended it.
fn in_child(act: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child only runs `act`, which makes system calls and allocates; glibc keeps the
    // allocator's locks sound after fork. It leaves by _exit, so no test machinery runs twice.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let status = act();
        // SAFETY: _exit ends the child and takes a plain number.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `pid` is our child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    match libc::WIFSIGNALED(status) {
        true => 128 + libc::WTERMSIG(status),
        false => libc::WEXITSTATUS(status),
    }
}

fn status_line(key: &str) -> String {
    let text = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_prefix(key));
    found.unwrap_or_default().trim().to_string()
}

#[test]
fn a_dropped_identity_has_nothing_left() {
    let uid = 1_900_000_001;
    let status = in_child(|| {
        if super::drop_identity(uid).is_err() {
            return 1;
        }
        let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
        let none = "0000000000000000";
        let sets = ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"];
        if status_line("Uid:") != ids || status_line("Gid:") != ids {
            return 2;
        }
        if sets.iter().any(|set| status_line(set) != none) {
            return 3;
        }
        if status_line("NoNewPrivs:") != "1" || !status_line("Groups:").is_empty() {
            return 4;
        }
        // SAFETY: setuid takes a plain number.
        if unsafe { libc::setuid(0) } == 0 {
            return 5;
        }
        0
    });
    assert_eq!(status, 0);
}

#[test]
fn user_zero_is_refused() {
    assert!(super::drop_identity(0).is_err());
}

#[test]
fn only_the_kept_capabilities_stay() {
    let status = in_child(|| {
        let keep = [Capability::CAP_CHOWN, Capability::CAP_FOWNER];
        if super::drop_capabilities(&keep).is_err() {
            return 1;
        }
        for set in [CapSet::Effective, CapSet::Permitted, CapSet::Bounding] {
            let left = caps::read(None, set).unwrap_or_default();
            if left.len() != 2 || !keep.iter().all(|capability| left.contains(capability)) {
                return 2;
            }
        }
        0
    });
    assert_eq!(status, 0);
}

#[test]
fn other_descriptors_are_closed_and_the_kept_ones_are_not() {
    let status = in_child(|| {
        let open = || std::fs::File::open("/dev/null").map(IntoRawFd::into_raw_fd);
        let (Ok(kept), Ok(other)) = (open(), open()) else {
            return 1;
        };
        if super::close_other_fds(&[kept]).is_err() {
            return 2;
        }
        // SAFETY: fcntl with F_GETFD only looks at a number, open or not.
        let is_open = |fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
        i32::from(!is_open(kept) || is_open(other) || !is_open(0))
    });
    assert_eq!(status, 0);
}

/// Makes one system call in a child under a filter of these rules and `exit_group`. Returns the
/// child's exit status, or 128 + the signal that ended it.
fn under(rules: &[Rule], call: i64, arguments: [i64; 4]) -> i32 {
    let rules = [rules, &[rule!(SYS_exit_group, "")]].concat();
    in_child(|| {
        let filter = Filter::new("", &rules, getpid());
        if super::no_new_privileges().is_err()
            || filter
                .and_then(|filter| filter.install(Threads::All))
                .is_err()
        {
            return 1;
        }
        let [a, b, c, d] = arguments;
        // SAFETY: the calls of these tests take numbers, or null pointers, which the kernel
        // answers with EFAULT.
        unsafe { libc::syscall(call, a, b, c, d) };
        0
    })
}

const KILLED: i32 = 128 + libc::SIGSYS;

#[test]
fn a_call_that_is_not_listed_kills_and_a_listed_one_does_not() {
    let rules = [rule!(SYS_getpid, "")];
    assert_eq!(under(&rules, libc::SYS_getpid, [0; 4]), 0);
    assert_eq!(under(&rules, libc::SYS_getppid, [0; 4]), KILLED);
}

/// The signal number is 0, which only asks whether the thread is there.
#[test]
fn the_process_itself_is_told_from_others() {
    const OWN: &[Check] = &[Check::own_process(0)];
    let status = |own: bool| {
        in_child(|| {
            let process = getpid();
            let rules = [rule!(SYS_tgkill, OWN, ""), rule!(SYS_exit_group, "")];
            let closed = Filter::new("", &rules, process)
                .and_then(|filter| filter.install(Threads::Calling));
            if closed.is_err() {
                return 1;
            }
            let group = if own { process.as_raw_pid() } else { 1 };
            // SAFETY: tgkill takes numbers.
            unsafe { libc::syscall(libc::SYS_tgkill, group, group, 0) };
            0
        })
    };
    assert_eq!((status(true), status(false)), (0, KILLED));
}

#[test]
fn a_call_is_answered_as_one_that_the_kernel_lacks() {
    let status = in_child(|| {
        let rules = [
            Rule::absent(libc::SYS_getppid, "SYS_getppid", ""),
            rule!(SYS_exit_group, ""),
        ];
        let closed =
            Filter::new("", &rules, getpid()).and_then(|filter| filter.install(Threads::Calling));
        // SAFETY: getppid takes nothing.
        let answer = unsafe { libc::syscall(libc::SYS_getppid) };
        let why = std::io::Error::last_os_error().raw_os_error();
        i32::from(closed.is_err() || answer != -1 || why != Some(libc::ENOSYS))
    });
    assert_eq!(status, 0);
}

#[test]
fn a_call_is_told_by_its_arguments() {
    const ONE_OF: &[Check] = &[Check::one_of(1, values![FIONREAD, TIOCOUTQ])];
    const NO_CODE: &[Check] = &[Check::without(2, values![PROT_EXEC])];
    const TYPE: Value = Value::new("S_IFMT", libc::S_IFMT);
    const KINDS: &[Check] = &[Check::masked(
        2,
        TYPE,
        &[Value::new("0", 0), Value::new("S_IFIFO", libc::S_IFIFO)],
    )];
    const WHITEOUT: &[Check] = &[
        Check::masked(2, TYPE, values![S_IFCHR]),
        Check::one_of(3, &[Value::new("0", 0)]),
    ];
    let rules = [
        rule!(SYS_ioctl, ONE_OF, ""),
        rule!(SYS_mprotect, NO_CODE, ""),
        // Of two rules for a call one suffices.
        rule!(SYS_mknodat, KINDS, ""),
        rule!(SYS_mknodat, WHITEOUT, ""),
    ];
    let mknod = |mode: u32, dev: i64| (libc::SYS_mknodat, [-1, 0, mode.into(), dev]);
    let protect = |how: libc::c_int| (libc::SYS_mprotect, [0, 4096, how.into(), 0]);
    let ioctl = |request: libc::c_ulong| (libc::SYS_ioctl, [-1, request as i64, 0, 0]);
    for (call, arguments) in [
        ioctl(libc::FIONREAD),
        ioctl(libc::TIOCOUTQ),
        // The kernel takes 32 bits of a request.
        ioctl(libc::FIONREAD | 1 << 40),
        protect(libc::PROT_READ | libc::PROT_WRITE),
        mknod(0o644, 0),
        mknod(libc::S_IFIFO | 0o4777, 7),
        mknod(libc::S_IFCHR, 0),
    ] {
        assert_eq!(under(&rules, call, arguments), 0, "{call} {arguments:?}");
    }
    for (call, arguments) in [
        ioctl(libc::TIOCSTI),
        protect(libc::PROT_READ | libc::PROT_EXEC),
        mknod(libc::S_IFBLK, 0),
        mknod(libc::S_IFCHR, 1),
        mknod(libc::S_IFSOCK, 0),
    ] {
        assert_eq!(
            under(&rules, call, arguments),
            KILLED,
            "{call} {arguments:?}"
        );
    }
}

#[test]
fn a_filter_holds_for_one_thread_or_for_all() {
    let killed_by = |threads| {
        in_child(move || {
            let rules = [rule!(SYS_futex, ""), rule!(SYS_exit_group, "")];
            let Ok(filter) = Filter::new("", &rules, getpid()) else {
                return 1;
            };
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let _ = tell.send(filter.install(threads).is_ok());
                // The end of a thread makes more calls than the filter allows.
                loop {
                    std::thread::park();
                }
            });
            if told.recv() != Ok(true) {
                return 2;
            }
            // SAFETY: getppid takes nothing.
            unsafe { libc::getppid() };
            0
        })
    };
    assert_eq!(killed_by(Threads::Calling), 0);
    assert_eq!(killed_by(Threads::All), KILLED);
}

#[test]
fn a_list_that_says_two_things_of_a_call_is_refused() {
    const CHECKS: &[Check] = &[Check::one_of(1, values![F_GETFD])];
    let any = rule!(SYS_fcntl, "");
    let some = rule!(SYS_fcntl, CHECKS, "");
    let none = Rule::absent(libc::SYS_fcntl, "SYS_fcntl", "");
    let filter = |rules: &[Rule]| Filter::new("", rules, getpid());
    assert!(filter(&[some, some]).is_ok());
    for rules in [
        [any, any],
        [any, some],
        [some, any],
        [some, none],
        [none, some],
    ] {
        assert!(filter(&rules).is_err(), "{rules:?}");
    }
    // No value would be allowed, and no rule must not mean every value.
    const NONE: &[Check] = &[Check::one_of(1, &[])];
    assert!(filter(&[rule!(SYS_fcntl, NONE, "")]).is_err());
}

#[test]
fn an_empty_root_holds_nothing_and_takes_nothing() {
    let status = in_child(|| {
        if !matches!(super::enter_empty_root(), Ok(true)) {
            return 1;
        }
        let names = |path: &str| std::fs::read_dir(path).map(Iterator::count);
        if names("/").ok() != Some(0) || names("..").ok() != Some(0) {
            return 2;
        }
        if names("/proc/self").is_ok() {
            return 3;
        }
        let made = std::fs::File::create("/new").map_err(|error| error.kind());
        i32::from(made.err() != Some(std::io::ErrorKind::ReadOnlyFilesystem))
    });
    assert_eq!(status, 0);
}

/// Where the kernel has Landlock: not even root opens a file.
#[test]
fn no_path_leads_to_a_file() {
    let status = in_child(|| match super::shut_out() {
        Ok(true) => {
            let opened = std::fs::File::open("/dev/null").map_err(|error| error.kind());
            match opened.err() {
                Some(std::io::ErrorKind::PermissionDenied) => 0,
                _ => 2,
            }
        }
        Ok(false) => i32::from(kata_like_linux::landlock::version() != 0),
        Err(_) => 1,
    });
    assert_eq!(status, 0);
}

#[test]
fn a_limit_is_for_good() {
    let status = in_child(|| {
        let most = rustix::process::Resource::Nofile;
        if super::limit(most, 3).is_err() || super::drop_identity(1_900_000_001).is_err() {
            return 1;
        }
        i32::from(super::limit(most, 4).is_ok() || rustix::io::dup(std::io::stderr()).is_ok())
    });
    assert_eq!(status, 0);
}
