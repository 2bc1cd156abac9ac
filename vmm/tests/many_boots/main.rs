//! Boots real guests, one after the other, until one stands still; then says where.
//!
//! It does not run with the other tests: it takes as many minutes as `KATA_LIKE_MINUTES` says.
//! Needs what the tests in `boot` need, and the guest's image as `KATA_LIKE_INITRD`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../parts/mod.rs"]
mod parts;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kata_like_boot::{VmCommand, VmReport};
use parts::guest::{Guest, Setup};
use parts::server::FsServer;

/// Longer than any boot to the agent's dial: 20 seconds were seen under emulation beside compilers.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often we look at a guest that stands still, and how long we leave it alone in between.
const LOOKS: usize = 12;
const BETWEEN: Duration = Duration::from_secs(3);

#[test]
#[ignore = "takes KATA_LIKE_MINUTES"]
fn no_guest_stands_still() {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("no {name}"));
    let minutes: u64 = variable("KATA_LIKE_MINUTES").parse().unwrap();
    let initrd = fs::read(variable("KATA_LIKE_INITRD")).unwrap();
    let end = Instant::now() + Duration::from_secs(minutes * 60);
    let stands = AtomicBool::new(false);
    let boots: u32 = std::thread::scope(|scope| {
        let one = || boot_until(end, &initrd, &stands);
        let threads = [scope.spawn(one), scope.spawn(one)];
        threads.map(|thread| thread.join().unwrap()).iter().sum()
    });
    println!("{boots} boots");
    assert!(!stands.into_inner(), "a guest stood still");
}

/// Returns the number of boots.
fn boot_until(end: Instant, initrd: &[u8], stands: &AtomicBool) -> u32 {
    let mut boots = 0;
    while Instant::now() < end && !stands.load(Ordering::SeqCst) {
        let server = FsServer::start(&["rootfs", "volumes"]);
        let mut guest = Guest::start(&Setup {
            shares: server.connections(),
            ..Setup::new(initrd.to_vec(), 1)
        });
        guest.wait_until_running();
        let begun = Instant::now();
        match guest.control.receive_within(PATIENCE) {
            Ok((VmReport::AgentConnected(_), _)) => {}
            Ok((other, _)) => println!("after {boots} boots: {other:?}"),
            Err(error) => {
                println!("after {boots} boots: {error}");
                stands.store(true, Ordering::SeqCst);
                look_at(&mut guest);
            }
        }
        boots += 1;
        if boots % 20 == 0 {
            println!("{boots} boots, the last one in {:?}", begun.elapsed());
        }
    }
    boots
}

/// Prints where the guest stands, several times: a look takes its vCPUs out of the guest, which may
/// wake it.
fn look_at(guest: &mut Guest) {
    for look in 0..LOOKS {
        for command in [VmCommand::Figures, VmCommand::State, VmCommand::ReadLog] {
            guest.control.send(&command, &[]).unwrap();
            match guest.control.receive_within(PATIENCE) {
                Ok((VmReport::State(state), _)) => println!("look {look}: {state}"),
                Ok((report, _)) => println!("look {look}: {report:?}"),
                Err(error) => println!("look {look}: {error}"),
            }
        }
        std::thread::sleep(BETWEEN);
    }
    println!("{}", guest.log());
}
