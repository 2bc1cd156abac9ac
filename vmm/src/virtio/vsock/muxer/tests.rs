//! A guest of packets and a host of real sockets, against the muxer between them.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown as Half;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::super::connection::BUFFER;
use super::super::packet::{Credit, GUEST_CID, HOST_CID, MAX_PAYLOAD, Shut};
use super::*;

const AGENT: u32 = 1024;
const STREAM: u32 = 2048;
/// One page: what Linux 6.12 gives for a packet.
const PAGE: usize = 4096;

impl Payload for &[u8] {
    fn send(&mut self, socket: BorrowedFd, limit: usize) -> io::Result<usize> {
        let part = &self[..limit.min(self.len())];
        let flags = rustix::net::SendFlags::NOSIGNAL;
        let sent = rustix::net::send(socket, part, flags)?;
        *self = &self[sent..];
        Ok(sent)
    }

    fn copy(&mut self, into: &mut [u8]) -> Result<(), Malformed> {
        let (now, rest) = self.split_at(into.len());
        into.copy_from_slice(now);
        *self = rest;
        Ok(())
    }
}

struct Buffer(Vec<u8>);

impl Room for Buffer {
    fn room(&self) -> usize {
        PAGE - self.0.len()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        assert!(bytes.len() <= self.room(), "more than the buffer holds");
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// A header as the guest writes it.
fn header(ports: Ports, operation: Operation) -> Header {
    Header {
        credit: Credit {
            allocated: 1 << 20,
            forwarded: 0,
        },
        ..Header::new(ports, operation)
    }
}

fn to_bytes(header: &Header) -> [u8; HEADER_SIZE] {
    let turned = Header {
        ports: Ports {
            host: header.ports.guest,
            guest: header.ports.host,
        },
        ..*header
    };
    let mut bytes = turned.to_bytes();
    bytes[..8].copy_from_slice(&GUEST_CID.to_le_bytes());
    bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
    bytes
}

fn parse(bytes: &[u8]) -> (Header, Vec<u8>) {
    let head: [u8; HEADER_SIZE] = bytes[..HEADER_SIZE].try_into().unwrap();
    let body = bytes[HEADER_SIZE..].to_vec();
    // Turn it round so that the parser of the guest's packets reads it.
    let mut turned = head;
    turned[..8].copy_from_slice(&head[8..16]);
    turned[8..16].copy_from_slice(&head[..8]);
    let Received::Packet(header) = packet::parse(&turned, body.len()) else {
        panic!("the muxer sent {head:?}");
    };
    assert_eq!(header.payload, body.len());
    let ports = Ports {
        host: header.ports.guest,
        guest: header.ports.host,
    };
    (Header { ports, ..header }, body)
}

struct World {
    muxer: Muxer,
    /// The other end of the agent's connection.
    agent: UnixStream,
    address: SocketAddr,
    dialled: Arc<AtomicUsize>,
}

impl World {
    fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vsock-test-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let (ours, agent) = UnixStream::pair().unwrap();
        agent.set_nonblocking(true).unwrap();
        let dialled = Arc::new(AtomicUsize::new(0));
        let count = dialled.clone();
        let mut muxer = Muxer::new(Endpoints {
            agent_port: AGENT,
            stream_port: STREAM,
            agent: OwnedFd::from(ours),
            streams: OwnedFd::from(listener),
            on_agent: Box::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        })
        .unwrap();
        muxer.start().unwrap();
        Self {
            muxer,
            agent,
            address,
            dialled,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect_addr(&self.address).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    fn say(&mut self, header: Header, body: &[u8]) {
        let header = Header {
            payload: body.len(),
            ..header
        };
        let mut payload = body;
        self.muxer
            .receive(&to_bytes(&header), &mut payload, body.len())
            .unwrap();
    }

    /// All packets that the guest gets if it takes as many as there are.
    fn hear(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut heard = Vec::new();
        loop {
            self.muxer.host_ready().unwrap();
            match self.hear_one() {
                Some(packet) => heard.push(packet),
                None => return heard,
            }
        }
    }

    fn hear_one(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut buffer = Buffer(Vec::new());
        match self.muxer.send(&mut buffer).unwrap() {
            true => Some(parse(&buffer.0)),
            false => {
                assert!(buffer.0.is_empty());
                None
            }
        }
    }

    fn operations(&mut self) -> Vec<Operation> {
        let heard = self.hear();
        heard.iter().map(|(header, _)| header.operation).collect()
    }

    /// A stream that the host has made and the guest accepted, with the guest's credit.
    fn open(&mut self, credit: Credit) -> (UnixStream, Ports) {
        let stream = self.connect();
        let heard = self.hear();
        let mut requests = heard.iter().map(|(header, _)| header);
        let request = requests.find(|header| header.operation == Operation::Request);
        let request = request.expect("a request");
        assert_eq!(request.ports.guest, STREAM);
        let ports = request.ports;
        let response = Header {
            credit,
            ..header(ports, Operation::Response)
        };
        self.say(response, &[]);
        (stream, ports)
    }
}

const ROOMY: Credit = Credit {
    allocated: 1 << 30,
    forwarded: 0,
};

fn shutdown(ports: Ports, receive: bool, send: bool) -> Header {
    Header {
        shut: Shut { receive, send },
        ..header(ports, Operation::Shutdown)
    }
}

fn at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

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
    // Not even when the first has ended, or after a reset of the device.
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

/// A pattern in which a lost, doubled or exchanged piece is seen.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Several MiB each way at once, with a guest that grants little and takes its time.
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
        if rounds % 3 == 0 {
            consumed = guest_got.len() as u32;
            let update = Header {
                credit: mine(consumed),
                ..header(ports, Operation::CreditUpdate)
            };
            world.say(update, &[]);
        }
        let mut part = [0; 30_000];
        if rounds % 2 == 0
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

/// A guest with no credit left is told of new room without having to ask.
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

/// What the guest sent before it closed gets to a host that reads late.
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

/// A caller that gave up is forgotten, and the guest told so.
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

/// A flood that the guest does not even read the answers of leaves the device working.
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

    /// Whatever guest and host do: no panic, no limit broken, and a new stream works afterwards.
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
        // Every socket of the host is closed: what is left waits for the guest alone.
        world.hear();
        for (port, stream) in &world.muxer.streams {
            prop_assert!(*port == AGENT || !stream.connection.wants_writable());
        }
    }
}
