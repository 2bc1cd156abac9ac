//! The guest's events, checked: names, ranges, times. Its other texts are cleaned.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kata_like_agent_protocol::{TOKEN_LENGTH, agent, is_name};
use serde::{Deserialize, Serialize};

/// The latest time that is taken for one: 2^62 ns, in the year 2116.
const MAX_TIME: Duration = Duration::from_nanos(1 << 62);
/// The longest text of the guest's in an error, in characters.
const MAX_TEXT: usize = 2000;

/// What the guest says by itself, or happens to it, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A process has exited. The guest may say so of any process, and more than once.
    Exited {
        /// Its container.
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
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// A container asks a name server on the pod's loopback.
    NameQuestion(NameQuestion),
    /// The VM, its file server or its agent has ended, and every process with it. The last event,
    /// and one that only the shim can make.
    #[serde(skip)]
    Ended {
        /// One line: what ended, and why.
        reason: String,
    },
}

/// A question of the guest's for a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameQuestion {
    /// The token of the stream that it is asked in.
    pub token: [u8; TOKEN_LENGTH],
    /// Whom it is for.
    pub address: IpAddr,
    /// Whether it came by TCP.
    pub tcp: bool,
}

impl Event {
    /// Whether a guest can have said so: each name is one, each number in its range. The shim asks
    /// this again of what it is told.
    pub fn can_be(&self) -> bool {
        match self {
            Self::Exited {
                container,
                exec,
                status,
                at,
                ..
            } => {
                let named = is_name(container) && (exec.is_empty() || is_name(exec));
                let since = at.duration_since(UNIX_EPOCH);
                named && *status <= 255 && since.is_ok_and(|since| since <= MAX_TIME)
            }
            Self::OutOfMemory { container } => is_name(container),
            Self::NameQuestion(_) => true,
            Self::Ended { .. } => false,
        }
    }
}

/// A text of the guest's.
pub fn clean(text: &str) -> String {
    kata_like_failure::clean(text, MAX_TEXT)
}

/// An event that can be.
pub(crate) fn checked(event: agent::Event) -> Option<Event> {
    let event = match event.event? {
        agent::event::Event::ProcessExited(exit) => Event::Exited {
            container: exit.container,
            exec: exit.exec,
            status: exit.status,
            at: time_of(exit.exited_at_ns),
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
        },
        agent::event::Event::OutOfMemory(oom) => Event::OutOfMemory {
            container: oom.container,
        },
        agent::event::Event::NameQuestion(question) => Event::NameQuestion(NameQuestion {
            token: question.token.as_slice().try_into().ok()?,
            address: address(&question.address)?,
            tcp: question.tcp,
        }),
        // An event of a later version.
        _ => return None,
    };
    event.can_be().then_some(event)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or(<[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// A time of the guest's clock; one that can't be is the host's own now.
fn time_of(nanoseconds: i64) -> SystemTime {
    match u64::try_from(nanoseconds).map(Duration::from_nanos) {
        Ok(time) if time <= MAX_TIME && !time.is_zero() => UNIX_EPOCH + time,
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

    /// What a proxy that was taken over might tell the shim.
    #[test]
    fn what_is_told_again_is_looked_at_again() {
        let told = |json: &str| serde_json::from_str::<Event>(json);
        let exit = |status: u32, at: &str| {
            format!(
                r#"{{"exited":{{"container":"a","exec":"","status":{status},"at":{at},"stdout_bytes":0,"stderr_bytes":0}}}}"#
            )
        };
        let time = r#"{"secs_since_epoch":5,"nanos_since_epoch":1}"#;
        let late = r#"{"secs_since_epoch":4611686019,"nanos_since_epoch":0}"#;
        assert!(told(&exit(255, time)).unwrap().can_be());
        assert!(!told(&exit(256, time)).unwrap().can_be());
        assert!(!told(&exit(0, late)).unwrap().can_be());
        assert!(
            !told(r#"{"out_of_memory":{"container":"a/b"}}"#)
                .unwrap()
                .can_be()
        );
        assert!(told(r#"{"ended":{"reason":"it says so"}}"#).is_err());
        let never = r#"{"secs_since_epoch":18446744073709551615,"nanos_since_epoch":4294967295}"#;
        assert!(told(&exit(0, never)).is_err());
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
