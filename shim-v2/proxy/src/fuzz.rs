//! What a fuzzer may throw at the proxy: each function takes arbitrary bytes and must return. The
//! crate `kata-like-fuzz` runs them.

use std::collections::HashSet;

use kata_like_agent_protocol::agent::NextEventsResponse;
use kata_like_agent_protocol::{MAX_ANSWER, MOST_EVENTS, is_name};
use kata_like_boot::MAX_MESSAGE;
use protobuf::Message;
use ttrpc::proto::{
    MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
};

use crate::call::read;
use crate::event::{Event, checked};
use crate::gate::Gate;
use crate::wire::{Answer, Method, Report};

/// Those whose answers are looked into.
const METHODS: [Method; 5] = [
    Method::StartPod,
    Method::Stats,
    Method::Shutdown,
    Method::GetUnwritten,
    Method::Exec,
];

/// The agent's answer to a call, the first byte says to which: what the shim is told of it fits a
/// message, and is read there as it was meant.
pub fn answer(data: &[u8]) {
    let Some((method, payload)) = data.split_first() else {
        return;
    };
    let method = METHODS[usize::from(*method) % METHODS.len()];
    let Ok(answer) = read(method, payload) else {
        return;
    };
    if let Answer::Stats(stats) = &answer {
        assert!(stats.io.len() <= 64 && stats.huge_pages.len() <= 16);
        let keys = stats.cpu_stat.len() + stats.memory_stat.len() + stats.memory_events.len();
        assert!(keys <= 45, "{keys} keys");
    }
    told(answer);
}

/// The agent's events: each that is told can be, and the shim finds so, too.
pub fn events(data: &[u8]) {
    let Ok(answer) = NextEventsResponse::parse_from_bytes(data) else {
        return;
    };
    let events = answer.events.into_iter().filter_map(checked);
    let events: Vec<_> = events.take(MOST_EVENTS).collect();
    for event in &events {
        assert!(event.can_be(), "{event:?}");
        match event {
            Event::Exited {
                container, status, ..
            } => assert!(is_name(container) && *status <= 255),
            Event::OutOfMemory { container } => assert!(is_name(container)),
            Event::NameQuestion(_) => {}
            Event::Ended { .. } => panic!("the shim alone can say so"),
        }
    }
    told(Answer::Events(events));
}

fn told(answer: Answer) {
    let report = Report::Answer {
        id: u64::MAX,
        answer,
    };
    let message = serde_json::to_vec(&report).expect("an answer is JSON");
    assert!(message.len() <= MAX_MESSAGE, "{} bytes", message.len());
    let read: Report = serde_json::from_slice(&message).expect("an answer can be read");
    assert_eq!(read, report);
}

/// Requests and answers in any order, and answers cut anywhere: the gate lets in one answer for
/// each request, no longer than it may be, and after the first that is not, none.
///
/// A byte below 64 is a request with this id. Any other one says how many of the next bytes the
/// guest sends at a time.
pub fn gate(data: &[u8]) {
    let mut gate = Gate::new(());
    let (mut owed, mut stream, mut payload) = (HashSet::new(), Vec::new(), 0);
    let mut rest = data;
    while let Some((byte, more)) = rest.split_first() {
        rest = more;
        if *byte < 64 {
            let request = Vec::from(MessageHeader {
                length: 0,
                stream_id: (*byte).into(),
                type_: MESSAGE_TYPE_REQUEST,
                flags: 0,
            });
            gate.sent(&request).expect("the shim may ask");
            owed.insert(u32::from(*byte));
            continue;
        }
        let (part, more) = rest.split_at(rest.len().min(usize::from(*byte - 63)));
        rest = more;
        if gate.received(part).is_err() {
            assert!(gate.offence().get().is_some());
            return;
        }
        stream.extend_from_slice(part);
        // Each header that is whole by now was let in.
        loop {
            let skipped = payload.min(stream.len());
            stream.drain(..skipped);
            payload -= skipped;
            let Some((header, more)) = stream.split_first_chunk::<MESSAGE_HEADER_LENGTH>() else {
                break;
            };
            let (header, more) = (MessageHeader::from(*header), more.to_vec());
            (payload, stream) = (header.length as usize, more);
            assert!(payload <= MAX_ANSWER && header.type_ == MESSAGE_TYPE_RESPONSE);
            assert!(owed.remove(&header.stream_id), "nobody asked");
        }
    }
}
