//! A hostile agent on a real socket, before the client that the shim has.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::thread::JoinHandle;

use kata_like_agent_protocol::agent::{self, NextEventsResponse};
use protobuf::Message;
use ttrpc::proto::{
    MESSAGE_TYPE_DATA, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader, Request,
    Response,
};

use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::*;

/// What a flood may add to this process, in which other tests run, too.
const MOST_MEMORY: u64 = 48 << 20;

/// How the end of a guest begins that sends what it may not.
const OFFENCE: &str = "the guest's agent is not listened to any more: the guest ";

/// The agent's end of a connection.
struct Hostile(StdUnixStream);

impl Hostile {
    /// The next request: its id, and what it asks for. None once the shim has hung up.
    fn asked(&mut self) -> Option<(u32, NextEventsRequest)> {
        let mut header = [0; 10];
        self.0.read_exact(&mut header).ok()?;
        let header = MessageHeader::from(header);
        let mut payload = vec![0; header.length as usize];
        self.0.read_exact(&mut payload).ok()?;
        let request = Request::parse_from_bytes(&payload).unwrap();
        assert_eq!(request.method, "NextEvents");
        let asked = NextEventsRequest::parse_from_bytes(&request.payload).unwrap();
        Some((header.stream_id, asked))
    }

    fn send(&mut self, type_: u8, id: u32, payload: &[u8]) -> bool {
        let header = MessageHeader {
            length: payload.len().try_into().unwrap(),
            stream_id: id,
            type_,
            flags: 0,
        };
        let mut frame = Vec::from(header);
        frame.extend(payload);
        self.0.write_all(&frame).is_ok()
    }

    fn answer(&mut self, id: u32, events: Vec<agent::Event>) -> bool {
        let answer = NextEventsResponse {
            events,
            ..Default::default()
        };
        let response = Response {
            payload: answer.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let response = response.write_to_bytes().unwrap();
        self.send(MESSAGE_TYPE_RESPONSE, id, &response)
    }
}

/// Follows an agent that does what `act` says; answers why the events have ended, and what `act`
/// has found out.
async fn met<T: Send + 'static>(
    events: mpsc::Sender<Event>,
    act: impl FnOnce(Hostile) -> T + Send + 'static,
) -> (String, T) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let hostile = Hostile(theirs.try_clone().unwrap());
    let acting: JoinHandle<T> = std::thread::spawn(move || {
        let found = act(hostile);
        let _ = theirs.shutdown(Shutdown::Both);
        found
    });
    let connection = tokio::net::UnixStream::from_std(ours).unwrap();
    let (client, offence) = crate::serve::client(connection);
    let followed = follow(client, offence, events);
    let why = timeout(Duration::from_secs(60), followed).await;
    let found = tokio::task::spawn_blocking(|| acting.join().unwrap()).await;
    (why.expect("it ends"), found.unwrap())
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

fn listener() -> (mpsc::Sender<Event>, mpsc::Receiver<Event>) {
    mpsc::channel(256)
}

fn out_of_memory(container: &str) -> agent::Event {
    let mut event = agent::Event::new();
    event.set_out_of_memory(agent::OutOfMemory {
        container: container.to_owned(),
        ..Default::default()
    });
    event
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_frames_ends_the_connection_and_takes_no_memory() {
    for (type_, id_of) in [
        (MESSAGE_TYPE_DATA, (|id| id) as fn(u32) -> u32),
        (MESSAGE_TYPE_DATA, |id| id + 2),
        (MESSAGE_TYPE_REQUEST, |id| id),
        (MESSAGE_TYPE_RESPONSE, |id| id + 2),
    ] {
        for size in [300, 4096, 65536, 4 << 20] {
            let before = resident_bytes();
            let (events, _happened) = listener();
            let (why, frames) = met(events, move |mut hostile| {
                let (id, _) = hostile.asked().unwrap();
                let payload = vec![0xff; size];
                // More than a second of it, at a gigabyte a second.
                let most = (2 << 30) / size;
                (0..most)
                    .take_while(|_| hostile.send(type_, id_of(id), &payload))
                    .count()
            })
            .await;
            assert!(why.starts_with(OFFENCE), "{why}");
            let grown = resident_bytes().saturating_sub(before);
            assert!(grown < MOST_MEMORY, "{grown} bytes for {size}");
            assert!(frames * size < 8 << 20, "{frames} frames of {size}");
        }
    }
}

/// What an honest agent's frames look like, as many as the shim asks for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_answers_comes_at_the_shims_pace() {
    for size in [0, 300, 4096, 60_000] {
        let before = resident_bytes();
        let (events, mut happened) = listener();
        let count = tokio::spawn(async move {
            let mut count = 0;
            while happened.recv().await.is_some() {
                count += 1;
            }
            count
        });
        let begin = Instant::now();
        let (why, answers) = met(events, move |mut hostile| {
            let mut answers = 0_u32;
            while let Some((id, _)) = hostile.asked() {
                let events = match size {
                    0 => Vec::new(),
                    _ => vec![out_of_memory("stranger"); 60_usize.min(size / 10)],
                };
                let mut answer = NextEventsResponse {
                    events,
                    ..Default::default()
                };
                // A field that nobody knows.
                let padding = vec![7; size.saturating_sub(800)];
                answer
                    .special_fields
                    .mut_unknown_fields()
                    .add_length_delimited(99, padding);
                let response = Response {
                    payload: answer.write_to_bytes().unwrap(),
                    ..Default::default()
                };
                let response = response.write_to_bytes().unwrap();
                if !hostile.send(MESSAGE_TYPE_RESPONSE, id, &response) {
                    break;
                }
                answers += 1;
                if begin.elapsed() > Duration::from_secs(2) {
                    break;
                }
            }
            answers
        })
        .await;
        assert!(why.starts_with("the agent is gone: "), "{why}");
        let took = begin.elapsed().as_secs_f64();
        let most = 200.0 + 50.0 * took + 2.0;
        assert!(f64::from(answers) <= most, "{answers} answers in {took} s");
        assert!(answers >= 100, "{answers} answers in {took} s");
        let events: u32 = count.await.unwrap();
        assert_eq!(events, answers * 60.min(u32::try_from(size).unwrap() / 10));
        let grown = resident_bytes().saturating_sub(before);
        assert!(grown < MOST_MEMORY, "{grown} bytes for {size}");
    }
}

#[tokio::test]
async fn an_answer_that_is_too_long_is_never_read() {
    let (events, _happened) = listener();
    let (why, ()) = met(events, |mut hostile| {
        let (id, _) = hostile.asked().unwrap();
        hostile.send(MESSAGE_TYPE_RESPONSE, id, &vec![0; (64 << 10) + 1]);
    })
    .await;
    let wanted = format!("{OFFENCE}sent an answer of 65537 bytes");
    assert_eq!(why, wanted);
}

#[tokio::test]
async fn a_second_answer_is_for_nobody() {
    let (events, _happened) = listener();
    let (why, ()) = met(events, |mut hostile| {
        let (id, _) = hostile.asked().unwrap();
        hostile.answer(id, Vec::new());
        hostile.answer(id, Vec::new());
    })
    .await;
    let wanted = format!("{OFFENCE}answered a request 1 that it has not got");
    assert_eq!(why, wanted);
}

#[tokio::test]
async fn what_is_no_event_ends_the_pod_after_a_hundred_times() {
    let (events, mut happened) = listener();
    let (why, ()) = met(events, |mut hostile| {
        while let Some((id, _)) = hostile.asked() {
            let mut events = vec![out_of_memory("../../etc"); 9];
            events.push(out_of_memory("a"));
            hostile.answer(id, events);
        }
    })
    .await;
    assert_eq!(why, "the guest sent 100 events that are none");
    let mut good = 0;
    while happened.recv().await.is_some() {
        good += 1;
    }
    assert_eq!(good, 11);
}

#[tokio::test]
async fn more_events_than_asked_for_are_refused() {
    let (events, _happened) = listener();
    let (why, ()) = met(events, |mut hostile| {
        let (id, _) = hostile.asked().unwrap();
        hostile.answer(id, vec![out_of_memory("a"); 65]);
    })
    .await;
    assert_eq!(why, "the guest sent 65 events at once");
}

/// Each answer counts as received in the next request, and a byte at a time is an answer, too.
#[tokio::test]
async fn events_are_handed_on_at_once_and_counted() {
    let (events, mut happened) = listener();
    let begin = Instant::now();
    let (_, asked) = met(events, |mut hostile| {
        let mut asked = Vec::new();
        for count in [2, 0, 1] {
            let (id, request) = hostile.asked().unwrap();
            asked.push((request.received, request.most));
            hostile.answer(id, vec![out_of_memory("a"); count]);
        }
        let (id, request) = hostile.asked().unwrap();
        asked.push((request.received, request.most));
        let header = MessageHeader::new_response(id, 0);
        for byte in Vec::from(header) {
            hostile.0.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_millis(2));
        }
        let (_, request) = hostile.asked().unwrap();
        asked.push((request.received, request.most));
        asked
    })
    .await;
    assert_eq!(asked, [(0, 64), (2, 64), (2, 64), (3, 64), (3, 64)]);
    assert!(begin.elapsed() < Duration::from_secs(5));
    for _ in 0..3 {
        assert!(matches!(
            happened.recv().await,
            Some(Event::OutOfMemory { .. })
        ));
    }
}
