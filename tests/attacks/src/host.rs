//! The little host: namespaces of its own, a victim, sockets, files, shared memory.
//!
//! `run` forks it. It makes what an attacker looks for, gives birth to the attacker as the shim
//! does to its children, hears what came of the attack, and looks whether it has suffered. When its
//! process 1 ends, so does all that is in it.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use kata_like_boot::BORN_IN;
use kata_like_jail::layers::{Layer, leave_out};
use kata_like_linux::namespace::unshare;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, getrlimit, pidfd_open, setrlimit};
use rustix::thread::UnshareFlags;

use crate::{Attack, Outcome, Subject, Wall};

/// Where the little host has its files; the share is `share` in it.
pub const PLACE: &str = "/mnt";

/// The key of its System V shared memory.
pub const SHARED_MEMORY: i32 = 0x6b61_7461;

/// The name of its abstract socket.
pub const ABSTRACT: &str = "kata-like-attacks";

/// How long an attack may take.
const PATIENCE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

/// What there is to be attacked.
pub struct World {
    /// Where the share and its files lie for the attacker: below its root, or not.
    pub has_share: bool,
    /// A process of the host, by its number.
    pub victim: i32,
    /// To the victim, which sends back what it gets.
    line: UnixStream,
    /// Listens on loopback.
    pub tcp: TcpListener,
    /// Where that is.
    pub tcp_address: std::net::SocketAddr,
    /// Listens at `socket` of [`PLACE`].
    pub named: UnixListener,
    /// Listens at the name [`ABSTRACT`].
    pub abstract_socket: UnixListener,
    /// A regular file that the attacker may hold.
    pub held: File,
    /// A file that it was not to inherit.
    pub leaked: File,
    /// Connected to each other; the attacker's.
    pub pair: (UnixStream, UnixStream),
    /// Where the attacker tells what came of it, and where it then waits.
    tell: OwnedFd,
    go: OwnedFd,
}

impl World {
    /// What the attacker holds: its jail closes all others.
    pub fn keep(&self) -> Vec<RawFd> {
        let kept = [
            self.held.as_fd(),
            self.pair.0.as_fd(),
            self.pair.1.as_fd(),
            self.tell.as_fd(),
            self.go.as_fd(),
        ];
        kept.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

impl World {
    /// Whether the victim lives. One that has been sent SIGKILL answers no more.
    pub fn victim_answers(&self) -> bool {
        let _ = rustix::io::write(&self.line, b"?");
        read_from(&self.line, self.victim, 1).is_some()
    }
}

/// See [`crate::attempt`].
pub(crate) fn run(subject: &Subject, attack: &Attack, without: &[Wall]) -> Outcome {
    let all = BORN_IN | UnshareFlags::NEWNET | UnshareFlags::NEWNS;
    let status = in_child(|| match unshare(all) {
        Ok(()) => in_child(|| as_process_1(subject, attack, without)),
        Err(error) => failed("make the little host", &error),
    });
    match status {
        REACHED => Outcome::Reached,
        KILLED => Outcome::Killed,
        NO_EFFECT => Outcome::NoEffect,
        refused @ 1..REACHED => Outcome::Refused(Errno::from_raw_os_error(refused)),
        _ => Outcome::Failed,
    }
}

// Statuses above the errors of the kernel.
const REACHED: i32 = 200;
/// A filter has ended the child.
pub const KILLED: i32 = 201;
const NO_EFFECT: i32 = 202;
const FAILED: i32 = 250;

fn failed(step: &str, why: &dyn std::fmt::Display) -> i32 {
    // Not by the macro: the harness of the tests would keep it, and this process has none.
    let _ = writeln!(io::stderr(), "{step}: {why}");
    FAILED
}

/// Runs `act` in a child. Returns its exit status, or [`KILLED`] if a filter ended it.
pub fn in_child(act: impl FnOnce() -> i32) -> i32 {
    let child = fork(act);
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `child` is our child.
    unsafe { libc::waitpid(child, &mut status, 0) };
    match libc::WIFSIGNALED(status) {
        true if libc::WTERMSIG(status) == libc::SIGSYS => KILLED,
        true => failed("end of a process", &libc::WTERMSIG(status)),
        false => libc::WEXITSTATUS(status),
    }
}

fn fork(act: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child only runs `act`, which makes system calls and allocates; glibc keeps the
    // allocator's locks sound after fork. It leaves by _exit, so no test machinery runs twice.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = act();
        // SAFETY: _exit ends the child and takes a plain number.
        unsafe { libc::_exit(status) };
    }
    pid
}

/// The little host's process 1. Returns the attack's end as a status.
fn as_process_1(subject: &Subject, attack: &Attack, without: &[Wall]) -> i32 {
    let made = make(subject.has_share);
    let (world, answer, leave) = match made {
        Ok(made) => made,
        Err(error) => return failed("furnish the little host", &error),
    };
    let mut born_in = BORN_IN | UnshareFlags::NEWNET;
    let mut layers = Vec::new();
    for wall in without {
        match wall {
            Wall::Namespace(kind) => born_in.remove(*kind),
            // Without a mount namespace of its own it would take the host's root away.
            Wall::Layer(Layer::Mounts) => layers.extend([Layer::Mounts, Layer::Root]),
            Wall::Layer(layer) => layers.push(*layer),
            Wall::Seccomp => layers.extend(subject.filters.iter().map(|name| Layer::Filter(name))),
        }
    }
    let (number, numbered) = match pipe_with(PipeFlags::CLOEXEC) {
        Ok(pipe) => pipe,
        Err(errno) => return failed("make a pipe", &errno),
    };
    // As the shim gives birth: process 1 of its own namespace is who is made in it.
    let midwife = fork(|| {
        if let Err(error) = unshare(born_in) {
            return failed("make the attacker's namespaces", &error);
        }
        let attacker = fork(|| as_the_attacker(subject, attack, &world, &layers));
        let _ = rustix::io::write(&numbered, &attacker.to_ne_bytes());
        let mut status = 0;
        // SAFETY: `status` is a live int that waitpid writes; `attacker` is our child.
        unsafe { libc::waitpid(attacker, &mut status, 0) };
        match libc::WIFSIGNALED(status) {
            true if libc::WTERMSIG(status) == libc::SIGSYS => KILLED,
            true => failed("end of the attacker", &libc::WTERMSIG(status)),
            false => libc::WEXITSTATUS(status),
        }
    });
    drop(numbered);
    let mut attacker = [0; 4];
    let _ = rustix::io::read(&number, &mut attacker);
    let told = read_answer(&answer, midwife);
    let harm = attack
        .harm
        .map(|harm| harm(&world, i32::from_ne_bytes(attacker)));
    let _ = rustix::io::write(&leave, b".");
    let mut status = 0;
    // SAFETY: `status` is a live int that waitpid writes; `midwife` is our child.
    unsafe { libc::waitpid(midwife, &mut status, 0) };
    match (told, harm, libc::WEXITSTATUS(status)) {
        (_, _, FAILED) => FAILED,
        (_, Some(true), _) => REACHED,
        (Some(0), None, _) => REACHED,
        // It has become another program, which has ended.
        (None, None, 0) => REACHED,
        (None, _, KILLED) => KILLED,
        (Some(0), Some(false), _) => NO_EFFECT,
        (Some(errno), ..) => errno,
        (None, ..) => failed("hear of the attack", &"no word"),
    }
}

/// The attacker's errno, or 0. None: it ended without a word, or says nothing for too long.
fn read_answer(answer: &OwnedFd, midwife: libc::pid_t) -> Option<i32> {
    let said = read_from(answer, midwife, 4)?;
    said.try_into().ok().map(i32::from_ne_bytes)
}

/// What a process sends, `length` bytes at once. None: it has ended, or says nothing for too long.
fn read_from(from: impl AsFd, process: libc::pid_t, length: usize) -> Option<Vec<u8>> {
    let ended = pidfd_open(Pid::from_raw(process)?, PidfdFlags::empty()).ok()?;
    let both = PollFlags::IN;
    let _ = poll(
        &mut [PollFd::new(&from, both), PollFd::new(&ended, both)],
        Some(&PATIENCE),
    );
    let now = Timespec::default();
    let said = poll(&mut [PollFd::new(&from, both)], Some(&now)).unwrap_or(0) > 0;
    let mut bytes = vec![0; length];
    (said && rustix::io::read(&from, &mut bytes) == Ok(length)).then_some(bytes)
}

fn as_the_attacker(subject: &Subject, attack: &Attack, world: &World, layers: &[Layer]) -> i32 {
    leave_out(layers);
    if let Err(why) = (subject.jail)(world) {
        return failed("close the jail", &why);
    }
    let told = (attack.act)(world).map_or_else(|errno| errno.raw_os_error(), |()| 0);
    let _ = rustix::io::write(&world.tell, &told.to_ne_bytes());
    let _ = rustix::io::read(&world.go, &mut [0u8; 1]);
    0
}

/// What `make` returns: the world, where the attacker's answer comes, and what lets it go.
type Made = (World, OwnedFd, OwnedFd);

fn make(has_share: bool) -> Result<Made, Box<dyn std::error::Error>> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None)?;
    mount("tmpfs", PLACE, "tmpfs", MountFlags::empty(), None)?;
    // As far as they go, so that a limit of the jail is a lower one.
    for what in [
        Resource::Core,
        Resource::Nproc,
        Resource::As,
        Resource::Fsize,
        Resource::Nofile,
    ] {
        let Rlimit { maximum, .. } = getrlimit(what);
        let current = maximum;
        setrlimit(what, Rlimit { current, maximum })?;
    }
    let place = |name: &str| format!("{PLACE}/{name}");
    fs::create_dir_all(place("share/rootfs"))?;
    fs::create_dir_all(place("share/volumes"))?;
    // A mount of its own, as in the shim's share, whose top is read-only.
    mount(
        "tmpfs",
        place("share/rootfs"),
        "tmpfs",
        MountFlags::empty(),
        None,
    )?;
    fs::write(place("secret"), "secret")?;
    for tool in ["tool", "share/rootfs/tool"] {
        fs::write(place(tool), tool_that_ends())?;
        fs::set_permissions(place(tool), Permissions::from_mode(0o755))?;
    }
    let open = |name: &str| File::options().create(true).append(true).open(place(name));
    loopback_up()?;
    let named = UnixListener::bind(place("socket"))?;
    fs::set_permissions(place("socket"), Permissions::from_mode(0o777))?;
    // SAFETY: shmget takes numbers.
    if unsafe { libc::shmget(SHARED_MEMORY, 4096, libc::IPC_CREAT | 0o600) } < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let (answer, tell) = pipe_with(PipeFlags::CLOEXEC)?;
    let (go, leave) = pipe_with(PipeFlags::CLOEXEC)?;
    let (line, theirs) = UnixStream::pair()?;
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let world = World {
        has_share,
        victim: fork(|| {
            let mut byte = [0];
            while rustix::io::read(&theirs, &mut byte) == Ok(1) {
                let _ = rustix::io::write(&theirs, &byte);
            }
            0
        }),
        line,
        tcp_address: tcp.local_addr()?,
        tcp,
        named,
        abstract_socket: UnixListener::bind_addr(&SocketAddr::from_abstract_name(ABSTRACT)?)?,
        held: open("held")?,
        leaked: open("leaked")?,
        pair: UnixStream::pair()?,
        tell,
        go,
    };
    Ok((world, answer, leave))
}

/// A program that needs no other file (elf(5)): it ends with status 0.
fn tool_that_ends() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // mov eax, 60; xor edi, edi; syscall: exit(0)
    let code = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    let whole = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let half = |file: &mut Vec<u8>, number: u16| file.extend(number.to_le_bytes());
    let word = |file: &mut Vec<u8>, number: u32| file.extend(number.to_le_bytes());
    let long = |file: &mut Vec<u8>, number: u64| file.extend(number.to_le_bytes());
    half(&mut file, 2); // executable
    half(&mut file, 62); // x86-64
    word(&mut file, 1);
    long(&mut file, BASE + HEADERS); // entry
    long(&mut file, 64); // program headers
    long(&mut file, 0); // no sections
    word(&mut file, 0);
    for number in [64, 56, 1, 64, 0, 0] {
        half(&mut file, number);
    }
    word(&mut file, 1); // to be loaded
    word(&mut file, 5); // read and executed
    for number in [0, BASE, BASE, whole, whole, 4096] {
        long(&mut file, number);
    }
    file.extend(code);
    file
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: all zeros are a valid ifreq: numbers, bytes and an address.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = CString::from(c"lo");
    for (to, from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which is live.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
