//! A server over TCP, and a program that may not use BPF.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// Listens on addresses until it is killed; `listening` comes first. The first byte of a connection
/// says what happens on it: see `answer`.
pub fn listen(addresses: &[String]) -> io::Result<String> {
    let taken = Arc::new(AtomicU64::new(0));
    let listeners: io::Result<Vec<_>> = addresses.iter().map(TcpListener::bind).collect();
    let servers: Vec<_> = listeners?
        .into_iter()
        .map(|listener| {
            let taken = taken.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let taken = taken.clone();
                    thread::spawn(move || answer(stream, &taken));
                }
            })
        })
        .collect();
    writeln!(io::stdout(), "listening")?;
    for server in servers {
        let _ = server.join();
    }
    Ok("nobody connects any more".into())
}

fn answer(mut stream: TcpStream, taken: &AtomicU64) -> io::Result<()> {
    let mut wanted = [0];
    stream.read_exact(&mut wanted)?;
    match wanted {
        // Sends back all that comes, and after the end one word more.
        [b'e'] => {
            io::copy(&mut stream.try_clone()?, &mut stream)?;
            stream.write_all(b"over")
        }
        // Ends its direction at once; counts what still comes.
        [b'h'] => {
            stream.shutdown(Shutdown::Write)?;
            let count = io::copy(&mut stream, &mut io::sink())?;
            taken.fetch_add(count, Ordering::SeqCst);
            Ok(())
        }
        // How many bytes that were.
        [b'c'] => write!(stream, "{}", taken.load(Ordering::SeqCst)),
        // Sends a word, and resets.
        [b'r'] => {
            stream.write_all(b"half a sen")?;
            stream.read_exact(&mut wanted)?;
            let none = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            // SAFETY: the kernel reads a `linger` of that size, which lives.
            unsafe {
                libc::setsockopt(
                    stream.as_raw_fd(),
                    libc::SOL_SOCKET,
                    libc::SO_LINGER,
                    std::ptr::from_ref(&none).cast(),
                    size_of::<libc::linger>() as u32,
                )
            };
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Becomes another program, for which bpf(2) fails, as for its children.
pub fn without_bpf(command: &[String]) -> io::Result<String> {
    const BPF: u32 = libc::SYS_bpf as u32;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut filter = [
        step(0x20, 0, 0, 0), // the call's number, of struct seccomp_data
        step(0x15, 0, 1, BPF),
        step(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        step(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program, whose steps live, during the call.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            std::ptr::from_ref(&program),
        )
    };
    if set != 0 {
        return Err(io::Error::last_os_error());
    }
    let [program, arguments @ ..] = command else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Err(Command::new(program).args(arguments).exec())
}
