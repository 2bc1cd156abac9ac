//! What the standard library's `Command` does not do between fork and exec.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::fd;

/// Has the program find copies of `descriptors` as its descriptors `first` (3 or more), `first +
/// 1`, and so on. This process's copies close when the command is dropped.
pub fn hand_over(
    command: &mut Command,
    descriptors: &[BorrowedFd<'_>],
    first: RawFd,
) -> io::Result<()> {
    let first = first.max(3);
    let floor = first.unsigned_abs() as usize;
    let end = floor + descriptors.len();
    let mut lifted = Vec::new();
    // The numbers that the program's descriptors will have are taken until the command is dropped.
    // Otherwise the standard library could open one of its own there before it forks, and would
    // tell of a failed exec through what has replaced it.
    let mut taken = Vec::new();
    for descriptor in descriptors {
        loop {
            let copy = fd::lift(*descriptor, floor)?;
            if usize::try_from(copy.as_raw_fd()).is_ok_and(|number| number >= end) {
                lifted.push(copy);
                break;
            }
            taken.push(copy);
        }
    }
    let hand_over = move || {
        let _ = &taken;
        fd::arrange(&lifted, first)
    };
    // SAFETY: between fork and exec the closure makes system calls only: it allocates nothing and
    // takes no lock. The descriptors that it copies are open in the child, for it owns them.
    unsafe { command.pre_exec(hand_over) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::process::Stdio;

    #[test]
    fn a_program_finds_what_it_is_handed() {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one >&5; echo two >&6"]);
        hand_over(&mut command, &[writer.as_fd(), writer.as_fd()], 5).unwrap();
        assert!(command.status().unwrap().success());
        drop((command, writer));
        let mut text = String::new();
        std::fs::File::from(reader)
            .read_to_string(&mut text)
            .unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words, ["one", "two"]);
    }

    /// The report of a failed exec has a number of its own, whatever is handed over.
    #[test]
    fn a_program_that_is_not_there_is_told() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let mut command = Command::new("/nowhere/x");
        command.stdin(Stdio::null());
        hand_over(&mut command, &[null.as_fd(); 20], 3).unwrap();
        let refused = command.spawn().map(drop).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotFound);
    }
}
