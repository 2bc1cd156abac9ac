//! The signals of a process that runs another program next.

use std::io;

/// Gives each signal its default action again and blocks none.
///
/// The C library is left out: it keeps two signals to itself, and had posix_spawn ignore them.
pub fn reset() -> io::Result<()> {
    for signal in 1..=64 {
        // For SIGKILL and SIGSTOP this fails and changes nothing, as it should.
        let _ = set_to_zero(libc::SYS_rt_sigaction, signal);
    }
    unblock_all()
}

/// Blocks no signal for the calling thread. Allocates nothing and takes no lock.
pub fn unblock_all() -> io::Result<()> {
    set_to_zero(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK)
}

/// Makes one of the two calls that set something of signals. Both take a number, the new value,
/// room for the old one and the size of a signal set. Zero is the default action and the empty set.
fn set_to_zero(call: libc::c_long, which: libc::c_int) -> io::Result<()> {
    // As large as the kernel's `struct sigaction`; a signal set is its first word.
    let zero = [0u64; 4];
    // SAFETY: the kernel reads 32 bytes at most, which `zero` has, and writes nothing where the
    // pointer for the old value is null. Zero names no handler.
    let result = unsafe {
        libc::syscall(
            call,
            which,
            zero.as_ptr(),
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
