//! BPF programs: written, loaded, and attached to what they decide about.
//!
//! Two kinds: which devices the processes of a cgroup may use
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller"), and which socket takes a
//! connection in a network namespace (Documentation/bpf/prog_sk_lookup.rst).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

pub mod assembler;

pub use assembler::{Assembler, Instruction, Label, code};

/// What a program decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// BPF_PROG_TYPE_CGROUP_DEVICE: whether a process may use a device.
    CgroupDevice,
    /// BPF_PROG_TYPE_SK_LOOKUP: which socket takes a new connection. Since Linux 5.9.
    SocketLookup,
}

impl Kind {
    /// The program's type, and the attach type that it must be loaded with.
    fn numbers(self) -> (u32, u32) {
        match self {
            Self::CgroupDevice => (15, 0),
            Self::SocketLookup => (30, SK_LOOKUP),
        }
    }
}

/// Of `enum bpf_attach_type`.
const CGROUP_DEVICE: u32 = 6;
const SK_LOOKUP: u32 = 36;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;

/// Loads a program. `name` is for those who list programs: letters, digits, `_` and `.`, 15 at
/// most.
pub fn load(kind: Kind, name: &str, program: &[Instruction]) -> io::Result<OwnedFd> {
    let (kind, expected_attach_type) = kind.numbers();
    let mut padded = [0; 16];
    for (to, from) in padded.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let load = Load {
        kind,
        length: u32::try_from(program.len())
            .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        name: padded,
        expected_attach_type,
        ..Load::default()
    };
    made(bpf(Command::Load(&load))?)
}

/// Attaches a program of kind [`Kind::CgroupDevice`] to a cgroup, beside those that are there.
pub fn attach_to_cgroup(program: &OwnedFd, cgroup: BorrowedFd) -> io::Result<()> {
    let attach = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        kind: CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
        replace: 0,
    };
    bpf(Command::Attach(&attach)).map(drop)
}

/// Attaches a program of kind [`Kind::SocketLookup`] to a network namespace, for as long as the
/// link that is returned lives.
pub fn link_to_network(program: &OwnedFd, namespace: BorrowedFd) -> io::Result<OwnedFd> {
    let link = Link {
        program: program.as_raw_fd(),
        target: namespace.as_raw_fd(),
        kind: SK_LOOKUP,
        flags: 0,
    };
    made(bpf(Command::Link(&link))?)
}

/// Makes a map whose element 0 is `socket`.
pub fn map_of_socket(socket: BorrowedFd) -> io::Result<OwnedFd> {
    let create = CreateMap {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: size_of::<u32>() as u32,
        value_size: size_of::<u64>() as u32,
        entries: 1,
        flags: 0,
    };
    let map = made(bpf(Command::CreateMap(&create))?)?;
    let (key, value) = (0u32, socket.as_raw_fd() as u64); // open, and so not negative
    let update = Update {
        map: map.as_raw_fd() as u64,
        key: std::ptr::from_ref(&key) as u64,
        value: std::ptr::from_ref(&value) as u64,
        flags: 0,
    };
    bpf(Command::Update(&update))?;
    Ok(map)
}

/// A command of bpf(2), with its part of `union bpf_attr`. The kernel takes the rest as zero.
enum Command<'a> {
    CreateMap(&'a CreateMap),
    Update(&'a Update),
    Load(&'a Load),
    Attach(&'a Attach),
    Link(&'a Link),
}

#[repr(C)]
struct CreateMap {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

#[repr(C)]
struct Update {
    map: u64,
    key: u64,
    value: u64,
    flags: u64,
}

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

#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
    replace: u32,
}

#[repr(C)]
struct Link {
    program: i32,
    target: i32,
    kind: u32,
    flags: u32,
}

/// What the kernel answered: for the commands that make something its descriptor.
fn made(answer: Option<OwnedFd>) -> io::Result<OwnedFd> {
    answer.ok_or_else(|| io::Error::other("the kernel made no BPF object"))
}

fn bpf(command: Command) -> io::Result<Option<OwnedFd>> {
    fn parts<T>(attributes: &T) -> (*const libc::c_void, usize) {
        (std::ptr::from_ref(attributes).cast(), size_of::<T>())
    }
    let (number, (attributes, size), makes) = match command {
        Command::CreateMap(create) => (0, parts(create), true),
        Command::Update(update) => (2, parts(update), false),
        Command::Load(load) => (5, parts(load), true),
        Command::Attach(attach) => (8, parts(attach), false),
        Command::Link(link) => (28, parts(link), true),
    };
    // SAFETY: the kernel reads `size` bytes of what `command` refers to, and what the addresses
    // there lead to. Each structure is made in one function above, which keeps all of that alive:
    // - `Load`: as many instructions as the slice has, and a static C string. There is no log.
    // - `Update`: a key of four bytes and a value of eight, as the one kind of map here has them.
    // - The others have no address.
    // A command that `makes` something returns a new descriptor that nobody else owns.
    unsafe {
        match libc::syscall(libc::SYS_bpf, number, attributes, size) {
            -1 => Err(io::Error::last_os_error()),
            descriptor if makes => Ok(RawFd::try_from(descriptor)
                .ok()
                .map(|number| OwnedFd::from_raw_fd(number))),
            _ => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    /// A program that says yes to all.
    fn yes(kind: Kind) -> io::Result<OwnedFd> {
        let mut program = Assembler::default();
        program.add(code::MOVE_VALUE, 0, 0, 0, 1);
        program.add(code::EXIT, 0, 0, 0, 0);
        load(kind, "yes", &program.finish().unwrap())
    }

    /// Whether this kernel has the call and lets us make it; the callers' own tests are judges,
    /// too.
    fn possible<T>(result: io::Result<T>) -> Option<T> {
        match result {
            Ok(it) => Some(it),
            Err(error) => {
                let errno = error.raw_os_error();
                assert!(
                    matches!(errno, Some(libc::EPERM | libc::ENOSYS | libc::EACCES)),
                    "{error}"
                );
                eprintln!("not shown here: {error}");
                None
            }
        }
    }

    #[test]
    fn a_device_filter_is_loaded() {
        possible(yes(Kind::CgroupDevice));
    }

    #[test]
    fn a_lookup_program_hangs_on_a_network_namespace_by_its_link() {
        std::thread::spawn(|| {
            crate::namespace::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
            let namespace = std::fs::File::open("/proc/thread-self/ns/net").unwrap();
            if let Some(program) = possible(yes(Kind::SocketLookup)) {
                let link = link_to_network(&program, namespace.as_fd()).unwrap();
                drop(link);
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_program_that_does_not_end_is_refused() {
        let mut program = Assembler::default();
        program.add(code::MOVE_VALUE, 0, 0, 0, 1);
        let refused = load(Kind::CgroupDevice, "endless", &program.finish().unwrap());
        assert!(refused.is_err());
    }

    #[test]
    fn a_map_takes_a_listening_socket() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        possible(map_of_socket(listener.as_fd()));
    }
}
