//! The wire's messages to the pod's terms and back, and its errors to status codes.
//!
//! Called by `service.rs` alone. What a message may hold is in `agent.proto`; whatever it holds
//! that it may not is refused here by the field's name.

use std::time::{SystemTime, UNIX_EPOCH};

use kata_like_agent_protocol::agent::{
    ConnectRequest, CreateContainerRequest, Event as EventMessage, NameQuestion, OutOfMemory,
    ProcessExited, Streams as StreamsMessage, Unwritten as UnwrittenMessage,
};
use kata_like_agent_protocol::{MOST_EVENTS, is_name, status};
use kata_like_failure::Failure;
use kata_like_netlink::address_bytes;

use crate::device;
use crate::disks::Disk;
use crate::events::Event;
use crate::pod::Unwritten;
use crate::process::MAX_SIGNAL;
use crate::spec::Creation;
use crate::stdio::Wanted;
use crate::stdio::port::Token;

mod network;

pub use network::{network, server};

/// A name of a container, an exec or a volume.
pub fn name(field: &str, name: String) -> ttrpc::Result<String> {
    if is_name(&name) {
        return Ok(name);
    }
    Err(status::of(&Failure::bad(
        field,
        format!("not a name: {name:?}"),
    )))
}

/// A container that the host asks for.
pub fn creation(request: CreateContainerRequest) -> ttrpc::Result<Creation> {
    let of = |failure: Failure| status::of(&failure);
    let mut creation = Creation::parse(&request.spec).map_err(of)?;
    creation.join(request.joins).map_err(of)?;
    creation.bind(request.binds).map_err(of)?;
    for disk in request.disks {
        creation.disks.push(Disk {
            slot: slot(disk.slot)?,
            major: disk.major,
            minor: disk.minor,
        });
    }
    if !request.root_volume.is_empty() {
        creation.root_volume = Some(name("root_volume", request.root_volume)?);
    }
    creation.wanted = wanted(request.streams.into_option())?;
    creation.placeholder = request.placeholder;
    Ok(creation)
}

/// N of `virtio-mmio.N`.
pub fn slot(slot: u32) -> ttrpc::Result<u32> {
    if slot <= device::MAX_SLOT {
        return Ok(slot);
    }
    let why = format!("{slot} is not 0 to {}", device::MAX_SLOT);
    Err(status::of(&Failure::bad("slot", why)))
}

/// A signal of the kernel's.
pub fn signal(signal: u32) -> Result<u32, Failure> {
    if (1..=MAX_SIGNAL).contains(&signal) {
        return Ok(signal);
    }
    let why = format!("{signal} is not 1 to {MAX_SIGNAL}");
    Err(Failure::bad("signal", why))
}

/// The streams that the host wants of a process.
pub fn wanted(streams: Option<StreamsMessage>) -> ttrpc::Result<Wanted> {
    let streams = streams.unwrap_or_default();
    let convert = || {
        let StreamsMessage {
            stdin,
            stdout,
            stderr,
            terminal,
            width,
            height,
            ..
        } = &streams;
        if *terminal && !stderr.is_empty() {
            return Err(Failure::bad(
                "streams.stderr",
                "must be empty with a terminal",
            ));
        }
        let [stdin, stdout, stderr] = [stdin, stdout, stderr].map(|bytes| token(bytes));
        Ok(Wanted {
            tokens: [stdin?, stdout?, stderr?],
            terminal: terminal.then(|| size(*width, *height)).transpose()?,
        })
    };
    convert().map_err(|error| status::of(&error))
}

/// A port, and the token of the stream to join it to.
pub fn connection(request: &ConnectRequest) -> Result<(u16, Token), Failure> {
    let port = u16::try_from(request.port)
        .map_err(|_| Failure::bad("port", format!("{} is not 0 to 65535", request.port)))?;
    let token = token(&request.token)?.ok_or_else(|| Failure::bad("token", "is empty"))?;
    Ok((port, token))
}

fn token(bytes: &[u8]) -> Result<Option<Token>, Failure> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let token = Token::try_from(bytes);
    let wrong = |_| Failure::bad("streams", format!("a token of {} bytes", bytes.len()));
    token.map(Some).map_err(wrong)
}

/// A terminal's size.
pub fn size(width: u32, height: u32) -> Result<(u16, u16), Failure> {
    match (u16::try_from(width), u16::try_from(height)) {
        (Ok(width), Ok(height)) => Ok((width, height)),
        _ => Err(Failure::bad(
            "width and height",
            format!("{width} by {height} is too large"),
        )),
    }
}

/// How many events may be in one answer.
pub fn most_events(most: u32) -> ttrpc::Result<usize> {
    match usize::try_from(most) {
        Ok(most @ 1..=MOST_EVENTS) => Ok(most),
        _ => Err(status::of(&Failure::bad("most", format!("{most} events")))),
    }
}

/// An event as the host is told of it.
pub fn event_message(event: Event) -> EventMessage {
    let mut message = EventMessage::new();
    match event {
        Event::Exited {
            container,
            exec,
            status,
            at,
            carried: [stdout_bytes, stderr_bytes],
        } => {
            message.set_process_exited(ProcessExited {
                container,
                exec,
                status,
                exited_at_ns: nanoseconds(at),
                stdout_bytes,
                stderr_bytes,
                ..Default::default()
            });
        }
        Event::OutOfMemory { container } => {
            message.set_out_of_memory(OutOfMemory {
                container,
                ..Default::default()
            });
        }
        Event::NameQuestion {
            token,
            address,
            tcp,
        } => {
            message.set_name_question(NameQuestion {
                token: token.into(),
                address: address_bytes(address),
                tcp,
                ..Default::default()
            });
        }
    }
    message
}

/// A time as the wire has it: nanoseconds since 1970, until 2262.
fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// What the host does not have yet.
pub fn unwritten_message(left: &Unwritten) -> UnwrittenMessage {
    UnwrittenMessage {
        dirty_bytes: left.dirty_bytes,
        containers: u32::try_from(left.containers).unwrap_or(u32::MAX),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ttrpc::Code;

    fn code(error: ttrpc::Error) -> Code {
        match error {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("no status: {other}"),
        }
    }

    #[test]
    fn a_token_is_sixteen_bytes_or_none() {
        assert_eq!(token(b"").unwrap(), None);
        assert_eq!(token(&[7; 16]).unwrap(), Some([7; 16]));
        for length in [1, 15, 17, 4096] {
            assert!(token(&vec![0; length]).is_err(), "{length}");
        }
    }

    #[test]
    fn streams_that_contradict_themselves_are_refused() {
        let streams = |change: fn(&mut StreamsMessage)| {
            let mut streams = StreamsMessage::new();
            change(&mut streams);
            wanted(Some(streams))
        };
        assert_eq!(wanted(None).unwrap(), Wanted::default());
        let good = streams(|it| (it.terminal, it.width, it.height) = (true, 80, 24));
        assert_eq!(good.unwrap().terminal, Some((80, 24)));
        let stderr = streams(|it| (it.terminal, it.stderr) = (true, vec![1; 16]));
        assert_eq!(code(stderr.unwrap_err()), Code::INVALID_ARGUMENT);
        let wide = streams(|it| (it.terminal, it.width) = (true, 65536));
        assert_eq!(code(wide.unwrap_err()), Code::INVALID_ARGUMENT);
    }

    #[test]
    fn a_name_that_could_be_a_path_is_refused() {
        for bad in ["", "..", "a/b", ".hidden"] {
            assert_eq!(
                code(name("container", bad.into()).unwrap_err()),
                Code::INVALID_ARGUMENT
            );
        }
    }

    #[test]
    fn what_a_container_needs_is_checked_by_name() {
        use kata_like_agent_protocol::agent::Disk as DiskMessage;

        let spec =
            br#"{"ociVersion": "1.2.0", "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}}}"#;
        let with_slot = |slot| {
            let disk = DiskMessage {
                slot,
                major: 8,
                ..Default::default()
            };
            creation(CreateContainerRequest {
                spec: spec.to_vec(),
                disks: vec![disk],
                ..Default::default()
            })
        };
        let good = with_slot(12).unwrap();
        assert_eq!((good.disks[0].slot, good.disks[0].major), (12, 8));
        let bad = with_slot(64).err().unwrap();
        assert_eq!(code(bad), Code::INVALID_ARGUMENT);
        let with_root = |name: &str| {
            let root_volume = name.to_owned();
            let request = CreateContainerRequest {
                spec: spec.to_vec(),
                root_volume,
                ..Default::default()
            };
            creation(request).map(|creation| creation.root_volume)
        };
        assert_eq!(with_root("").unwrap(), None);
        assert_eq!(with_root("volume-1").unwrap().as_deref(), Some("volume-1"));
        assert!(with_root("../rootfs").is_err());
        for bad in [0, MAX_SIGNAL + 1, u32::MAX] {
            assert!(signal(bad).is_err(), "{bad}");
        }
        assert_eq!(signal(MAX_SIGNAL).unwrap(), MAX_SIGNAL);
    }
}
