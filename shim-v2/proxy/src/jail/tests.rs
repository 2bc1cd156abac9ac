//! The list by its length and arguments, and what the process dies of under it. Each test that
//! installs it forks, since a filter never goes.

use std::collections::BTreeSet;

use super::*;

/// What the list may have.
const MOST: usize = 25;

fn calls() -> BTreeSet<i64> {
    ONLY.rules().iter().map(|rule| rule.call()).collect()
}

#[test]
fn the_list_is_no_longer_than_it_may_be() {
    let count = calls().len();
    println!("{count} calls");
    assert!(count <= MOST, "{count} calls");
}

#[test]
fn it_starts_opens_and_names_nothing() {
    let calls = calls();
    for never in [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_socket,
        libc::SYS_socketpair,
        libc::SYS_connect,
        libc::SYS_bind,
        libc::SYS_accept4,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_execve,
        libc::SYS_kill,
        libc::SYS_tgkill,
        libc::SYS_ptrace,
        libc::SYS_prctl,
        libc::SYS_mprotect,
        libc::SYS_memfd_create,
        libc::SYS_ioctl,
        libc::SYS_mount,
        libc::SYS_process_vm_readv,
        libc::SYS_io_uring_setup,
    ] {
        assert!(!calls.contains(&never), "{never}");
    }
}

/// Makes a system call under the list, in a child. True: it was made; false: it killed the child.
fn passes(call: i64, arguments: [i64; 4]) -> bool {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    // SAFETY: the child installs a filter and makes two system calls; glibc keeps the allocator's
    // locks sound after fork. It leaves by a system call, so nothing runs twice.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork failed");
    if pid == 0 {
        let status = match close() {
            Ok(()) => {
                let [a, b, c, d] = arguments;
                // SAFETY: the tests pass numbers, null pointers and -1 for descriptors. Each call
                // fails, or makes a mapping that nobody uses.
                unsafe { libc::syscall(call, a, b, c, d, -1, 0) };
                let _ = rustix::io::write(&writer, b"x");
                0
            }
            Err(_) => 1,
        };
        // SAFETY: exit_group takes a number.
        unsafe { libc::_exit(status) };
    }
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `pid` is our child.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    drop(writer);
    let wrote = rustix::io::read(&reader, &mut [0u8; 1]).unwrap() == 1;
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS;
    assert!(wrote != killed, "{status}");
    wrote
}

#[test]
fn no_memory_becomes_code() {
    let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let (data, code) = (libc::PROT_READ, libc::PROT_READ | libc::PROT_EXEC);
    assert!(passes(libc::SYS_mmap, [0, 4096, data.into(), private]));
    assert!(!passes(libc::SYS_mmap, [0, 4096, code.into(), private]));
    assert!(!passes(libc::SYS_mprotect, [0, 0, data.into(), 0]));
}

#[test]
fn what_is_not_in_the_list_kills() {
    assert!(passes(libc::SYS_read, [-1, 0, 0, 0]));
    for never in [
        libc::SYS_openat,
        libc::SYS_socket,
        libc::SYS_execve,
        libc::SYS_getpid,
    ] {
        assert!(!passes(never, [-1, 0, 0, 0]), "{never}");
    }
    // F_SETOWN, by which the kernel would send signals.
    assert!(!passes(libc::SYS_fcntl, [-1, libc::F_SETOWN.into(), 1, 0]));
}
