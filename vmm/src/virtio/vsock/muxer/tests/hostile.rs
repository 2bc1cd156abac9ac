//! Limits, floods, and anything else that either side may do.

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::super::super::connection::BUFFER;
use super::super::super::packet::{Credit, HEADER_SIZE, Header, MAX_PAYLOAD, Operation, Ports};
use super::super::{MAX_CONNECTIONS, MAX_RESETS};
use super::world::{AGENT, ROOMY, STREAM, World, at_end, header, to_bytes};

#[test]
fn beyond_the_limit_a_caller_is_refused_at_once() {
    let mut world = World::new();
    let callers: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let stream = world.connect();
            world.muxer.host_ready().unwrap();
            stream
        })
        .collect();
    let mut extra = world.connect();
    world.muxer.host_ready().unwrap();
    assert!(at_end(&mut extra));
    assert_eq!(world.operations().len(), MAX_CONNECTIONS);
    drop(callers);
    world.hear();
    assert!(world.muxer.streams.is_empty());
    world.open(ROOMY);
}

/// The device still works after a flood whose answers the guest does not even read.
#[test]
fn after_a_flood_a_stream_gets_through() {
    let mut world = World::new();
    let (mut stream, ports) = world.open(ROOMY);
    for number in 0..100_000_u32 {
        let forged = Ports {
            host: AGENT + 1 + number,
            guest: number.rotate_left(7),
        };
        let operation = match number % 4 {
            0 => Operation::Request,
            1 => Operation::Data,
            2 => Operation::CreditRequest,
            _ => Operation::Shutdown,
        };
        world.say(header(forged, operation), b"");
    }
    assert!(world.muxer.resets.len() <= MAX_RESETS);
    stream.write_all(b"alive").unwrap();
    world.muxer.host_ready().unwrap();
    let soon: Vec<_> = (0..2).filter_map(|_| world.hear_one()).collect();
    assert!(soon.iter().any(|(_, body)| body == b"alive"), "{soon:?}");
    assert_eq!(world.hear().len(), MAX_RESETS - 1);
    world.say(header(ports, Operation::Data), b"too");
    assert_eq!(stream.read(&mut [0; 9]).unwrap(), 3);
    world.say(header(ports, Operation::CreditRequest), &[]);
    assert_eq!(world.operations(), [Operation::CreditUpdate]);
}

#[derive(Clone, Debug)]
enum Act {
    Say(u16, usize, u32, u32, u32, usize),
    Bytes(Vec<u8>, usize),
    Hear(usize),
    Connect,
    Write(usize, usize),
    Read(usize),
    HalfClose(usize, bool),
    Close(usize),
}

fn acts() -> impl Strategy<Value = Act> {
    let any_stream = 0..6_usize;
    let small = prop_oneof![Just(0), Just(1), 0..200_000_u32, any::<u32>()];
    let length = prop_oneof![0..100_usize, Just(MAX_PAYLOAD)];
    let bytes = proptest::collection::vec(any::<u8>(), HEADER_SIZE);
    prop_oneof![
        6 => (1..8_u16, any_stream.clone(), 0..4_u32, small.clone(), small, length)
            .prop_map(|(op, stream, flags, alloc, fwd, len)| Act::Say(op, stream, flags, alloc, fwd, len)),
        1 => (bytes, 0..100_usize).prop_map(|(bytes, held)| Act::Bytes(bytes, held)),
        3 => (0..20_usize).prop_map(Act::Hear),
        2 => Just(Act::Connect),
        3 => (any_stream.clone(), 0..300_000_usize).prop_map(|(stream, size)| Act::Write(stream, size)),
        2 => any_stream.clone().prop_map(Act::Read),
        1 => (any_stream.clone(), any::<bool>()).prop_map(|(stream, write)| Act::HalfClose(stream, write)),
        1 => any_stream.prop_map(Act::Close),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever guest and host do, nothing panics, no limit is broken, and a new stream works
    /// afterwards.
    #[test]
    fn nothing_that_either_side_does_breaks_the_device(acts in proptest::collection::vec(acts(), 1..120)) {
        let mut world = World::new();
        let mut hosts: Vec<UnixStream> = Vec::new();
        let body = vec![9; MAX_PAYLOAD];
        for act in acts {
            match act {
                Act::Say(operation, stream, flags, allocated, forwarded, length) => {
                    let known: Vec<u32> = world.muxer.streams.keys().copied().collect();
                    let host = known.get(stream).copied().unwrap_or(AGENT);
                    let guest = if host == AGENT { 77 } else { STREAM };
                    let mut bytes = to_bytes(&Header {
                        credit: Credit { allocated, forwarded },
                        payload: length,
                        ..header(Ports { host, guest }, Operation::Data)
                    });
                    bytes[30..32].copy_from_slice(&operation.to_le_bytes());
                    bytes[32..36].copy_from_slice(&flags.to_le_bytes());
                    let mut payload = &body[..length];
                    world.muxer.receive(&bytes, &mut payload, length).unwrap();
                }
                Act::Bytes(bytes, held) => {
                    let mut payload = &body[..held];
                    let bytes = bytes[..].try_into().unwrap();
                    world.muxer.receive(&bytes, &mut payload, held).unwrap();
                }
                Act::Hear(count) => {
                    world.muxer.host_ready().unwrap();
                    for _ in 0..count {
                        world.hear_one();
                    }
                }
                Act::Connect if hosts.len() < 20 => hosts.push(world.connect()),
                Act::Write(stream, size) => {
                    if let Some(stream) = hosts.get_mut(stream) {
                        let _ = stream.write(&vec![1; size]);
                    }
                }
                Act::Read(stream) => {
                    if let Some(stream) = hosts.get_mut(stream) {
                        let _ = stream.read(&mut vec![0; 100_000]);
                    }
                }
                Act::HalfClose(stream, write) => {
                    if let Some(stream) = hosts.get_mut(stream) {
                        let _ = stream.shutdown(if write { Half::Write } else { Half::Read });
                    }
                }
                Act::Close(stream) if stream < hosts.len() => drop(hosts.swap_remove(stream)),
                Act::Connect | Act::Close(_) => {}
            }
            for stream in world.muxer.streams.values() {
                prop_assert!(stream.connection.unsent() <= BUFFER as usize);
            }
            prop_assert!(world.muxer.resets.len() <= MAX_RESETS);
            prop_assert!(world.muxer.ready.len() <= world.muxer.streams.len());
        }
        world.hear();
        let (mut stream, ports) = {
            let stream = world.connect();
            let heard = world.hear();
            let request = heard.iter().find(|(packet, _)| packet.operation == Operation::Request);
            let ports = request.expect("the request of a new stream").0.ports;
            world.say(header(ports, Operation::Response), &[]);
            (stream, ports)
        };
        stream.write_all(b"alive").unwrap();
        let heard = world.hear();
        prop_assert!(heard.iter().any(|(packet, body)| packet.ports == ports && body == b"alive"));
        drop((stream, hosts));
        // Every socket of the host is closed: what is left waits only for the guest.
        world.hear();
        for (port, stream) in &world.muxer.streams {
            prop_assert!(*port == AGENT || !stream.connection.wants_writable());
        }
    }
}
