//! The attacks: what is called, and how the little host suffers from it.

use std::ffi::CStr;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::fs::MetadataExt;

use kata_like_jail::layers::Layer;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::{Errno, Result};
use rustix::mount::MountFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
use rustix::process::Resource;
use rustix::thread::UnshareFlags;

use crate::host::{ABSTRACT, SHARED_MEMORY, World};
use crate::{Attack, Wall};

/// The namespaces from birth.
pub const PIDS: Wall = Wall::Namespace(UnshareFlags::NEWPID);
/// See [`PIDS`].
pub const NETWORK: Wall = Wall::Namespace(UnshareFlags::NEWNET);
/// See [`PIDS`].
pub const IPC: Wall = Wall::Namespace(UnshareFlags::NEWIPC);
/// See [`PIDS`].
pub const HOST_NAME: Wall = Wall::Namespace(UnshareFlags::NEWUTS);
/// See [`PIDS`].
pub const CGROUPS: Wall = Wall::Namespace(UnshareFlags::NEWCGROUP);
/// The mount namespace.
pub const MOUNTS: Wall = Wall::Layer(Layer::Mounts);
/// The root directory.
pub const ROOT: Wall = Wall::Layer(Layer::Root);
/// The user.
pub const USER: Wall = Wall::Layer(Layer::User);
/// The capabilities of a process that stays root.
pub const CAPABILITIES: Wall = Wall::Layer(Layer::Capabilities);
/// The closed descriptors.
pub const DESCRIPTORS: Wall = Wall::Layer(Layer::Descriptors);

/// A limit.
pub const fn limit(what: Resource) -> Wall {
    Wall::Layer(Layer::Limit(what))
}

const fn attack(
    name: &'static str,
    act: fn(&World) -> Result<()>,
    stopped_by: &'static [Wall],
) -> Attack {
    Attack {
        name,
        act,
        harm: None,
        stopped_by,
    }
}

const fn harmful(
    name: &'static str,
    act: fn(&World) -> Result<()>,
    harm: fn(&World, i32) -> bool,
    stopped_by: &'static [Wall],
) -> Attack {
    Attack {
        name,
        act,
        harm: Some(harm),
        stopped_by,
    }
}

/// Reads a file of the host, by its path.
pub const fn open(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(rustix::fs::CWD, c"/mnt/secret", flags, Mode::empty())?;
        rustix::io::read(file, &mut [0u8; 6]).map(drop)
    };
    attack("open a file of the host", act, stopped_by)
}

/// Mounts over a directory of the host.
pub const fn mount(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| {
        let mount = |at: &CStr| rustix::mount::mount(c"x", at, c"tmpfs", MountFlags::empty(), None);
        mount(c"/mnt").or_else(|_| mount(c"/"))
    };
    let harm = |_: &World, _| fs::metadata("/mnt/secret").is_err();
    harmful("mount over the host's files", act, harm, stopped_by)
}

/// Traces a process.
pub const fn trace(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        const SEIZE: libc::c_uint = libc::PTRACE_SEIZE;
        // SAFETY: this request takes a number, and no address.
        of(unsafe { libc::ptrace(SEIZE, world.victim, 0, 0) })
    };
    attack("trace a process", act, stopped_by)
}

/// Kills a process by its number.
pub const fn kill(stopped_by: &'static [Wall]) -> Attack {
    // SAFETY: kill takes numbers.
    let act = |world: &World| of(unsafe { libc::kill(world.victim, libc::SIGKILL) }.into());
    harmful("kill by number", act, victim_is_dead, stopped_by)
}

/// Has the kernel kill a process when a descriptor becomes readable (fcntl(2), F_SETOWN).
pub const fn notify(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        const F_SETSIG: libc::c_int = 10; // fcntl.h; the crate libc lacks it
        let own = world.pair.0.as_raw_fd();
        // SAFETY: these commands take numbers.
        unsafe {
            of(libc::fcntl(own, libc::F_SETOWN, world.victim).into())?;
            of(libc::fcntl(own, F_SETSIG, libc::SIGKILL).into())?;
            of(libc::fcntl(own, libc::F_SETFL, libc::O_ASYNC).into())?;
        }
        rustix::io::write(&world.pair.1, b"x").map(drop)
    };
    harmful(
        "kill by a descriptor's signal",
        act,
        victim_is_dead,
        stopped_by,
    )
}

fn victim_is_dead(world: &World, _: i32) -> bool {
    !world.victim_answers()
}

/// Connects to a server on loopback.
pub const fn connect_tcp(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        let own = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        connect(&own, &world.tcp_address)
    };
    attack("connect to a TCP server", act, stopped_by)
}

/// Connects to an abstract socket.
pub const fn connect_abstract(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| connect_unix(&SocketAddrUnix::new_abstract_name(ABSTRACT.as_bytes())?);
    attack("connect to an abstract socket", act, stopped_by)
}

/// Connects to a socket by its path.
pub const fn connect_named(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| connect_unix(&SocketAddrUnix::new(c"/mnt/socket")?);
    attack("connect to a socket by its path", act, stopped_by)
}

fn connect_unix(address: &SocketAddrUnix) -> Result<()> {
    let own: OwnedFd = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    connect(&own, address)
}

/// Makes fifty processes, which stay.
pub const fn fork(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| {
        for _ in 0..50 {
            // SAFETY: the child makes one system call again and again, and nothing else.
            match unsafe { libc::fork() } {
                0 => loop {
                    // SAFETY: pause takes nothing.
                    unsafe { libc::pause() };
                },
                child => of(child.into())?,
            }
        }
        Ok(())
    };
    attack("make fifty processes", act, stopped_by)
}

/// Runs a program: one of the guest's where there is a share, else one of the host's.
pub const fn exec(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        let path = match world.has_share {
            true => c"/rootfs/tool",
            false => c"/mnt/tool",
        };
        let arguments = [path.as_ptr(), std::ptr::null()];
        let environment = [std::ptr::null()];
        // SAFETY: a C string, and two arrays of such that end with a null pointer; all live.
        of(unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) }.into())
    };
    attack("run a program", act, stopped_by)
}

/// Attaches System V shared memory of the host.
pub const fn share_memory(stopped_by: &'static [Wall]) -> Attack {
    // SAFETY: shmget takes numbers.
    let act = |_: &World| of(unsafe { libc::shmget(SHARED_MEMORY, 0, 0o600) }.into());
    attack("find shared memory of System V", act, stopped_by)
}

/// Renames the host.
pub const fn rename_host(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| rustix::system::sethostname(b"taken");
    let harm = |_: &World, _| rustix::system::uname().nodename() == c"taken";
    harmful("rename the host", act, harm, stopped_by)
}

/// Becomes root.
pub const fn become_root(stopped_by: &'static [Wall]) -> Attack {
    // SAFETY: setresuid takes numbers.
    let act = |_: &World| of(unsafe { libc::setresuid(0, 0, 0) }.into());
    attack("become root", act, stopped_by)
}

/// Makes a user namespace, in which it has all capabilities.
pub const fn user_namespace(stopped_by: &'static [Wall]) -> Attack {
    // SAFETY: unshare takes a number, and this flag changes no descriptor and no memory.
    let act = |_: &World| of(unsafe { libc::unshare(libc::CLONE_NEWUSER) }.into());
    attack("make a user namespace", act, stopped_by)
}

/// Makes memory code.
pub const fn make_code(stopped_by: &'static [Wall]) -> Attack {
    attack(
        "make memory code",
        |_| map(4096, libc::PROT_EXEC),
        stopped_by,
    )
}

/// Takes more addresses than the process and its guest need.
pub const fn take_addresses(stopped_by: &'static [Wall]) -> Attack {
    attack(
        "take a terabyte of addresses",
        |_| map(1 << 40, libc::PROT_NONE),
        stopped_by,
    )
}

fn map(bytes: usize, protection: libc::c_int) -> Result<()> {
    let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new anonymous mapping where the kernel likes it, which nobody uses.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, how, -1, 0) };
    of(if address == libc::MAP_FAILED { -1 } else { 0 })
}

/// Opens descriptors until there are more than any limit here allows.
pub const fn take_descriptors(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        for _ in 0..5_000 {
            // SAFETY: dup takes a number; the new descriptor is nobody's.
            of(unsafe { libc::dup(world.held.as_raw_fd()) }.into())?;
        }
        Ok(())
    };
    attack("open 5,000 descriptors", act, stopped_by)
}

/// Writes to a regular file that it holds.
pub const fn write_file(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| rustix::io::write(&world.held, b"x").map(drop);
    attack("fill a file that it holds", act, stopped_by)
}

/// Uses a descriptor that was left open for it by mistake.
pub const fn use_leaked(stopped_by: &'static [Wall]) -> Attack {
    let act = |world: &World| {
        let byte = b"x";
        // SAFETY: one byte is read from a live array. The number is of a file, or of nothing.
        of(
            unsafe { libc::write(world.leaked.as_raw_fd(), byte.as_ptr().cast(), 1) }
                as libc::c_long,
        )
    };
    let harm = |_: &World, _| fs::metadata("/mnt/leaked").is_ok_and(|it| it.st_size() > 0);
    harmful(
        "use a descriptor that it was not given",
        act,
        harm,
        stopped_by,
    )
}

/// Makes a device node for a disk of the host.
pub const fn make_device(stopped_by: &'static [Wall]) -> Attack {
    let act = |_: &World| {
        let mode = Mode::RUSR | Mode::WUSR;
        let make = |path: &CStr| {
            rustix::fs::mknodat(rustix::fs::CWD, path, FileType::BlockDevice, mode, 0x700)
        };
        make(c"/rootfs/disk").or_else(|_| make(c"/mnt/share/rootfs/disk"))
    };
    attack("make a device node", act, stopped_by)
}

/// Nothing is done: the attacker's cgroup namespace is looked at.
pub const fn see_cgroups(stopped_by: &'static [Wall]) -> Attack {
    harmful(
        "see its place among the host's cgroups",
        |_| Ok(()),
        |_, attacker| {
            let link = |of: &str| fs::read_link(format!("/proc/{of}/ns/cgroup")).ok();
            match attacker {
                0 => false,
                attacker => link(&attacker.to_string()) == link("self"),
            }
        },
        stopped_by,
    )
}

/// Nothing is done: the attacker's limit of core dumps is looked at.
pub const fn dump_core(stopped_by: &'static [Wall]) -> Attack {
    harmful(
        "leave its memory in a core dump",
        |_| Ok(()),
        |_, attacker| {
            let limits = fs::read_to_string(format!("/proc/{attacker}/limits"));
            let limits = limits.unwrap_or_default();
            let line = limits
                .lines()
                .find(|line| line.starts_with("Max core file size"));
            line.is_some_and(|line| !line.contains(" 0 "))
        },
        stopped_by,
    )
}

fn of(answer: libc::c_long) -> Result<()> {
    match answer {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        _ => Ok(()),
    }
}
