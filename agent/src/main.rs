//! PID 1 of the guest: boots, dials the host once and serves it on that connection; or, re-executed
//! with the argument `runner`, sets up one process of a container, or is that of a placeholder.
//!
//! Called by the guest's kernel as `/init`. It returns to nobody: every end of it ends the machine.

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
    // Before any thread, any open file, any allocation that could matter: a runner stays alone.
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
        // The last of the lines by which the host sees that the agent gets on: the log is all it can go by.
        log::info!("dial the host");
        let dialled = dial::dial().await?;
        let pod = Arc::new(Pod::new(streams, dialled.at_ns));
        service::serve(dialled.connection, pod).await?;
        Ok(())
    })
}
