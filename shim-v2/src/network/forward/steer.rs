//! Steers a namespace's loopback to one socket: a BPF program of type sk_lookup, which the kernel
//! asks which socket takes a new connection (Documentation/bpf/prog_sk_lookup.rst).
//!
//! Called by `super`. The program hangs on the namespace by a link that lives as long as its
//! descriptor, so nothing of it outlives the shim. Since Linux 5.9.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use kata_like_failure::Failure;
use kata_like_linux::bpf::{self, Assembler, Instruction, Kind, code};

/// A program that hangs on a namespace. Dropped, it is gone.
#[derive(Debug)]
pub struct Steering {
    #[allow(
        dead_code,
        reason = "the link has the program, and the program its map"
    )]
    link: OwnedFd,
}

impl Steering {
    /// Steers to `listener` each TCP connection to 127.0.0.0/8 and ::1 in `namespace`, but for
    /// Docker's resolver.
    pub fn new(namespace: BorrowedFd, listener: BorrowedFd) -> Result<Self, Failure> {
        let failed = |step: &'static str| move |cause: io::Error| Failure::failed(step, cause);
        let map = bpf::map_of_socket(listener)
            .map_err(failed("make a BPF map of the listening socket"))?;
        let program = program(map.as_raw_fd())
            .and_then(|program| bpf::load(Kind::SocketLookup, NAME, &program))
            .map_err(failed("load the BPF program that steers connections"))?;
        let link = bpf::link_to_network(&program, namespace).map_err(failed(
            "attach the BPF program that steers connections to the network namespace",
        ))?;
        Ok(Self { link })
    }
}

/// What the program is called where programs are listed.
const NAME: &str = "kata_like_ports";

// Numbers of helpers.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;

// Offsets in the context, `struct bpf_sk_lookup`. Addresses are in network byte order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IPV4: i16 = 40;
const LOCAL_IPV6: i16 = 44;

const SK_PASS: i32 = 1;

/// Docker's resolver, which listens in the namespace itself.
const RESOLVER: [u8; 4] = [127, 0, 0, 11];

/// Four bytes of an address as the program loads them.
const fn bytes(of: [u8; 4]) -> i32 {
    i32::from_ne_bytes(of)
}

/// The program. It passes whatever comes, with the listening socket assigned to it or not.
fn program(map: RawFd) -> io::Result<Vec<Instruction>> {
    const CONTEXT: u8 = 6;
    const SOCKET: u8 = 7;
    const STACK: u8 = 10;
    let mut program = Assembler::default();
    let (ipv4, steer, pass) = (program.label(), program.label(), program.label());

    program.add(code::MOVE_REGISTER, CONTEXT, 1, 0, 0);
    program.add(code::LOAD, 2, CONTEXT, PROTOCOL, 0);
    program.jump(code::JUMP_UNLESS_VALUE, 2, 0, libc::IPPROTO_TCP, pass);
    program.add(code::LOAD, 2, CONTEXT, FAMILY, 0);
    program.jump(code::JUMP_IF_VALUE, 2, 0, libc::AF_INET, ipv4);

    for (word, value) in (0i16..).zip([0, 0, 0, bytes([0, 0, 0, 1])]) {
        program.add(code::LOAD, 2, CONTEXT, LOCAL_IPV6 + 4 * word, 0);
        program.jump(code::JUMP_UNLESS_VALUE, 2, 0, value, pass);
    }
    program.jump(code::JUMP, 0, 0, 0, steer);

    program.place(ipv4);
    program.add(code::LOAD, 2, CONTEXT, LOCAL_IPV4, 0);
    program.jump(code::JUMP_IF_VALUE, 2, 0, bytes(RESOLVER), pass);
    program.add(code::AND_VALUE, 2, 0, 0, bytes([255, 0, 0, 0]));
    program.jump(code::JUMP_UNLESS_VALUE, 2, 0, bytes([127, 0, 0, 0]), pass);

    program.place(steer);
    program.add(code::STORE_VALUE, STACK, 0, -4, 0); // the map's element 0
    program.add(code::LOAD_MAP, 1, 1, 0, map); // 1: the value is a descriptor
    program.add(0, 0, 0, 0, 0);
    program.add(code::MOVE_REGISTER, 2, STACK, 0, 0);
    program.add(code::ADD_VALUE, 2, 0, 0, -4);
    program.add(code::CALL, 0, 0, 0, MAP_LOOKUP_ELEM);
    program.jump(code::JUMP_IF_NULL, 0, 0, 0, pass);
    program.add(code::MOVE_REGISTER, SOCKET, 0, 0, 0);
    program.add(code::MOVE_REGISTER, 1, CONTEXT, 0, 0);
    program.add(code::MOVE_REGISTER, 2, SOCKET, 0, 0);
    program.add(code::MOVE_VALUE, 3, 0, 0, 0);
    program.add(code::CALL, 0, 0, 0, SK_ASSIGN);
    program.add(code::MOVE_REGISTER, 1, SOCKET, 0, 0);
    program.add(code::CALL, 0, 0, 0, SK_RELEASE);

    program.place(pass);
    program.add(code::MOVE_VALUE, 0, 0, 0, SK_PASS);
    program.add(code::EXIT, 0, 0, 0, 0);
    program.finish()
}
