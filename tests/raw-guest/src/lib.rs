//! A guest without a kernel that attacks the devices of its VM: raw registers and virtqueues.
//!
//! The image (`main.rs`) is entered by PVH, as a kernel is. [`command`] says what to do; [`report`]
//! is a log like a kernel's, by which the test hears what happens. Each attack begins with a line
//! `attack N DEVICE: WHAT`. After it the device is reset and asked for something by the book:
//! `asks DEVICE`, `answered DEVICE`. A line with `wrong:` fails the test, and so does a guest that
//! does not come to `done`.
//!
//! `vmm/tests/hostile_guest` is the test. It looks at the VMM, the fs server, the host's files and
//! a neighbour meanwhile.

#![cfg_attr(not(test), no_std)]

mod block;
mod command;
mod dice;
mod files;
mod forged_log;
mod fuse;
pub mod machine;
mod net;
mod packet;
mod registers;
pub mod report;
mod requests;
mod rings;
mod session;
pub mod sums;
mod transport;
mod victim;
mod vsock;

use command::Command;
use session::Victim;
use victim::{BLOCK, ENTROPY, FS, NET, NET_IN, VSOCK, VSOCK_IN};

/// All that this guest does. `start_info` is the address that PVH gives.
pub fn run(start_info: u64) -> ! {
    report::begin();
    match Command::find(start_info) {
        Some(command) => attack(&command),
        None => say!("wrong: no command"),
    }
    machine::end()
}

fn attack(command: &Command) {
    let Command { case, from, count } = *command;
    say!("begun {case} {from} {count}");
    match case {
        "sums" => sums::go_on(),
        "registers" => {
            registers::attack(count);
            [&VSOCK, &BLOCK, &FS].into_iter().for_each(victim::lives);
        }
        "entropy" => queues(&[&ENTROPY], count),
        "vsock" => {
            queues(&[&VSOCK, &VSOCK_IN], count);
            vsock::attack(count);
        }
        "net" => {
            queues(&[&NET, &NET_IN], count);
            net::attack(count);
        }
        "block" => {
            queues(&[&BLOCK], count);
            block::attack(count);
        }
        "fs-rings" => rings::chains(&FS, from),
        "fs-requests" => requests::broken(from),
        "fs" => {
            rings::setups(&FS);
            rings::storms(&FS, 30);
            files::attack(count);
        }
        "log" => forged_log::attack(count),
        _ => say!("wrong: no case {case}"),
    }
    say!("done");
    if case == "log" {
        // The VM's last report has the log's last lines, which the test has not read yet.
        machine::sleep(500);
        forged_log::newlines(20);
    }
}

/// Attacks the rings of these queues.
fn queues(victims: &[&'static Victim], count: u64) {
    for victim in victims {
        if !victim.wait_for() {
            say!("wrong: there is no device {}", victim.name);
            return;
        }
        rings::setups(victim);
        rings::chains(victim, 0);
        rings::storms(victim, (count / 20).max(10));
    }
}
