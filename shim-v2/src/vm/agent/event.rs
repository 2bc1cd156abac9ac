//! The guest's events, checked: names, ranges, times. Its other texts are cleaned.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_like_agent_protocol::{TOKEN_LENGTH, agent, is_name};

/// The latest time that is taken for one: 2^62 ns, in the year 2116.
const MAX_TIME: i64 = 1 << 62;
/// The longest text of the guest's in an error, in characters.
const MAX_TEXT: usize = 2000;

/// What the guest says by itself, or happens to it, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A process has exited. The guest may say so of any process, and more than once.
    Exited {
        container: String,
        /// The exec; empty: the container's init.
        exec: String,
        /// 0 to 255, or 128 + signal.
        status: u32,
        /// When, by the guest's clock.
        at: SystemTime,
        /// How much standard output must have been read before the exit is told.
        stdout_bytes: u64,
        /// How much standard error must have been read before the exit is told.
        stderr_bytes: u64,
    },
    /// The OOM killer has killed processes of a container.
    OutOfMemory { container: String },
    /// A container asks a name server on the pod's loopback.
    NameQuestion(NameQuestion),
    /// The VM, its file server or its agent has ended, and every process with it. The last event.
    Ended {
        /// One line: what ended, and why.
        reason: String,
    },
}

/// A question of the guest's for a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameQuestion {
    /// The token of the stream that it is asked in.
    pub token: [u8; TOKEN_LENGTH],
    /// Whom it is for.
    pub address: IpAddr,
    /// Whether it came by TCP.
    pub tcp: bool,
}

/// A text of the guest's.
pub(super) fn clean(text: &str) -> String {
    kata_like_failure::clean(text, MAX_TEXT)
}

/// An event that can be.
pub(super) fn checked(event: agent::Event) -> Option<Event> {
    match event.event? {
        agent::event::Event::ProcessExited(exit) => {
            let named = is_name(&exit.container) && (exit.exec.is_empty() || is_name(&exit.exec));
            if !named || exit.status > 255 {
                return None;
            }
            Some(Event::Exited {
                container: exit.container,
                exec: exit.exec,
                status: exit.status,
                at: time_of(exit.exited_at_ns),
                stdout_bytes: exit.stdout_bytes,
                stderr_bytes: exit.stderr_bytes,
            })
        }
        agent::event::Event::OutOfMemory(oom) => {
            let container = oom.container;
            is_name(&container).then_some(Event::OutOfMemory { container })
        }
        agent::event::Event::NameQuestion(question) => Some(Event::NameQuestion(NameQuestion {
            token: question.token.as_slice().try_into().ok()?,
            address: address(&question.address)?,
            tcp: question.tcp,
        })),
        // An event of a later version.
        _ => None,
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or(<[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// A time of the guest's clock; one that can't be is the host's own now.
fn time_of(nanoseconds: i64) -> SystemTime {
    match u64::try_from(nanoseconds) {
        Ok(time) if nanoseconds <= MAX_TIME && time > 0 => UNIX_EPOCH + Duration::from_nanos(time),
        _ => SystemTime::now(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(container: &str, exec: &str, status: u32, at: i64) -> agent::Event {
        let mut event = agent::Event::new();
        event.set_process_exited(agent::ProcessExited {
            container: container.into(),
            exec: exec.into(),
            status,
            exited_at_ns: at,
            ..Default::default()
        });
        event
    }

    #[test]
    fn an_event_that_can_t_be_is_none() {
        assert!(checked(exit("a", "", 137, 1)).is_some());
        assert!(checked(exit("a", "b", 255, 1)).is_some());
        for (container, exec, status) in [
            ("", "", 0),
            ("../a", "", 0),
            ("a", "b/c", 0),
            ("a", "", 256),
        ] {
            let event = exit(container, exec, status, 1);
            assert!(checked(event).is_none(), "{container:?} {exec:?} {status}");
        }
        assert!(checked(agent::Event::new()).is_none());
    }

    #[test]
    fn a_question_has_a_whole_token_and_an_address() {
        let question = |token: usize, address: &[u8]| {
            let mut event = agent::Event::new();
            event.set_name_question(agent::NameQuestion {
                token: vec![7; token],
                address: address.to_vec(),
                ..Default::default()
            });
            checked(event)
        };
        let Some(Event::NameQuestion(good)) = question(TOKEN_LENGTH, &[127, 0, 0, 11]) else {
            panic!("refused");
        };
        assert_eq!(good.address, IpAddr::from([127, 0, 0, 11]));
        assert!(question(TOKEN_LENGTH + 1, &[127, 0, 0, 11]).is_none());
        assert!(question(TOKEN_LENGTH, &[127, 0, 0]).is_none());
        assert!(question(TOKEN_LENGTH, &[]).is_none());
    }

    #[test]
    fn a_time_that_can_t_be_is_now() {
        let before = SystemTime::now();
        for impossible in [i64::MIN, -1, 0, i64::MAX] {
            assert!(time_of(impossible) >= before, "{impossible}");
        }
        assert_eq!(time_of(5), UNIX_EPOCH + Duration::from_nanos(5));
    }
}
