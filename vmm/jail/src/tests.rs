//! Each test forks, since nothing that is given up comes back. The child does one thing and reports
//! by its exit status; the test's own process stays whole. The tests need root, as the callers do.

use std::os::fd::IntoRawFd;

use caps::{CapSet, Capability};

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

#[test]
fn a_call_that_is_not_listed_kills_and_a_listed_one_does_not() {
    let filtered = |call: i64| {
        in_child(move || {
            let allowed = [libc::SYS_exit_group, libc::SYS_getpid];
            if super::no_new_privileges().is_err()
                || super::seccomp::install(&allowed, &[]).is_err()
            {
                return 1;
            }
            // SAFETY: the two calls of this test take no argument.
            unsafe { libc::syscall(call) };
            0
        })
    };
    assert_eq!(filtered(libc::SYS_getpid), 0);
    assert_eq!(filtered(libc::SYS_getppid), 128 + libc::SIGSYS);
}

#[test]
fn an_ioctl_is_told_by_its_request() {
    let filtered = |request: libc::c_ulong| {
        in_child(move || {
            let allowed = [libc::SYS_exit_group];
            if super::no_new_privileges().is_err()
                || super::seccomp::install(&allowed, &[libc::FIONREAD as u32]).is_err()
            {
                return 1;
            }
            let mut waiting = 0;
            // SAFETY: both requests of this test write at most an int, and `waiting` is one.
            unsafe { libc::ioctl(0, request, &mut waiting) };
            0
        })
    };
    assert_eq!(filtered(libc::FIONREAD), 0);
    assert_eq!(filtered(libc::TIOCOUTQ), 128 + libc::SIGSYS);
}
