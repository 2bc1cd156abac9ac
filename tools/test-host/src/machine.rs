//! The emulated host: QEMU without hardware help, an AMD CPU with SVM and nested paging.
//!
//! `main` calls `run`. The host boots on this machine's root file system, read-only over 9p below a
//! tmpfs, so it has every program and library of this machine. Directories given with `--share` are
//! written through. Streams and answers come over UNIX sockets in a run directory of its own, so
//! any number of hosts run at once. `inside` is the other end.
//!
//! QEMU dies with this process: it is killed on every way out, and it asks the kernel for SIGKILL
//! in case this process is killed.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_limits::Patience;
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::arguments::Args;
use crate::counter;
use crate::emulator;
use crate::error::HostError;
use crate::prepare::Prepared;
use crate::terminal;

/// On an idle machine the host is up in 4 to 8 s; builds may run beside it.
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

/// How long a host that is up may be silent: it reports every few seconds that it is alive. An
/// emulated CPU was seen to halt for good without a word.
const SILENCE: Duration = Duration::from_secs(120);

/// The host kernel's options. `oops=panic panic=-1` ends QEMU at once when the kernel is broken, so
/// nobody waits for a host that can't go on.
///
/// Without `no_timer_check` the kernel waits for its timer for a moment that QEMU does not get on
/// a busy machine, and panics.
const KERNEL_ARGUMENTS: &str = "console=ttyS0 loglevel=5 oops=panic panic=-1 mitigations=off \
    nokaslr tsc=reliable no_timer_check rdinit=/init transparent_hugepage=madvise init_on_alloc=0";

/// Everything that the emulator can do, except what makes it slower. Without these five flags
/// kernels and the C library copy eight bytes at a time; with them they use string instructions,
/// which the emulator runs byte by byte. A fifth level makes each walk of the page tables longer,
/// also those for the guests' memory.
const CPU: &str = "max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off";

/// Chooses SELinux: a kernel has either it or AppArmor, which Debian's kernels prefer.
const SELINUX: &str = "security=selinux";

/// How long the reader of our output may take for the rest of it.
const DRAIN: Duration = Duration::from_secs(10);

/// How many lines of the kernel log an error shows.
const CONSOLE_TAIL: usize = 60;

enum Event {
    Up,
    Alive,
    Failed(String),
    Exit(u8),
    /// The control port was closed: QEMU has ended.
    Gone,
    /// One of the two output streams has ended.
    Drained,
}

/// A child that does not outlive this value.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots a host, runs the command in it, returns its exit code.
pub fn run(args: &Args, prepared: &Prepared) -> Result<u8, HostError> {
    let started = Instant::now();
    let run = tempfile::Builder::new()
        .prefix("test-host.")
        .tempdir()
        .map_err(HostError::system("make a run directory"))?;
    let result = boot(args, prepared, run.path(), started);
    if let Some(keep) = &args.console {
        fs::copy(run.path().join("console"), keep)
            .map_err(HostError::file("keep the log in", keep))?;
    }
    result
}

fn boot(args: &Args, prepared: &Prepared, run: &Path, started: Instant) -> Result<u8, HostError> {
    request(args, prepared, run)?;
    let (sender, events) = mpsc::channel();
    let (up, wait_for_up) = mpsc::channel();
    listen(run, "control", &sender, move |stream, events| {
        answers(stream, events, &up);
    })?;
    listen(run, "stdout", &sender, |stream, events| {
        pass_on(stream, io::stdout(), events)
    })?;
    listen(run, "stderr", &sender, |stream, events| {
        pass_on(stream, io::stderr(), events)
    })?;
    let mut terminal = None;
    if args.interactive {
        listen(run, "stdin", &sender, move |mut stream, _events| {
            // QEMU drops what comes before the host has opened its end, and what it has not read
            // when ours is closed. So this waits, and shuts only one direction down. Nobody waits
            // for this thread: a read may take forever.
            if wait_for_up.recv().is_ok() {
                let _ = io::copy(&mut io::stdin(), &mut stream);
                let _ = stream.shutdown(Shutdown::Write);
                thread::park();
            }
        })?;
        terminal = terminal::Raw::enter()?;
    }
    let mut qemu = start(args, prepared, run)?;
    let result = follow(args, &events, run, started, &mut qemu);
    drop(terminal);
    // QEMU's end closes the streams; what they still hold is passed on first. The console's last
    // lines are also there only now.
    drop(qemu);
    let mut streams = 2;
    while streams > 0 {
        match events.recv_timeout(DRAIN) {
            Ok(Event::Drained) => streams -= 1,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    match result {
        Err(HostError::Died { status, .. }) => Err(HostError::Died {
            status,
            console: tail(run),
        }),
        other => other,
    }
}

fn follow(
    args: &Args,
    events: &Receiver<Event>,
    run: &Path,
    started: Instant,
    qemu: &mut Qemu,
) -> Result<u8, HostError> {
    let all = Patience::new(args.deadline);
    let boot = Patience::new(BOOT_DEADLINE);
    // Since the last sign of life, once the host is up.
    let mut silence = None;
    loop {
        let left = silence.unwrap_or(boot).left().min(all.left());
        match events.recv_timeout(left) {
            Ok(Event::Alive) => silence = Some(Patience::new(SILENCE)),
            Ok(Event::Up) => {
                silence = Some(Patience::new(SILENCE));
                eprintln!(
                    "test-host: up after {:.1} s",
                    started.elapsed().as_secs_f32()
                );
            }
            Ok(Event::Failed(why)) => {
                return Err(HostError::Missing {
                    step: "set the test host up",
                    why,
                });
            }
            Ok(Event::Exit(code)) => return Ok(code),
            Ok(Event::Drained) => {}
            Ok(Event::Gone) | Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = match qemu.0.wait() {
                    Ok(status) => format!("QEMU: {status}"),
                    Err(error) => format!("QEMU: {error}"),
                };
                return Err(HostError::Died {
                    status,
                    console: String::new(),
                });
            }
            Err(mpsc::RecvTimeoutError::Timeout) if all.is_over() => {
                return Err(HostError::Deadline {
                    deadline: args.deadline,
                });
            }
            Err(mpsc::RecvTimeoutError::Timeout) => match silence {
                Some(silence) if silence.is_over() => {
                    return Err(HostError::Died {
                        status: format!("it has said nothing for {SILENCE:?}"),
                        console: String::new(),
                    });
                }
                None if boot.is_over() => {
                    return Err(HostError::NotUp {
                        deadline: BOOT_DEADLINE,
                        console: tail(run),
                    });
                }
                // The machine has turned out to be slower than was known.
                _ => {}
            },
        }
    }
}

/// Writes the request that `inside` reads.
fn request(args: &Args, prepared: &Prepared, run: &Path) -> Result<(), HostError> {
    let program = std::env::current_exe().map_err(HostError::system("find this program"))?;
    let copy = run.join("test-host");
    fs::copy(&program, &copy).map_err(HostError::file("copy", &program))?;
    let directory =
        std::env::current_dir().map_err(HostError::system("find the working directory"))?;
    let mut shares = Vec::new();
    for share in &args.share {
        shares.push(
            share
                .canonicalize()
                .map_err(HostError::file("share", share))?
                .into_os_string(),
        );
    }
    let env = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let argv = match args.interactive {
        true => terminal::wrapped(&args.command),
        false => args.command.clone(),
    };
    if args.interactive {
        let path = run.join("interactive");
        fs::write(&path, "").map_err(HostError::file("write", path))?;
    }
    let files: [(&str, Vec<u8>); 5] = [
        ("argv", terminated(argv.into_iter())),
        ("env", terminated(env)),
        ("shares", terminated(shares.into_iter())),
        ("cwd", directory.as_os_str().as_bytes().to_vec()),
        ("tools", prepared.root.as_os_str().as_bytes().to_vec()),
    ];
    for (name, content) in files {
        let path = run.join(name);
        fs::write(&path, content).map_err(HostError::file("write", path))?;
    }
    Ok(())
}

fn terminated(entries: impl Iterator<Item = OsString>) -> Vec<u8> {
    entries
        .flat_map(|entry| [entry.as_bytes(), &[0]].concat())
        .collect()
}

/// Accepts one connection on a socket of the run directory, in a thread.
fn listen(
    run: &Path,
    name: &str,
    events: &Sender<Event>,
    serve: impl FnOnce(std::os::unix::net::UnixStream, Sender<Event>) + Send + 'static,
) -> Result<(), HostError> {
    let path = run.join(name);
    let listener = UnixListener::bind(&path).map_err(HostError::file("listen on", path))?;
    let events = events.clone();
    thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            serve(stream, events);
        }
    });
    Ok(())
}

fn answers(stream: std::os::unix::net::UnixStream, events: Sender<Event>, up: &Sender<()>) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let event = match line.split_once(' ') {
            Some(("exit", code)) => Event::Exit(code.parse().unwrap_or(u8::MAX)),
            Some(("failed", why)) => Event::Failed(why.to_owned()),
            _ if line == "alive" => Event::Alive,
            _ => {
                let _ = up.send(()); // Without an input, nobody waits for it.
                Event::Up
            }
        };
        if events.send(event).is_err() {
            return;
        }
    }
    let _ = events.send(Event::Gone);
}

fn pass_on(mut from: impl Read, mut to: impl Write, events: Sender<Event>) {
    let mut buffer = [0; 16384];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to
            .write_all(&buffer[..count])
            .and_then(|()| to.flush())
            .is_err()
        {
            break;
        }
    }
    let _ = events.send(Event::Drained);
}

fn start(args: &Args, prepared: &Prepared, run: &Path) -> Result<Qemu, HostError> {
    let mut command = emulator::qemu(&prepared.root);
    let console = run.join("console");
    command
        .args([
            "-machine",
            "pc,usb=off",
            "-accel",
            // One thread for all CPUs was tried: guests broke more often, not less.
            "tcg,thread=multi,tb-size=512",
            "-cpu",
            CPU,
        ])
        .arg("-smp")
        .arg(args.cpus.to_string())
        .arg("-m")
        .arg(args.memory.to_string())
        .arg("-kernel")
        .arg(prepared.path("vmlinuz"))
        .arg("-initrd")
        .arg(prepared.path("initrd.img"))
        .arg("-append")
        .arg(format!(
            "{KERNEL_ARGUMENTS} tsc_early_khz={} {} host.program={} host.run={}",
            counter::khz(),
            if args.selinux { SELINUX } else { "" },
            run.join("test-host").display(),
            run.display()
        ))
        .arg("-chardev")
        .arg(format!("file,id=console,path={}", console.display()))
        .args(["-serial", "chardev:console", "-device", "virtio-rng-pci"])
        .args(["-device", "virtio-serial-pci"]);
    let interactive = args.interactive.then_some("stdin");
    for name in ["control", "stdout", "stderr"]
        .into_iter()
        .chain(interactive)
    {
        command
            .arg("-chardev")
            .arg(format!(
                "socket,id={name},path={}",
                run.join(name).display()
            ))
            .arg("-device")
            .arg(format!("virtserialport,chardev={name},name={name}"));
    }
    nine_p(&mut command, "root", "/".into(), "readonly=on");
    for (index, share) in args.share.iter().enumerate() {
        let path = share
            .canonicalize()
            .map_err(HostError::file("share", share))?;
        nine_p(
            &mut command,
            &format!("share{index}"),
            path.into(),
            "readonly=off",
        );
    }
    let parent = rustix::process::getpid();
    // SAFETY: between fork and exec only two system calls are made: no allocation, no lock.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(io::ErrorKind::BrokenPipe.into()); // the parent died in between
            }
            Ok(())
        });
    }
    let child = command
        .stdin(Stdio::null())
        .spawn()
        .map_err(|source| HostError::Spawn {
            step: "emulate a host".into(),
            program: "qemu-system-x86_64".into(),
            source,
        })?;
    Ok(Qemu(child))
}

fn nine_p(command: &mut Command, tag: &str, path: OsString, access: &str) {
    let mut device = OsString::from(format!(
        "local,id={tag},security_model=none,multidevs=remap,{access},path="
    ));
    device.push(path);
    command
        .arg("-fsdev")
        .arg(device)
        .arg("-device")
        .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
}

fn tail(run: &Path) -> String {
    let log = fs::read(run.join("console")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(CONSOLE_TAIL)..].join("\n")
}
