//! PID 1 of the guest. It boots the machine, dials the host once and serves it on that connection.
//! Run again with the argument `runner`, it sets up one process of a container; run as `/pause`, it
//! is the first process of a placeholder.
//!
//! Called by the guest's kernel as `/init`. When it ends, the machine ends.

mod cgroup;
mod container;
mod convert;
mod deadline;
mod device;
mod dial;
mod disks;
mod events;
mod forward;
mod init;
mod kmsg;
mod network;
mod pod;
mod process;
mod readiness;
mod reaper;
mod resolver;
mod runner;
mod service;
mod spec;
mod stdio;
mod storage;
mod write_back;

use std::process::ExitCode;
use std::sync::Arc;

use kata_like_failure::one_line;

use crate::pod::Pod;

fn main() -> ExitCode {
    // A runner must have one thread: so this comes first.
    let mut arguments = std::env::args_os();
    let called = arguments.next();
    if arguments
        .next()
        .is_some_and(|argument| argument == "runner")
    {
        runner::main();
    }
    if called.is_some_and(|name| name == runner::PAUSE) {
        runner::pause();
    }
    if std::process::id() != 1 {
        eprintln!(
            "kata-like-agent is the init process of a kata-like guest and runs as PID 1 only"
        );
        return ExitCode::FAILURE;
    }
    if let Err(error) = init::prepare() {
        init::fail(&error.one_line());
    }
    match serve() {
        Ok(()) => log::warn!("the host has closed the control connection: restart"),
        Err(error) => log::error!("{}", one_line(&*error)),
    }
    init::restart()
}

/// Dials the host and answers it until it goes away or asks for the end.
fn serve() -> Result<(), Box<dyn std::error::Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        reaper::start()?;
        // Bound before the host can know of us, and so before any container runs.
        let streams = stdio::port::StreamPort::open()?;
        // The last line by which the host sees progress: until now it has only the log.
        log::info!("dial the host");
        let dialled = dial::dial().await?;
        let pod = Arc::new(Pod::new(streams, dialled.at_ns));
        service::serve(dialled.connection, pod).await?;
        Ok(())
    })
}
