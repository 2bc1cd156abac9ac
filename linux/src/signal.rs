//! The signals of a process that runs another program next, and those to a thread.

use std::io;

use rustix::process::Pid;

use crate::numbers::Call;

/// Gives each signal its default action again and blocks none.
///
/// The C library is left out: it keeps two signals to itself, and had posix_spawn ignore them.
pub fn reset() -> io::Result<()> {
    for signal in 1..=64 {
        // For SIGKILL and SIGSTOP this fails and changes nothing, as it should.
        let _ = set(libc::SYS_rt_sigaction, signal, [0; 4]);
    }
    unblock_all()
}

/// Blocks no signal for the calling thread. Allocates nothing and takes no lock.
pub fn unblock_all() -> io::Result<()> {
    set(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, [0; 4])
}

/// From now on this process ignores `signal`. Its programs that come by exec ignore it, too.
pub fn ignore(signal: i32) -> io::Result<()> {
    // `struct sigaction` of the kernel: handler, flags, restorer, mask.
    set(
        libc::SYS_rt_sigaction,
        signal,
        [libc::SIG_IGN as u64, 0, 0, 0],
    )
}

/// Sends a signal to a thread of a process (tgkill(2)). pthread_kill(3) makes three more calls.
pub fn to_thread(process: Pid, thread: Pid, signal: i32) -> io::Result<()> {
    Call::SignalThread {
        process: process.as_raw_nonzero().get(),
        thread: thread.as_raw_nonzero().get(),
        signal,
    }
    .make()
}

/// Makes one of the two calls that set something of signals. Both take a number, the new value,
/// room for the old one and the size of a signal set. Zero is the default action and the empty set.
/// `value` is as large as the kernel's `struct sigaction`; a signal set is its first word. It names
/// no handler: the first word of an action is 0 or 1.
fn set(call: libc::c_long, which: libc::c_int, value: [u64; 4]) -> io::Result<()> {
    // SAFETY: the kernel reads 32 bytes at most, which `value` has, and writes nothing where the
    // pointer for the old value is null. The callers of this module name no handler.
    let result = unsafe {
        libc::syscall(
            call,
            which,
            value.as_ptr(),
            std::ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SigBlk of the calling thread.
    fn blocked() -> String {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("SigBlk:"));
        line.unwrap().to_owned()
    }

    /// SIGXFSZ ends a process that does not ignore it.
    #[test]
    fn a_signal_that_is_ignored_does_nothing() {
        ignore(libc::SIGXFSZ).unwrap();
        let (process, thread) = (rustix::process::getpid(), rustix::thread::gettid());
        to_thread(process, thread, libc::SIGXFSZ).unwrap();
    }

    #[test]
    fn nothing_stays_blocked() {
        std::thread::spawn(|| {
            let (set, size) = (1u64 << 9, size_of::<u64>()); // SIGUSR1
            // SAFETY: the kernel reads the eight bytes of a live set.
            unsafe {
                libc::syscall(
                    libc::SYS_rt_sigprocmask,
                    libc::SIG_BLOCK,
                    std::ptr::from_ref(&set),
                    std::ptr::null_mut::<u64>(),
                    size,
                )
            };
            assert!(blocked().ends_with("0000000000000200"), "{}", blocked());
            unblock_all().unwrap();
            assert!(blocked().ends_with("0000000000000000"), "{}", blocked());
        })
        .join()
        .unwrap();
    }
}
