//! Streams from beginning to end, as guest and host see them.

mod hostile;
mod world;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown as Half;
use std::sync::atomic::Ordering;

use self::world::{AGENT, ROOMY, STREAM, World, at_end, header, shutdown};
use super::super::connection::BUFFER;
use super::super::packet::{Credit, MAX_PAYLOAD, Shut};
use super::*;

#[test]
fn the_guest_connects_to_the_agent_s_port_once_and_to_nothing_else() {
    let mut world = World::new();
    for host in [0, 1, AGENT - 1, STREAM, u32::MAX] {
        let ports = Ports { host, guest: 5 };
        world.say(header(ports, Operation::Request), &[]);
        let heard = world.hear();
        assert_eq!(heard.len(), 1);
        assert_eq!(
            (heard[0].0.operation, heard[0].0.ports),
            (Operation::Reset, ports)
        );
    }
    assert_eq!(world.dialled.load(Ordering::Relaxed), 0);
    let ports = Ports {
        host: AGENT,
        guest: 5,
    };
    world.say(header(ports, Operation::Request), &[]);
    assert_eq!(world.operations(), [Operation::Response]);
    assert_eq!(world.dialled.load(Ordering::Relaxed), 1);
    world.say(header(ports, Operation::Data), b"hello");
    let mut got = [0; 9];
    assert_eq!(world.agent.read(&mut got).unwrap(), 5);
    world.agent.write_all(b"answer").unwrap();
    assert_eq!(world.hear()[0].1, b"answer");
    let second = Ports {
        host: AGENT,
        guest: 6,
    };
    world.say(header(second, Operation::Request), &[]);
    assert_eq!(world.operations(), [Operation::Reset]);
    // Not even when the first one has ended, or after a reset of the device.
    world.say(header(ports, Operation::Reset), &[]);
    assert!(at_end(&mut world.agent));
    world.muxer.stop();
    world.muxer.start().unwrap();
    world.say(header(second, Operation::Request), &[]);
    assert_eq!(world.operations(), [Operation::Reset]);
    assert_eq!(world.dialled.load(Ordering::Relaxed), 1);
}

#[test]
fn a_stream_that_the_guest_refuses_is_closed_on_the_host() {
    let mut world = World::new();
    let mut stream = world.connect();
    let request = world.hear()[0].0;
    world.say(header(request.ports, Operation::Reset), &[]);
    assert!(at_end(&mut stream));
    let second = world.connect();
    assert_ne!(
        world.hear()[0].0.ports,
        request.ports,
        "{second:?}: a port used twice"
    );
}

/// A pattern that shows a lost, doubled or swapped piece.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Several MiB each way at once, with a guest that grants little and is slow.
#[test]
fn bytes_arrive_whole_and_in_order_under_little_credit() {
    let mut world = World::new();
    let small = 5000;
    let (mut stream, ports) = world.open(Credit {
        allocated: small,
        forwarded: 0,
    });
    let bytes = pattern(3 << 20);
    let (mut written, mut host_got) = (0, Vec::new());
    let (mut said, mut guest_got) = (0_usize, Vec::new());
    let (mut granted, mut consumed) = (Credit::default(), 0_u32);
    let mut rounds = 0_u32;
    while host_got.len() < bytes.len() || guest_got.len() < bytes.len() {
        rounds += 1;
        assert!(
            rounds < 1_000_000,
            "stuck at {} and {}",
            host_got.len(),
            guest_got.len()
        );
        if let Ok(count) = stream.write(&bytes[written..]) {
            written += count;
        }
        for (packet, body) in world.hear() {
            granted = packet.credit;
            match packet.operation {
                Operation::Data => guest_got.extend(body),
                Operation::CreditUpdate | Operation::CreditRequest => {}
                other => panic!("{other:?}"),
            }
            assert!(
                guest_got.len() as u32 - consumed <= small,
                "more than was granted"
            );
        }
        let mine = |consumed| Credit {
            allocated: small,
            forwarded: consumed,
        };
        let free = BUFFER - (said as u32).wrapping_sub(granted.forwarded);
        let count = (free as usize).min(MAX_PAYLOAD).min(bytes.len() - said);
        if count > 0 {
            let data = Header {
                credit: mine(consumed),
                ..header(ports, Operation::Data)
            };
            world.say(data, &bytes[said..said + count]);
            said += count;
        }
        if rounds.is_multiple_of(3) {
            consumed = guest_got.len() as u32;
            let update = Header {
                credit: mine(consumed),
                ..header(ports, Operation::CreditUpdate)
            };
            world.say(update, &[]);
        }
        let mut part = [0; 30_000];
        if rounds.is_multiple_of(2)
            && let Ok(count) = stream.read(&mut part)
        {
            host_got.extend_from_slice(&part[..count]);
        }
    }
    assert!(
        host_got == bytes && guest_got == bytes,
        "other bytes arrived"
    );
}

/// A guest without credit hears of new room without asking.
#[test]
fn a_guest_that_has_sent_all_it_may_hears_of_room_again() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    let chunk = vec![7; MAX_PAYLOAD];
    let mut sent = 0;
    // What the socket takes at once is room again at once; fill both.
    loop {
        let free = BUFFER as usize - world.muxer.streams[&ports.host].connection.unsent();
        if free < chunk.len() {
            break;
        }
        world.say(header(ports, Operation::Data), &chunk);
        sent += chunk.len();
    }
    world.hear();
    let mut got = 0;
    let mut told = false;
    let mut part = vec![0; 65_536];
    while got < sent {
        match stream.read(&mut part) {
            Ok(count) => got += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        told |= world.operations().contains(&Operation::CreditUpdate);
    }
    assert!(told);
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    let chunk = vec![7; MAX_PAYLOAD];
    let mut ended = false;
    for _ in 0..100 {
        world.say(header(ports, Operation::Data), &chunk);
        let held = world.muxer.streams.get(&ports.host);
        assert!(held.is_none_or(|stream| stream.connection.unsent() <= BUFFER as usize));
        ended |= world.operations().contains(&Operation::Reset);
    }
    assert!(ended && world.muxer.streams.is_empty());
    while !at_end(&mut stream) {}
}

#[test]
fn the_guest_closes_its_sending_half() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    world.say(header(ports, Operation::Data), b"last words");
    world.say(shutdown(ports, false, true), &[]);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"last words");
    stream.write_all(b"still heard").unwrap();
    assert_eq!(world.hear()[0].1, b"still heard");
    drop(stream);
    let heard = world.hear();
    let [(last, _)] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!(last.operation, Operation::Shutdown);
    assert!(last.shut.both() && world.muxer.streams.is_empty());
}

#[test]
fn the_host_closes_its_sending_half() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    stream.write_all(b"stdin").unwrap();
    stream.shutdown(Half::Write).unwrap();
    let heard = world.hear();
    let [(data, body), (end, _)] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!(
        (data.operation, &body[..]),
        (Operation::Data, &b"stdin"[..])
    );
    let half = Shut {
        receive: false,
        send: true,
    };
    assert_eq!((end.operation, end.shut), (Operation::Shutdown, half));
    world.say(header(ports, Operation::Data), b"stdout");
    let mut got = [0; 10];
    assert_eq!(stream.read(&mut got).unwrap(), 6);
    world.say(shutdown(ports, true, true), &[]);
    assert_eq!(world.operations(), [Operation::Reset]);
    assert!(at_end(&mut stream) && world.muxer.streams.is_empty());
}

#[test]
fn the_guest_closes_its_receiving_half() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    world.say(shutdown(ports, true, false), &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    world.say(header(ports, Operation::Data), b"goes on");
    let mut got = [0; 10];
    assert_eq!(stream.read(&mut got).unwrap(), 7);
    drop(stream);
    let heard = world.hear();
    assert!(heard.last().unwrap().0.shut.both(), "{heard:?}");
    assert!(world.muxer.streams.is_empty());
}

/// Bytes that the guest sent before it closed reach a host that reads late.
#[test]
fn bytes_of_a_guest_that_has_closed_still_arrive() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    let bytes = pattern(400_000);
    let mut at = 0;
    while at < bytes.len() {
        let free = BUFFER as usize - world.muxer.streams[&ports.host].connection.unsent();
        let count = free.min(MAX_PAYLOAD).min(bytes.len() - at);
        world.say(header(ports, Operation::Data), &bytes[at..at + count]);
        at += count;
    }
    world.say(shutdown(ports, true, true), &[]);
    assert!(world.operations().contains(&Operation::Reset));
    let mut got = Vec::new();
    let mut part = [0; 10_000];
    loop {
        match stream.read(&mut part) {
            Ok(0) => break,
            Ok(count) => got.extend_from_slice(&part[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        assert!(world.hear().is_empty());
    }
    assert!(got == bytes && world.muxer.streams.is_empty());
}

/// A caller that writes and closes before the guest has answered loses nothing.
#[test]
fn bytes_of_a_host_that_has_closed_still_arrive() {
    let mut world = World::new();
    let mut stream = world.connect();
    stream.write_all(b"in a hurry").unwrap();
    drop(stream);
    let request = world.hear()[0].0;
    world.say(header(request.ports, Operation::Response), &[]);
    let heard = world.hear();
    let [(_, body), (end, _)] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!(body, b"in a hurry");
    assert!(end.shut.both() && world.muxer.streams.is_empty());
}

/// A caller that gave up is forgotten, and the guest hears of it.
#[test]
fn a_host_that_closes_before_the_answer_leaves_nothing() {
    let mut world = World::new();
    let stream = world.connect();
    assert_eq!(world.operations(), [Operation::Request]);
    drop(stream);
    assert_eq!(world.operations(), [Operation::Reset]);
    assert!(world.muxer.streams.is_empty());
}

#[test]
fn a_stuck_stream_holds_up_no_other() {
    let mut world = World::new();
    let (mut no_credit, _) = world.open(Credit::default());
    no_credit.write_all(&[1; 100_000]).unwrap();
    let (_unread, unread_ports) = world.open(ROOMY);
    for _ in 0..3 {
        world.say(header(unread_ports, Operation::Data), &[2; MAX_PAYLOAD]);
    }
    let (mut good, ports) = world.open(ROOMY);
    world.hear();
    for _ in 0..100 {
        good.write_all(b"ping").unwrap();
        let heard = world.hear();
        let [(_, body)] = &heard[..] else {
            panic!("{heard:?}")
        };
        assert_eq!(body, b"ping");
        world.say(header(ports, Operation::Data), b"pong");
        let mut got = [0; 5];
        assert_eq!(good.read(&mut got).unwrap(), 4);
    }
}

/// Each of two busy streams gets every other buffer.
#[test]
fn busy_streams_take_turns() {
    let mut world = World::new();
    let (mut one, _) = world.open(ROOMY);
    let (mut other, ports) = world.open(ROOMY);
    one.write_all(&[1; 50_000]).unwrap();
    other.write_all(&[2; 50_000]).unwrap();
    world.muxer.host_ready().unwrap();
    let firsts: Vec<_> = (0..10).map(|_| world.hear_one().unwrap().0.ports).collect();
    assert_eq!(firsts.iter().filter(|port| **port == ports).count(), 5);
}
