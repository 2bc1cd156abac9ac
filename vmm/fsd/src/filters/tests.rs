//! What the lists hold, and what an attacker behind them can do. The tests need root.

use std::ffi::CString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use kata_like_boot::{BORN_IN, Channel, FsdReport};
use kata_like_linux::landlock;
use kata_like_linux::namespace::unshare;

use super::*;
use crate::jail::{drop_privileges, only_files_below};
use crate::last_words;

/// Runs `act` in a child. Returns its exit status, or 128 + the signal that ended it.
fn in_child(act: impl FnOnce() -> i32) -> i32 {
    let child = fork(act);
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `child` is our child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    match libc::WIFSIGNALED(status) {
        true => 128 + libc::WTERMSIG(status),
        false => libc::WEXITSTATUS(status),
    }
}

fn fork(act: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child only runs `act`, which makes system calls and allocates; glibc keeps the
    // allocator's locks sound after fork. It leaves by _exit, so no test machinery runs twice.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let status = act();
        // SAFETY: _exit ends the child and takes a plain number.
        unsafe { libc::_exit(status) };
    }
    pid
}

const LISTS: [(Kind, usize); 3] = [(Kind::Worker, 62), (Kind::Vhost, 20), (Kind::Waiter, 10)];

#[test]
fn no_list_is_longer_than_it_must_be() {
    for (kind, most) in LISTS {
        let calls = kind.thread().calls().len();
        assert!(calls <= most, "{kind:?}: {calls} instead of {most}");
    }
    assert!(Filters::new().is_ok());
}

#[test]
fn no_list_makes_a_process_or_reaches_another() {
    let forbidden = [
        libc::SYS_bpf,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_connect,
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_io_uring_setup,
        libc::SYS_ioctl,
        libc::SYS_kill,
        libc::SYS_mount,
        libc::SYS_move_mount,
        libc::SYS_name_to_handle_at,
        libc::SYS_open_by_handle_at,
        libc::SYS_open_tree,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_send_signal,
        libc::SYS_process_vm_writev,
        libc::SYS_ptrace,
        libc::SYS_seccomp,
        libc::SYS_setns,
        libc::SYS_socket,
        libc::SYS_tgkill,
        libc::SYS_tkill,
        libc::SYS_unshare,
        libc::SYS_vfork,
    ];
    for (kind, _) in LISTS {
        for rule in kind.thread().rules() {
            assert!(!forbidden.contains(&rule.call()), "{rule:?}");
        }
    }
}

/// Makes one system call behind the worker's filter.
fn call(number: i64, arguments: [i64; 4]) -> i32 {
    in_child(|| {
        if drop_privileges().is_err() || !closed(Kind::Worker) {
            return 1;
        }
        let [a, b, c, d] = arguments;
        // SAFETY: the calls of this test take numbers, or null pointers, which the kernel answers
        // with EFAULT; mmap makes a mapping that nobody uses.
        unsafe { libc::syscall(number, a, b, c, d, -1, 0) };
        0
    })
}

fn closed(kind: Kind) -> bool {
    Filters::new()
        .and_then(|filters| filters.close(kind))
        .is_ok()
}

#[test]
fn calls_are_told_by_their_arguments() {
    let fcntl = |command: i32| (libc::SYS_fcntl, [2, command.into(), 0, 0]);
    let mknod = |mode: u32, device: i64| (libc::SYS_mknodat, [-1, 0, mode.into(), device]);
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let mmap = |how: i32| (libc::SYS_mmap, [0, 4096, how.into(), private.into()]);
    for (number, arguments) in [
        fcntl(libc::F_GETFL),
        fcntl(libc::F_OFD_GETLK),
        mknod(libc::S_IFIFO, 0),
        mknod(libc::S_IFCHR, 0),
        mmap(libc::PROT_READ | libc::PROT_WRITE),
    ] {
        assert_eq!(call(number, arguments), 0, "{number} {arguments:?}");
    }
    for (number, arguments) in [
        fcntl(libc::F_SETOWN),
        fcntl(15), // F_SETOWN_EX
        fcntl(10), // F_SETSIG
        fcntl(libc::F_SETFL),
        fcntl(libc::F_NOTIFY),
        fcntl(libc::F_SETLEASE),
        fcntl(libc::F_SETLKW),
        fcntl(38), // F_OFD_SETLKW
        (libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), 9, 0, 0]),
        (libc::SYS_prctl, [libc::PR_CAP_AMBIENT.into(), 2, 0, 0]),
        mknod(libc::S_IFBLK, 0),
        mknod(libc::S_IFCHR, 0x103),
        mmap(libc::PROT_READ | libc::PROT_EXEC),
        (libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC.into(), 0]),
        (libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
    ] {
        let killed = 128 + libc::SIGSYS;
        assert_eq!(call(number, arguments), killed, "{number} {arguments:?}");
    }
}

/// What a server that has been taken over may try: the kernel kills a process in its place when a
/// file is made (fcntl(2): F_SETOWN, F_SETSIG, F_NOTIFY). Returns 0 if no step failed.
fn kill_by_notice(victim: libc::pid_t, directory: &CString) -> i32 {
    const F_SETSIG: libc::c_int = 10;
    const DN_CREATE: libc::c_int = 4;
    // SAFETY: a live C string, and then numbers alone.
    unsafe {
        let fd = libc::open(directory.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
        if libc::fcntl(fd, libc::F_SETOWN, victim) < 0
            || libc::fcntl(fd, F_SETSIG, libc::SIGKILL) < 0
            || libc::fcntl(fd, libc::F_NOTIFY, DN_CREATE) < 0
        {
            return 1;
        }
        let flags = libc::O_CREAT | libc::O_WRONLY;
        match libc::openat(fd, c"notice".as_ptr(), flags, 0o600) {
            -1 => 1,
            _ => 0,
        }
    }
}

/// A layer of the server's jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Namespaces,
    Landlock,
    Filter,
}

/// Has a child with the server's privileges attack a victim from behind these layers. Returns how
/// the attacker ended, and whether the victim lives.
fn attack(layers: &[Layer]) -> (i32, bool) {
    let directory = tempfile::tempdir().unwrap();
    let path = CString::new(directory.path().as_os_str().as_bytes()).unwrap();
    let victim = fork(|| {
        loop {
            std::thread::sleep(Duration::from_secs(60));
        }
    });
    let attacker = in_child(|| {
        // The child of this one is process 1, as the server is.
        if layers.contains(&Layer::Namespaces) && unshare(BORN_IN).is_err() {
            return 2;
        }
        in_child(|| {
            let [Ok(own), Ok(fds)] = [directory.path(), "/proc/self/fd".as_ref()].map(File::open)
            else {
                return 3;
            };
            if drop_privileges().is_err()
                || (layers.contains(&Layer::Landlock) && only_files_below(&[own], &fds).is_err())
                || (layers.contains(&Layer::Filter) && !closed(Kind::Worker))
            {
                return 3;
            }
            kill_by_notice(victim, &path)
        })
    });
    let (mut status, pid) = (0, victim);
    // SAFETY: `status` is a live int; the victim is our child, reaped by one of the two waits.
    let lives = unsafe {
        let lives = libc::waitpid(pid, &mut status, libc::WNOHANG) == 0;
        if lives {
            libc::kill(pid, libc::SIGKILL);
            libc::waitpid(pid, &mut status, 0);
        }
        lives
    };
    (attacker, lives)
}

/// Each of the layers stands alone, and without any the victim dies.
#[test]
fn no_signal_reaches_a_process_by_way_of_a_file() {
    assert_eq!(attack(&[]), (0, false));
    assert_eq!(attack(&[Layer::Namespaces]), (1, true));
    assert_eq!(attack(&[Layer::Filter]), (128 + libc::SIGSYS, true));
    if landlock::version() >= 6 {
        assert_eq!(attack(&[Layer::Landlock]), (0, true));
    }
}

/// What Landlock leaves of the files if nothing else stood in the way.
#[test]
fn no_file_outside_of_the_share_can_be_opened() {
    if landlock::version() < 2 {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let status = in_child(|| {
        let [Ok(own), Ok(fds)] = [directory.path(), "/proc/self/fd".as_ref()].map(File::open)
        else {
            return 1;
        };
        if drop_privileges().is_err() || only_files_below(&[own], &fds).is_err() {
            return 2;
        }
        let inside = std::fs::write(directory.path().join("file"), "").is_ok();
        let outside = ["/etc/passwd", "/proc/1/environ", "/"].map(File::open);
        let denied = |opened: &std::io::Result<File>| matches!(opened, Err(error) if error.raw_os_error() == Some(libc::EACCES));
        i32::from(!inside || !outside.iter().all(denied))
    });
    assert_eq!(status, 0);
}

/// Behind each filter a panic is still printed and told to the shim, and ends the process.
#[test]
fn a_panic_behind_a_filter_is_told() {
    for kind in [Kind::Worker, Kind::Vhost, Kind::Waiter] {
        let (shim, server) = Channel::pair().unwrap();
        let status = in_child(|| {
            // The shim starts the server without it.
            // SAFETY: the child has one thread, so nobody reads the environment meanwhile.
            unsafe { std::env::remove_var("RUST_BACKTRACE") };
            if last_words::install(&server).is_err() || drop_privileges().is_err() || !closed(kind)
            {
                return 1;
            }
            panic!("on purpose");
        });
        assert_eq!(status, 101, "{kind:?}");
        let (report, _) = shim.receive_within(Duration::from_secs(1)).unwrap();
        let FsdReport::Failed { why } = report else {
            panic!("it serves");
        };
        assert!(why.contains("on purpose"), "{why}");
    }
}

/// Process 1 of a namespace ignores signals of its own; the filter and abort(3) still end it.
#[test]
fn process_1_can_end_itself_and_be_ended() {
    let alone = |act: fn() -> i32| {
        in_child(move || match unshare(BORN_IN) {
            Ok(()) => in_child(act),
            Err(_) => 2,
        })
    };
    let own_signal = || {
        // SAFETY: kill takes numbers.
        unsafe { libc::kill(1, libc::SIGKILL) };
        i32::from(std::process::id() != 1)
    };
    assert_eq!(alone(own_signal), 0);
    let forbidden = || {
        if closed(Kind::Worker) {
            // SAFETY: getppid takes nothing.
            unsafe { libc::getppid() };
        }
        0
    };
    assert_eq!(alone(forbidden), 128 + libc::SIGSYS);
    assert!(alone(|| std::process::abort()) > 128);
    let abort_behind_the_filter = || {
        if closed(Kind::Worker) {
            std::process::abort();
        }
        0
    };
    assert!(alone(abort_behind_the_filter) > 128);
}
