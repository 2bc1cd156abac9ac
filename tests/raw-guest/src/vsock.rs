//! Packets that lie: addresses, lengths, types, credit, and floods of them.

use crate::dice::Dice;
use crate::machine::rest;
use crate::packet::{AGENT, BYTES, CREDIT_REQUEST, CREDIT_UPDATE, MAX_PAYLOAD, NOBODY, Packet};
use crate::packet::{REQUEST, RESET, RESPONSE, SHUTDOWN, comes, finish, listen, next, send};
use crate::say;
use crate::victim::{VSOCK, lives};

/// All of it, after the attacks on the rings. The host opens streams and writes all the while.
pub fn attack(count: u64) {
    credit();
    lies(count);
    never_read();
    live_streams(count);
    floods(count);
}

/// The one connection that the host takes: more bytes than it has given credit for.
fn credit() {
    say!("attack 0 vsock: more bytes than there is credit for");
    let mut session = VSOCK.open();
    listen(&mut session);
    let dial = Packet {
        allocated: 0,
        ..Packet::new(REQUEST, AGENT)
    };
    send(&mut session, &dial, 0);
    finish(&mut session);
    if !comes(&mut session, |packet| packet.operation == RESPONSE) {
        say!("wrong: the host does not take the agent's connection");
    }
    let bytes = Packet {
        length: MAX_PAYLOAD,
        ..Packet::new(BYTES, AGENT)
    };
    for _ in 0..16 {
        send(&mut session, &bytes, MAX_PAYLOAD);
    }
    finish(&mut session);
    if !comes(&mut session, |packet| {
        (packet.operation, packet.peer) == (RESET, AGENT)
    }) {
        say!("wrong: a stream without credit goes on");
    }
    lives(&VSOCK);
}

fn lies(count: u64) {
    say!("attack 0 vsock: headers that lie");
    let mut dice = Dice::new(11);
    let mut session = VSOCK.open();
    listen(&mut session);
    for _ in 0..count {
        let packet = Packet::dice(&mut dice);
        let honest = packet.length.min(MAX_PAYLOAD + 1);
        let bytes = dice.one_of(&[0, 1, 100, honest, honest / 2]);
        send(&mut session, &packet, bytes);
        while next(&mut session, true).is_some() {}
    }
    finish(&mut session);
    lives(&VSOCK);
}

/// Accepts whatever the host opens, with credit without end, and reads nothing.
fn never_read() {
    for allocated in [u32::MAX, 0, 1] {
        say!("attack 0 vsock: credit of {allocated}, and nobody who reads");
        let mut session = VSOCK.open();
        listen(&mut session);
        for _ in 0..50 {
            rest();
            while let Some(packet) = next(&mut session, false) {
                let answer = Packet {
                    own: packet.own,
                    allocated,
                    ..Packet::new(RESPONSE, packet.peer)
                };
                if packet.operation == REQUEST {
                    send(&mut session, &answer, 0);
                    session.device.kick(1);
                }
            }
        }
        lives(&VSOCK);
    }
}

/// Accepts streams, and says odd things about them.
fn live_streams(count: u64) {
    say!("attack 0 vsock: odd packets for streams that are open");
    let mut dice = Dice::new(13);
    let mut session = VSOCK.open();
    listen(&mut session);
    let mut open = [0; 8];
    let mut found = 0;
    for _ in 0..count / 4 {
        while let Some(packet) = next(&mut session, true) {
            if packet.operation == REQUEST {
                open[found % open.len()] = packet.peer;
                found += 1;
                let answer = Packet {
                    own: packet.own,
                    ..Packet::new(RESPONSE, packet.peer)
                };
                send(&mut session, &answer, 0);
            }
        }
        let length = dice.one_of(&[0, 1, 5000, MAX_PAYLOAD]);
        let odd = Packet {
            own: 1025,
            peer: dice.one_of(&open),
            length,
            kind: 1,
            source: 3,
            target: 2,
            ..Packet::dice(&mut dice)
        };
        send(&mut session, &odd, length);
    }
    finish(&mut session);
    say!("{found} streams were opened");
    lives(&VSOCK);
}

fn floods(count: u64) {
    for operation in [
        REQUEST,
        RESPONSE,
        RESET,
        SHUTDOWN,
        BYTES,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
    ] {
        say!("attack 0 vsock: a flood of operation {operation}, and no buffer for answers");
        let mut session = VSOCK.open();
        for round in 0..count {
            let flags = if operation == SHUTDOWN { 3 } else { 0 };
            let packet = Packet {
                own: round as u32,
                flags,
                ..Packet::new(operation, NOBODY)
            };
            send(&mut session, &packet, 0);
        }
        finish(&mut session);
        lives(&VSOCK);
    }
}
