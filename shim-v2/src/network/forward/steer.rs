//! Steers a namespace's loopback to one socket: a BPF program of type sk_lookup, which the kernel
//! asks which socket takes a new connection (Documentation/bpf/prog_sk_lookup.rst).
//!
//! Called by `super`. The program hangs on the namespace by a link that lives as long as its
//! descriptor, so nothing of it outlives the shim. Since Linux 5.9.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use kata_like_failure::Failure;

/// A program that hangs on a namespace. Dropped, it is gone.
#[derive(Debug)]
pub struct Steering {
    #[allow(dead_code)] // held: the link has the program, and the program its map
    link: OwnedFd,
}

impl Steering {
    /// Steers to `listener` each TCP connection to 127.0.0.0/8 and ::1 in `namespace`, but for
    /// Docker's resolver.
    pub fn new(namespace: BorrowedFd, listener: BorrowedFd) -> Result<Self, Failure> {
        let failed = |step: &'static str| move |cause: io::Error| Failure::failed(step, cause);
        let map = make_map(listener).map_err(failed("make a BPF map of the listening socket"))?;
        let program = load(&program(map.as_raw_fd()))
            .map_err(failed("load the BPF program that steers connections"))?;
        let link = attach(&program, namespace).map_err(failed(
            "attach the BPF program that steers connections to the network namespace",
        ))?;
        Ok(Self { link })
    }
}

// Opcodes, of linux/bpf.h and linux/bpf_common.h: class, size or source, operation.
const LOAD: u8 = 0x61; // 32 bits from memory
const STORE_VALUE: u8 = 0x62; // 32 bits to memory
const LOAD_MAP: u8 = 0x18; // 64 bits, in two instructions
const ADD_VALUE: u8 = 0x07;
const AND_VALUE: u8 = 0x54; // 32-bit
const MOVE_VALUE: u8 = 0xb4; // 32-bit
const MOVE_REGISTER: u8 = 0xbf;
const JUMP: u8 = 0x05;
const JUMP_IF_VALUE: u8 = 0x16; // 32-bit
const JUMP_IF_NULL: u8 = 0x15;
const JUMP_UNLESS_VALUE: u8 = 0x56; // 32-bit
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

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

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

/// Code, target register, source register, offset, value.
type Step = (u8, u8, u8, i16, i32);

// Where a jump leads, in place of its offset.
const IPV4: i16 = i16::MAX;
const STEER: i16 = i16::MAX - 1;
const PASS: i16 = i16::MAX - 2;

/// The program. It passes whatever comes, with the listening socket assigned to it or not.
fn program(map: RawFd) -> Vec<Instruction> {
    const CONTEXT: u8 = 6;
    const SOCKET: u8 = 7;
    const STACK: u8 = 10;
    let of_word = |index: i16, value| {
        [
            (LOAD, 2, CONTEXT, LOCAL_IPV6 + 4 * index, 0),
            (JUMP_UNLESS_VALUE, 2, 0, PASS, value),
        ]
    };
    let begin: [Step; 5] = [
        (MOVE_REGISTER, CONTEXT, 1, 0, 0),
        (LOAD, 2, CONTEXT, PROTOCOL, 0),
        (JUMP_UNLESS_VALUE, 2, 0, PASS, libc::IPPROTO_TCP),
        (LOAD, 2, CONTEXT, FAMILY, 0),
        (JUMP_IF_VALUE, 2, 0, IPV4, libc::AF_INET),
    ];
    let ipv6 = [
        of_word(0, 0),
        of_word(1, 0),
        of_word(2, 0),
        of_word(3, bytes([0, 0, 0, 1])),
    ];
    let to_steering: [Step; 1] = [(JUMP, 0, 0, STEER, 0)];
    let ipv4: [Step; 4] = [
        (LOAD, 2, CONTEXT, LOCAL_IPV4, 0),
        (JUMP_IF_VALUE, 2, 0, PASS, bytes(RESOLVER)),
        (AND_VALUE, 2, 0, 0, bytes([255, 0, 0, 0])),
        (JUMP_UNLESS_VALUE, 2, 0, PASS, bytes([127, 0, 0, 0])),
    ];
    let steer: [Step; 14] = [
        (STORE_VALUE, STACK, 0, -4, 0), // the map's element 0
        (LOAD_MAP, 1, 1, 0, map),       // 1: the value is a descriptor
        (0, 0, 0, 0, 0),
        (MOVE_REGISTER, 2, STACK, 0, 0),
        (ADD_VALUE, 2, 0, 0, -4),
        (CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        (JUMP_IF_NULL, 0, 0, PASS, 0),
        (MOVE_REGISTER, SOCKET, 0, 0, 0),
        (MOVE_REGISTER, 1, CONTEXT, 0, 0),
        (MOVE_REGISTER, 2, SOCKET, 0, 0),
        (MOVE_VALUE, 3, 0, 0, 0),
        (CALL, 0, 0, 0, SK_ASSIGN),
        (MOVE_REGISTER, 1, SOCKET, 0, 0),
        (CALL, 0, 0, 0, SK_RELEASE),
    ];
    let pass: [Step; 2] = [(MOVE_VALUE, 0, 0, 0, SK_PASS), (EXIT, 0, 0, 0, 0)];

    let ipv6 = ipv6.concat();
    let parts: [&[Step]; 6] = [&begin, &ipv6, &to_steering, &ipv4, &steer, &pass];
    let start = |part: usize| {
        parts
            .iter()
            .take(part)
            .map(|part| part.len())
            .sum::<usize>()
    };
    let labels = [(IPV4, start(3)), (STEER, start(4)), (PASS, start(5))];
    let instruction = |(at, (code, to, from, offset, value)): (usize, Step)| {
        let label = labels.iter().find(|(label, _)| *label == offset);
        Instruction {
            code,
            registers: from << 4 | to,
            // Forward, and over less than forty.
            offset: label.map_or(offset, |(_, target)| (target - at - 1) as i16),
            value,
        }
    };
    parts
        .concat()
        .into_iter()
        .enumerate()
        .map(instruction)
        .collect()
}

/// A map whose one element is the socket.
fn make_map(listener: BorrowedFd) -> io::Result<OwnedFd> {
    /// `union bpf_attr` of BPF_MAP_CREATE, as far as it is used; the kernel takes the rest as zero.
    #[repr(C)]
    struct Create {
        kind: u32,
        key_size: u32,
        value_size: u32,
        entries: u32,
        flags: u32,
    }
    /// The same of BPF_MAP_UPDATE_ELEM.
    #[repr(C)]
    struct Update {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let create = Create {
        kind: 15, // BPF_MAP_TYPE_SOCKMAP
        key_size: 4,
        value_size: 8,
        entries: 1,
        flags: 0,
    };
    // SAFETY: BPF_MAP_CREATE (0) takes no address. What it returns is a new descriptor that nobody
    // else owns.
    let map = unsafe { OwnedFd::from_raw_fd(bpf(0, &create)?) };
    let (key, value) = (0u32, listener.as_raw_fd() as u64); // open, and so not negative
    let update = Update {
        map: map.as_raw_fd() as u64,
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    // SAFETY: BPF_MAP_UPDATE_ELEM (2) reads a key of 4 and a value of 8 bytes, as the map was made;
    // both live.
    unsafe { bpf(2, &update)? };
    Ok(map)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    /// The same of BPF_PROG_LOAD.
    #[repr(C)]
    #[derive(Default)]
    struct Load {
        kind: u32,
        length: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        expected_attach_type: u32,
    }
    let load = Load {
        kind: 30,                     // BPF_PROG_TYPE_SK_LOOKUP
        length: program.len() as u32, // of forty at most
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        name: *b"kata_like_ports\0",
        expected_attach_type: SK_LOOKUP,
        ..Load::default()
    };
    // SAFETY: BPF_PROG_LOAD (5) reads `length` instructions from a live slice of that many, and a C
    // string; there is no log buffer. What it returns is a new descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(5, &load)?)) }
}

/// BPF_SK_LOOKUP.
const SK_LOOKUP: u32 = 36;

fn attach(program: &OwnedFd, namespace: BorrowedFd) -> io::Result<OwnedFd> {
    /// The same of BPF_LINK_CREATE.
    #[repr(C)]
    struct Link {
        program: i32,
        target: i32,
        kind: u32,
        flags: u32,
    }
    let link = Link {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        kind: SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: BPF_LINK_CREATE (28) takes no address; both descriptors are open. What it returns is
    // a new descriptor that nobody else owns.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(28, &link)?)) }
}

/// bpf(2).
///
/// # Safety
///
/// `attributes` must be what `command` takes, with addresses of what lives.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads `attributes`, and no more than the given size. What it means is the
    // caller's duty.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match RawFd::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
