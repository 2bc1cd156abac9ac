//! A client over TCP, a relay, a UNIX socket, a second relay, a server over TCP: as between host
//! and guest.

use std::io::ErrorKind;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const BULK: usize = 8 << 20;

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (far, near) = tokio::join!(TcpStream::connect(address), listener.accept());
    (far.unwrap(), near.unwrap().0)
}

async fn joined() -> (TcpStream, TcpStream) {
    let ((client, near), (server, far)) = (tcp().await, tcp().await);
    let (host, guest) = UnixStream::pair().unwrap();
    tokio::spawn(relay(near, host));
    tokio::spawn(relay(guest, far));
    (client, server)
}

fn pattern(seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(BULK).collect()
}

async fn rest(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut rest = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut rest));
    read.await.unwrap().map(|_| rest)
}

fn is_reset(result: io::Result<Vec<u8>>) -> bool {
    result.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn much_passes_whole_both_ways_at_once() {
    let (client, server) = joined().await;
    let (there, back) = (pattern(1), pattern(2));
    let (mut from_server, mut to_server) = client.into_split();
    let (mut from_client, mut to_client) = server.into_split();
    let send = async |to: &mut tokio::net::tcp::OwnedWriteHalf, bytes: &[u8]| {
        to.write_all(bytes).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let (mut got_there, mut got_back) = (Vec::new(), Vec::new());
    let all = async {
        tokio::join!(
            send(&mut to_server, &there),
            send(&mut to_client, &back),
            async { from_client.read_to_end(&mut got_there).await.unwrap() },
            async { from_server.read_to_end(&mut got_back).await.unwrap() },
        )
    };
    timeout(PATIENCE, all).await.unwrap();
    assert!(got_there == there && got_back == back);
}

#[tokio::test]
async fn one_direction_ends_and_the_other_goes_on() {
    for client_first in [true, false] {
        let (client, server) = joined().await;
        let (mut first, mut second) = match client_first {
            true => (client, server),
            false => (server, client),
        };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        assert_eq!(rest(&mut second).await.unwrap(), b"question");
        // The pause may be of any length.
        sleep(Duration::from_millis(50)).await;
        second.write_all(b"answer").await.unwrap();
        second.shutdown().await.unwrap();
        assert_eq!(rest(&mut first).await.unwrap(), b"answer");
    }
}

#[tokio::test]
async fn a_reset_is_no_end() {
    for client_first in [true, false] {
        let (client, server) = joined().await;
        let (mut first, mut second) = match client_first {
            true => (client, server),
            false => (server, client),
        };
        first.write_all(b"half a sen").await.unwrap();
        let mut got = [0; 10];
        timeout(PATIENCE, second.read_exact(&mut got))
            .await
            .unwrap()
            .unwrap();
        reset(&first);
        drop(first);
        assert!(is_reset(rest(&mut second).await));
    }
}

#[tokio::test]
async fn who_answers_and_leaves_is_heard_although_the_other_still_sends() {
    const ANSWER: usize = 10_000; // its first window takes it
    let (mut client, mut server) = joined().await;
    client.write_all(b"question").await.unwrap();
    timeout(PATIENCE, server.readable()).await.unwrap().unwrap();
    let answer = &pattern(3)[..ANSWER];
    server.write_all(answer).await.unwrap();
    drop(server); // with the question unread: its kernel resets
    let mut got = vec![0; ANSWER];
    timeout(PATIENCE, client.read_exact(&mut got))
        .await
        .unwrap()
        .unwrap();
    assert!(got == answer);
    assert!(is_reset(rest(&mut client).await));
}

#[tokio::test]
async fn who_reads_no_more_is_heard_to_the_end() {
    let ((mut client, near), (far, mut server)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    tokio::spawn(relay(near, far));
    shutdown(&server, Shutdown::Read).unwrap();
    client.write_all(b"nobody reads this").await.unwrap();
    sleep(Duration::from_millis(50)).await; // the relay has tried
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    let mut answer = String::new();
    let read = timeout(PATIENCE, client.read_to_string(&mut answer));
    read.await.unwrap().unwrap();
    assert_eq!(answer, "answer");
}

#[tokio::test]
async fn a_receiver_that_stalls_stops_the_sender() {
    let (client, server) = joined().await;
    let mut sent = 0;
    let flood = vec![7; 1 << 20];
    loop {
        match timeout(Duration::from_millis(300), client.writable()).await {
            Ok(ready) => ready.unwrap(),
            Err(_) => break,
        }
        sent += client.try_write(&flood).unwrap_or(0);
        assert!(sent < 64 << 20, "nobody stops it");
    }
    drop(client);
    let (mut server, mut got) = (server, 0);
    let mut chunk = vec![0; 1 << 20];
    while let Ok(Ok(count @ 1..)) = timeout(PATIENCE, server.read(&mut chunk)).await {
        got += count;
    }
    assert_eq!(got, sent);
}

#[tokio::test]
async fn a_relay_that_is_dropped_closes() {
    let ((mut client, near), (mut server, far)) = (tcp().await, tcp().await);
    let relay = tokio::spawn(relay(near, far));
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0]).await.unwrap();
    relay.abort();
    assert!(rest(&mut client).await.is_ok_and(|rest| rest.is_empty()));
    assert!(rest(&mut server).await.is_ok_and(|rest| rest.is_empty()));
}
