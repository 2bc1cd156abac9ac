//! A process's streams, with socket pairs for vsock and threads for the process.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kata_like_agent_protocol::TOKEN_LENGTH;

use crate::stdio::port::Socket;

const SECOND: Duration = Duration::from_secs(5);

fn token(byte: u8) -> Token {
    [byte; TOKEN_LENGTH]
}

/// The host's dial of a stream.
fn dial(tokens: &Tokens, token: Token) -> UnixStream {
    let (host, guest) = UnixStream::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    let guest: Socket = watch(guest, BOTH).unwrap();
    tokens.park(token, guest);
    host
}

fn streams() -> Wanted {
    Wanted {
        tokens: [Some(token(1)), Some(token(2)), Some(token(3))],
        terminal: None,
    }
}

/// The process's ends as files.
fn ends(stdio: Stdio) -> [std::fs::File; 3] {
    match stdio {
        Stdio::Streams {
            stdin,
            stdout,
            stderr,
        } => [stdin.into(), stdout.into(), stderr.into()],
        Stdio::Terminal { .. } => panic!("no terminal was asked for"),
    }
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let work = tokio::task::spawn_blocking(work);
    tokio::time::timeout(SECOND * 4, work)
        .await
        .expect("in time")
        .unwrap()
}

#[tokio::test]
async fn many_bytes_pass_whole_in_order_and_stdin_ends_after_the_last() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let [mut stdin, mut stdout, stderr] = ends(stdio);
    let streams = plan.connect(None).unwrap();
    drop(stderr);
    let sent = bytes(9 << 20);

    let (mut host_in, mut host_out) = (dial(&tokens, token(1)), dial(&tokens, token(2)));
    let to_send = sent.clone();
    let host = blocking(move || {
        let writer = std::thread::spawn(move || host_in.write_all(&to_send).unwrap());
        let cat = std::thread::spawn(move || std::io::copy(&mut stdin, &mut stdout).unwrap());
        let mut got = Vec::new();
        host_out.read_to_end(&mut got).unwrap();
        writer.join().unwrap();
        (got, cat.join().unwrap())
    });
    let (got, copied) = host.await;
    assert!(got == sent, "{} bytes of {}", got.len(), sent.len());
    assert_eq!(copied, sent.len() as u64);
    assert_eq!(streams.exited(), [sent.len() as u64, 0]);
}

#[tokio::test]
async fn output_is_counted_at_the_exit_even_if_nobody_reads_it_yet() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let [_stdin, mut stdout, mut stderr] = ends(stdio);
    let streams = plan.connect(None).unwrap();
    let text = bytes(60_000);
    stderr.write_all(&text).unwrap();
    stdout.write_all(b"hello").unwrap();
    // A child keeps stdout open; the process itself is gone.
    drop(stderr);
    assert_eq!(streams.exited(), [5, 60_000]);
    let (mut out, mut error) = (dial(&tokens, token(2)), dial(&tokens, token(3)));
    let (got_out, got_error) = blocking(move || {
        let mut got = [0; 5];
        out.read_exact(&mut got).unwrap();
        let mut rest = Vec::new();
        error.read_to_end(&mut rest).unwrap();
        (got, rest)
    })
    .await;
    assert_eq!(&got_out, b"hello");
    assert!(got_error == text);
    assert_eq!(streams.exited(), [5, 60_000], "counted once");
    assert!(!streams.finished(), "the child may still write");
    drop(stdout);
}

#[tokio::test]
async fn a_stalled_reader_holds_the_process_back_and_loses_nothing() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let [_stdin, mut stdout, _stderr] = ends(stdio);
    let streams = plan.connect(None).unwrap();
    let mut host = dial(&tokens, token(2));
    let text = bytes(4 << 20);
    let to_write = text.clone();
    let writer = std::thread::spawn(move || stdout.write_all(&to_write).unwrap());
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(
        !writer.is_finished(),
        "4 MiB don't fit into pipe and socket"
    );
    let got = blocking(move || {
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        got
    })
    .await;
    assert!(got == text);
    writer.join().unwrap();
    drop(streams);
}

#[tokio::test]
async fn a_process_that_closes_stdin_ends_the_stream_though_the_host_is_silent() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let [stdin, _stdout, _stderr] = ends(stdio);
    let _streams = plan.connect(None).unwrap();
    let mut host = dial(&tokens, token(1));
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(stdin);
    let read = blocking(move || host.read(&mut [0; 1]).unwrap()).await;
    assert_eq!(read, 0);
}

#[tokio::test]
async fn a_host_that_stops_reading_does_not_block_the_process() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let [_stdin, mut stdout, _stderr] = ends(stdio);
    let _streams = plan.connect(None).unwrap();
    drop(dial(&tokens, token(2)));
    blocking(move || stdout.write_all(&bytes(1 << 20)).unwrap()).await;
}

#[tokio::test]
async fn dropping_the_streams_closes_them_and_forgets_the_tokens() {
    let tokens = Arc::new(Tokens::default());
    let (stdio, plan) = prepare(&tokens, &streams()).unwrap();
    let _process = ends(stdio);
    let streams = plan.connect(None).unwrap();
    let mut host = dial(&tokens, token(2));
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(streams);
    let read = blocking(move || host.read(&mut [0; 1]).unwrap()).await;
    assert_eq!(read, 0);
    let again = prepare(&tokens, &self::streams());
    assert!(again.is_ok(), "the tokens are free again");
}

#[tokio::test]
async fn a_token_for_two_streams_is_refused() {
    let tokens = Arc::new(Tokens::default());
    let wanted = Wanted {
        tokens: [None, Some(token(1)), Some(token(1))],
        terminal: None,
    };
    assert!(prepare(&tokens, &wanted).is_err());
    assert!(
        prepare(&tokens, &streams()).is_ok(),
        "and nothing is left of it"
    );
}

#[tokio::test]
async fn a_terminal_that_nobody_has_open_for_a_while_has_not_ended() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};

    let tokens = Arc::new(Tokens::default());
    let wanted = Wanted {
        tokens: [None, Some(token(1)), None],
        terminal: Some((80, 24)),
    };
    let (_, plan) = prepare(&tokens, &wanted).unwrap();
    let pty = nix::pty::openpty(None, None).unwrap();
    let master = pty.master.try_clone().unwrap();
    let streams = plan.connect(Some(pty.master)).unwrap();
    let mut screen = dial(&tokens, token(1));
    let screen = blocking(move || {
        std::fs::File::from(pty.slave)
            .write_all(b"first, ")
            .unwrap();
        let mut shown = [0; 7];
        screen.read_exact(&mut shown).unwrap();
        assert_eq!(&shown, b"first, ");
        screen
    })
    .await;
    // What reads for us has seen by now that nobody else has it open.
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let again = ioctl_tiocgptpeer(&master, flags).unwrap();
    std::fs::File::from(again).write_all(b"then more").unwrap();
    let mut screen = screen;
    assert_eq!(streams.exited(), [16, 0]);
    let shown = blocking(move || {
        let mut shown = String::new();
        screen.read_to_string(&mut shown).unwrap();
        shown
    })
    .await;
    assert_eq!(shown, "then more");
}

#[tokio::test]
async fn a_terminal_goes_both_ways_and_is_counted_with_what_it_still_holds() {
    let tokens = Arc::new(Tokens::default());
    let wanted = Wanted {
        tokens: [Some(token(1)), Some(token(2)), None],
        terminal: Some((80, 24)),
    };
    let (stdio, plan) = prepare(&tokens, &wanted).unwrap();
    assert!(matches!(
        stdio,
        Stdio::Terminal {
            width: 80,
            height: 24
        }
    ));
    let pty = nix::pty::openpty(None, None).unwrap();
    let mut raw = rustix::termios::tcgetattr(&pty.slave).unwrap();
    raw.make_raw();
    rustix::termios::tcsetattr(&pty.slave, rustix::termios::OptionalActions::Now, &raw).unwrap();
    let streams = plan.connect(Some(pty.master)).unwrap();
    let mut slave = std::fs::File::from(pty.slave);

    streams.resize(100, 50).unwrap();
    let size = rustix::termios::tcgetwinsize(&slave).unwrap();
    assert_eq!((size.ws_col, size.ws_row), (100, 50));

    slave.write_all(b"before anybody reads\n").unwrap();
    assert_eq!(streams.exited(), [21, 0]);

    let (mut keys, mut screen) = (dial(&tokens, token(1)), dial(&tokens, token(2)));
    keys.write_all(b"typed").unwrap();
    let (typed, shown) = blocking(move || {
        let mut typed = [0; 5];
        slave.read_exact(&mut typed).unwrap();
        slave.write_all(b"after").unwrap();
        drop(slave);
        let mut shown = Vec::new();
        screen.read_to_end(&mut shown).unwrap();
        (typed, shown)
    })
    .await;
    assert_eq!(&typed, b"typed");
    assert_eq!(shown, b"before anybody reads\nafter");
    // The terminal's end ends its input too, though the host has not closed it.
    let end = blocking(move || keys.read(&mut [0; 1]).unwrap()).await;
    assert_eq!(end, 0);
    assert!(streams.tasks.len() == 2);
}
