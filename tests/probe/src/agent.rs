//! A hostile agent: PID 1 of a guest that answers the shim in ways no honest one does.
//!
//! `tests/tests/hostile_agent.rs` builds an initrd in which this program is `/init` and the file
//! `/case` says what it does. Up to the start of a container it answers as the agent would that has
//! nothing to do. It knows of ttrpc and protobuf only what it needs for that.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

/// The host's vsock port for the agent's dial, and the guest's for streams
/// (`agent/protocol/src/lib.rs`).
const AGENT_PORT: u32 = 1024;
const STREAM_PORT: u32 = 1025;

/// Types of ttrpc's frames.
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// ttrpc's code NOT_FOUND.
const NOT_FOUND: u64 = 5;

/// Serves the shim as the case says. Ends with the connection, and the machine with it.
pub fn serve() {
    let case = fs::read_to_string("/case").unwrap_or_default();
    if let Err(error) = play(case.trim()) {
        eprintln!("{error}");
    }
    // SAFETY: no memory is handed over; the machine is the test's own, and ends here.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_RESTART) };
}

fn play(case: &str) -> io::Result<()> {
    // The kernel takes what the shim dials; nobody accepts it here.
    let streams = socket()?;
    call(|| {
        address(libc::VMADDR_CID_ANY, STREAM_PORT, |at, length| {
            // SAFETY: `at` is an address of `length` bytes that outlives the call.
            unsafe { libc::bind(streams.as_raw_fd(), at, length) }
        })
    })?;
    // SAFETY: no memory is handed over.
    call(|| unsafe { libc::listen(streams.as_raw_fd(), 64) })?;
    let dialled = socket()?;
    call(|| {
        address(libc::VMADDR_CID_HOST, AGENT_PORT, |at, length| {
            // SAFETY: `at` is an address of `length` bytes that outlives the call.
            unsafe { libc::connect(dialled.as_raw_fd(), at, length) }
        })
    })?;
    let mut shim = Shim(File::from(dialled));
    let (mut started, mut events) = (false, None);
    loop {
        let (id, method) = shim.request()?;
        match method.as_str() {
            "NextEvents" => events = Some(id),
            "StartContainer" => {
                shim.answer(id, &[])?;
                started = true;
            }
            "GetUnwritten" => shim.answer(id, &number(1, 4096))?,
            "Shutdown" => shim.answer(id, &bytes(2, &number(1, 4096)))?,
            "Signal" if case == "denies" => shim.refuse(id, NOT_FOUND, "no such process")?,
            "Stats" if case == "texts" => {
                let text = "\u{202e}\u{7}\u{1b}[2J\n".repeat(6000);
                shim.refuse(id, 2, &text)?;
            }
            _ => shim.answer(id, &[])?,
        }
        if let (true, Some(held)) = (started, events) {
            shim.misbehave(case, held, &mut events)?;
        }
    }
}

/// The connection to the shim.
struct Shim(File);

impl Shim {
    /// The next request: its id and its method.
    fn request(&mut self) -> io::Result<(u32, String)> {
        let mut header = [0; 10];
        self.0.read_exact(&mut header)?;
        let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        let mut payload = vec![0; word(0) as usize];
        self.0.read_exact(&mut payload)?;
        Ok((word(4), method(&payload).unwrap_or_default()))
    }

    fn frame(&mut self, type_: u8, id: u32, payload: &[u8]) -> io::Result<()> {
        self.0.write_all(&frame(type_, id, payload))
    }

    fn answer(&mut self, id: u32, payload: &[u8]) -> io::Result<()> {
        self.frame(RESPONSE, id, &bytes(2, payload))
    }

    fn refuse(&mut self, id: u32, code: u64, why: &str) -> io::Result<()> {
        let status = [number(1, code), bytes(2, why.as_bytes())].concat();
        self.frame(RESPONSE, id, &bytes(1, &status))
    }

    /// What the case does once a container runs and the shim waits for events under this id.
    fn misbehave(&mut self, case: &str, id: u32, events: &mut Option<u32>) -> io::Result<()> {
        match case.split_once('-').unwrap_or((case, "")) {
            ("data", size) => self.flood(DATA, id, size),
            ("second", size) => {
                self.answer(id, &[])?;
                self.flood(RESPONSE, id, size)
            }
            ("ids", size) => self.flood(RESPONSE, id + 2000, size),
            ("silent", _) => loop {
                thread::sleep(Duration::from_secs(3600));
            },
            ("drip", _) => {
                // An answer without an end.
                for byte in frame(RESPONSE, id, &[0; 60_000]) {
                    self.0.write_all(&[byte])?;
                    thread::sleep(Duration::from_millis(100));
                }
                Ok(())
            }
            ("strangers", _) => {
                *events = None;
                self.answer(id, &strangers("stranger"))
            }
            ("nonsense", _) => {
                *events = None;
                self.answer(id, &strangers("../../stranger"))
            }
            _ => Ok(()),
        }
    }

    /// Frames without an end, or until the shim has hung up.
    fn flood(&mut self, type_: u8, id: u32, size: &str) -> io::Result<()> {
        let size = size.parse().unwrap_or(300);
        let frame = frame(type_, id, &vec![0xff; size]);
        loop {
            self.0.write_all(&frame)?;
        }
    }
}

/// Exits of processes that nobody has started.
fn strangers(name: &str) -> Vec<u8> {
    let exit = [
        bytes(1, name.as_bytes()),
        number(3, 137),
        number(5, u64::MAX),
        number(6, u64::MAX),
    ];
    bytes(1, &bytes(1, &exit.concat())).repeat(64)
}

fn frame(type_: u8, id: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut frame = [length.to_be_bytes(), id.to_be_bytes()].concat();
    frame.extend([type_, 0]);
    frame.extend(payload);
    frame
}

/// A field of protobuf's that has bytes.
fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    let mut all = varint(field << 3 | 2);
    all.extend(varint(content.len() as u64));
    all.extend(content);
    all
}

/// A field of protobuf's that is a number.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut all = Vec::new();
    while value > 0x7f {
        all.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    all.push(value as u8);
    all
}

/// The method that a request names: field 2, behind the service's name.
fn method(mut request: &[u8]) -> Option<String> {
    loop {
        let (&[key, length], rest) = request.split_first_chunk::<2>()?;
        let (content, rest) = rest.split_at_checked(length.into())?;
        if key == 2 << 3 | 2 {
            return String::from_utf8(content.to_vec()).ok();
        }
        request = rest;
    }
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is handed over.
    let fd = call(|| unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: the kernel has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32, with: impl Fn(*const libc::sockaddr, u32) -> i32) -> i32 {
    // SAFETY: an address of zeros is one.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    (address.svm_cid, address.svm_port) = (cid, port);
    with(
        (&raw const address).cast(),
        size_of::<libc::sockaddr_vm>() as u32,
    )
}

fn call(it: impl Fn() -> i32) -> io::Result<i32> {
    match it() {
        -1 => Err(io::Error::last_os_error()),
        done => Ok(done),
    }
}
