//! The process: boot request in, jail, answers until the shim is gone.
//!
//! The shim starts it with one connected socket as descriptor 3 and nothing else, as process 1 of
//! namespaces of its own. It reads the first byte of the guest's when its jail is closed.

mod jail;

use std::io::{self, Write};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::panic::set_hook;
use std::process;
use std::sync::Arc;

use kata_like_boot::{CONTROL_FD, Channel, ChannelError};
use kata_like_failure::{Failure, Kind, Step};
use kata_like_linux::fd::inherited;
use kata_like_linux::watch::Watched;
use kata_like_proxy::serve::serve;
use kata_like_proxy::wire::{ProxyBoot, Report};
use tokio::io::Interest;
use tokio::net::UnixStream;

fn main() {
    // The standard hook reads files for a backtrace, which the jail forbids.
    set_hook(Box::new(|panic| {
        let _ = writeln!(io::stderr(), "kata-like-proxy: {panic}");
        // Nothing goes on half.
        process::exit(1);
    }));
    let control = match inherited(CONTROL_FD) {
        Ok(control) => Channel::from_fd(control),
        Err(error) => {
            // A person started the program.
            eprintln!("kata-like-proxy: take the control socket, descriptor {CONTROL_FD}: {error}");
            process::exit(2);
        }
    };
    let ended = start(&control).and_then(|(boot, agent)| {
        // The runtime's own copy; the last words go by the first.
        let copy = rustix::io::fcntl_dupfd_cloexec(&control, CONTROL_FD)
            .map_err(io::Error::from)
            .step(|| "copy the control socket")?;
        run(Channel::from_fd(copy), &boot, agent)
    });
    // Not by returning: that would do more than the jail allows.
    process::exit(match ended {
        Ok(()) => 0,
        Err(error) => {
            let why = error.one_line();
            let report = Report::Failed { why };
            if let (Err(_), Report::Failed { why }) = (control.send(&report, &[]), &report) {
                let _ = writeln!(io::stderr(), "kata-like-proxy: {why}");
            }
            1
        }
    })
}

fn start(control: &Channel) -> Result<(ProxyBoot, StdUnixStream), Failure> {
    // Who can name other processes can have the kernel send them signals (F_SETOWN of fcntl(2)).
    if process::id() != 1 {
        let why = "it is not process 1 of a namespace of its own, as the shim starts it";
        return Err(Failure::new(Kind::WrongState, why));
    }
    kata_like_jail::close_other_fds(&[CONTROL_FD]).step(|| "jail the proxy")?;
    let (boot, agent) = ProxyBoot::receive(control).step(|| "take the proxy's boot request")?;
    control
        .set_nonblocking()
        .step(|| "prepare the control socket")?;
    Ok((boot, agent.into()))
}

fn run(control: Channel, boot: &ProxyBoot, agent: StdUnixStream) -> Result<(), Failure> {
    jail::give_up(boot.uid)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .step(|| "start the runtime")?;
    let ended = runtime.block_on(async {
        let both = Interest::READABLE | Interest::WRITABLE;
        let control = Watched::new(control, both).step(|| "watch the control socket")?;
        let agent = UnixStream::from_std(agent).step(|| "watch the agent's connection")?;
        jail::close().step(|| "jail the proxy")?;
        match serve(Arc::new(control), agent).await {
            // Its last words have nobody to hear them.
            Ok(()) | Err(ChannelError::Closed) => Ok(()),
            Err(error) => Err(Failure::failed("serve the shim", error)),
        }
    });
    // What is under way in it goes with the process.
    std::mem::forget(runtime);
    ended
}
