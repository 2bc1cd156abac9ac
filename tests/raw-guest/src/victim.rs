//! The devices that are attacked, and a request by the book to each, which shows that it lives.

use crate::machine::{DATA, fill, put};
use crate::session::{Kind, Session, Victim};
use crate::transport::WRITE;
use crate::{fuse, packet, say};

const fn victim(
    name: &'static str,
    kind: Kind,
    slot: u64,
    sizes: &'static [u16],
    (queue, incoming): (u32, bool),
) -> Victim {
    Victim {
        name,
        slot,
        queue,
        sizes,
        incoming,
        kind,
    }
}

/// Sends to the host.
const SENT: (u32, bool) = (1, false);
/// Receives from the host.
const RECEIVED: (u32, bool) = (0, true);

/// The slots are those of the VMM's layout. The first share, a container's root.
pub static FS: Victim = victim("fs", Kind::Fs, 0, &[1024, 1024], SENT);
/// The second share, with locks.
pub static VOLUMES: Victim = victim("fs, volumes", Kind::Fs, 1, FS.sizes, SENT);
/// Packets from the guest.
pub static VSOCK: Victim = victim("vsock", Kind::Vsock, 2, &[256, 256, 16], SENT);
/// Packets to the guest.
pub static VSOCK_IN: Victim = victim("vsock, to the guest", Kind::Vsock, 2, VSOCK.sizes, RECEIVED);
/// Random numbers.
pub static ENTROPY: Victim = victim("entropy", Kind::Entropy, 3, &[64], RECEIVED);
/// Frames from the guest.
pub static NET: Victim = victim("net", Kind::Net, 4, &[256, 256], SENT);
/// Frames to the guest.
pub static NET_IN: Victim = victim("net, to the guest", Kind::Net, 4, NET.sizes, RECEIVED);
/// A disk that is only read.
pub static READ_ONLY: Victim = victim("block, only read", Kind::Block, 13, &[256], (0, false));
/// A disk.
pub static BLOCK: Victim = victim("block", Kind::Block, 12, &[256], (0, false));

/// Resets the device, and asks for something by the book. The host takes the time.
pub fn lives(victim: &'static Victim) {
    say!("asks {}", victim.name);
    let answered = ask(&mut victim.open());
    let verdict = if answered {
        "answered"
    } else {
        "wrong: no answer from"
    };
    say!("{verdict} {}", victim.name);
}

/// A frame to all, of a protocol that nobody speaks (IEEE 802's local experimental one).
const FRAME: [u8; 14] = [255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];

/// Notifies the device of what was made available, and gives it a reason to look.
pub fn kick(session: &mut Session) {
    session.device.kick(session.victim.queue);
    match (session.victim.kind, session.victim.incoming) {
        (Kind::Vsock, true) => packet::dial_nobody(session),
        (Kind::Net, true) => session.device.kick(1),
        _ => {}
    }
}

/// One request by the book. False: no right answer within the guest's patience.
pub fn ask(session: &mut Session) -> bool {
    match session.victim.kind {
        Kind::Entropy => {
            session.rings[0].describe(0, DATA, 64, WRITE, 0);
            session.exchange(0).is_some_and(|(_, length)| length > 0)
        }
        Kind::Block => session.request(0, 0, 512) == Some(0),
        Kind::Net => {
            fill(DATA, 128, 0);
            put(DATA + 12, &FRAME);
            session.rings[1].describe(0, DATA, 72, 0, 0);
            session.exchange(1).is_some()
        }
        Kind::Vsock => packet::is_refused(session),
        Kind::Fs => fuse::mounts(session),
    }
}
