//! Real FIFOs on containerd's side, socket pairs on the guest's.

use std::io::Read;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

use super::*;

struct Streams {
    _directory: TempDir,
    paths: StdioPaths,
}

fn fifos() -> Streams {
    let directory = tempfile::tempdir().expect("a directory");
    let make = |name: &str| {
        let path = directory.path().join(name);
        mkfifo(&path, Mode::from_bits_truncate(0o600)).expect("a FIFO");
        path.display().to_string()
    };
    let paths = StdioPaths {
        stdin: make("stdin"),
        stdout: make("stdout"),
        stderr: make("stderr"),
        terminal: false,
    };
    Streams {
        _directory: directory,
        paths,
    }
}

async fn open(paths: &StdioPaths) -> Stdio {
    Stdio::open(paths, "ns", "c")
        .await
        .expect("open the streams")
}

/// The guest's ends of the three streams.
fn attach(stdio: &Stdio) -> (UnixStream, UnixStream, UnixStream) {
    let pair = || UnixStream::pair().expect("a socket pair");
    let ((a, stdin), (b, stdout), (c, stderr)) = (pair(), pair(), pair());
    stdio.attach(Some(a), Some(b), Some(c));
    (stdin, stdout, stderr)
}

fn reader(path: &str) -> pipe::Receiver {
    let options = pipe::OpenOptions::new();
    options.open_receiver(path).expect("a reader")
}

#[tokio::test]
async fn output_arrives_whole_and_ends_with_the_guest_s_stream() {
    let streams = fifos();
    let mut client = reader(&streams.paths.stdout);
    let stdio = open(&streams.paths).await;
    let (_stdin, mut stdout, _stderr) = attach(&stdio);
    let sent: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    let writer = {
        let sent = sent.clone();
        tokio::spawn(async move {
            stdout.write_all(&sent).await.expect("the shim reads");
        })
    };
    let mut got = Vec::new();
    let read = client.read_to_end(&mut got);
    tokio::time::timeout(Duration::from_secs(5), read)
        .await
        .expect("end-of-file when the guest's stream has ended")
        .expect("read");
    writer.await.expect("written");
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    assert!(stdio.drained(300_000, 0).await);
}

#[tokio::test]
async fn an_exit_waits_for_the_output_before_it() {
    let streams = fifos();
    let client = reader(&streams.paths.stdout);
    let stdio = open(&streams.paths).await;
    let (_stdin, mut stdout, _stderr) = attach(&stdio);
    let late = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(200)).await;
        stdout.write_all(b"late").await.expect("the shim reads");
        stdout
    });
    assert!(stdio.drained(4, 0).await);
    let mut got = [0; 4];
    let read = client.try_read(&mut got).expect("it is in the FIFO");
    assert_eq!(&got[..read], b"late");
    drop(late);
}

#[tokio::test]
async fn a_stalled_reader_does_not_hold_an_exit() {
    let streams = fifos();
    let _client = reader(&streams.paths.stdout);
    let stdio = open(&streams.paths).await;
    let (_stdin, mut stdout, _stderr) = attach(&stdio);
    let writer = tokio::spawn(async move {
        let _ = stdout.write_all(&vec![1; 1 << 20]).await;
    });
    let begin = Instant::now();
    assert!(!stdio.drained(1 << 20, 0).await);
    assert!(begin.elapsed() < Duration::from_secs(1));
    let begin = Instant::now();
    stdio.close(Duration::from_millis(100)).await;
    assert!(begin.elapsed() < Duration::from_secs(1));
    writer.abort();
}

#[tokio::test]
async fn a_reader_that_leaves_and_returns_goes_on_reading() {
    let streams = fifos();
    let client = reader(&streams.paths.stdout);
    let stdio = open(&streams.paths).await;
    let (_stdin, mut stdout, _stderr) = attach(&stdio);
    drop(client);
    stdout.write_all(b"kept").await.expect("the shim reads");
    assert!(stdio.drained(4, 0).await);
    let mut client = reader(&streams.paths.stdout);
    let mut got = [0; 4];
    client.read_exact(&mut got).await.expect("what was kept");
    assert_eq!(&got, b"kept");
}

#[tokio::test]
async fn stdin_ends_when_both_the_client_and_we_have_closed() {
    let streams = fifos();
    let stdio = open(&streams.paths).await;
    let (mut stdin, _stdout, _stderr) = attach(&stdio);
    let mut client = pipe::OpenOptions::new()
        .open_sender(&streams.paths.stdin)
        .expect("a writer");
    client.write_all(b"one").await.expect("write");
    // As BuildKit does it: CloseIO first, then the rest.
    stdio.close_stdin();
    tokio::time::sleep(Duration::from_millis(50)).await;
    client.write_all(b" two").await.expect("write");
    drop(client);
    let mut got = Vec::new();
    let read = stdin.read_to_end(&mut got);
    tokio::time::timeout(Duration::from_secs(5), read)
        .await
        .expect("an end")
        .expect("read");
    assert_eq!(got, b"one two");
}

#[tokio::test]
async fn stdin_stays_open_while_clients_come_and_go() {
    let streams = fifos();
    let stdio = open(&streams.paths).await;
    let (mut stdin, _stdout, _stderr) = attach(&stdio);
    for word in [b"a", b"b"] {
        let mut client = pipe::OpenOptions::new()
            .open_sender(&streams.paths.stdin)
            .expect("a writer");
        client.write_all(word).await.expect("write");
        drop(client);
        let mut got = [0];
        stdin.read_exact(&mut got).await.expect("read");
        assert_eq!(&got, word);
    }
    let more = tokio::time::timeout(Duration::from_millis(100), stdin.read_u8());
    assert!(more.await.is_err(), "no end-of-file yet");
}

#[tokio::test]
async fn no_paths_are_no_streams() {
    let stdio = open(&StdioPaths::default()).await;
    assert!(!stdio.has_stdin() && !stdio.has_stdout() && !stdio.has_stderr());
    assert!(
        stdio.drained(100, 100).await,
        "there is nothing to wait for"
    );
}

#[tokio::test]
async fn with_a_terminal_stderr_is_left_alone() {
    let streams = fifos();
    let paths = StdioPaths {
        terminal: true,
        ..streams.paths.clone()
    };
    assert!(!open(&paths).await.has_stderr());
}

#[tokio::test]
async fn both_outputs_go_to_one_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("deep/er/log");
    let paths = StdioPaths {
        stdout: format!("file://{}", path.display()),
        stderr: format!("file://{}", path.display()),
        ..StdioPaths::default()
    };
    let stdio = open(&paths).await;
    let (_stdin, mut stdout, mut stderr) = attach(&stdio);
    stdout.write_all(b"out ").await.expect("write");
    assert!(stdio.drained(4, 0).await);
    stderr.write_all(b"err").await.expect("write");
    assert!(stdio.drained(4, 3).await);
    assert_eq!(std::fs::read(&path).expect("the file"), b"out err");
}

#[tokio::test]
async fn wrong_paths_are_named() {
    let missing = StdioPaths {
        stdout: "/nowhere/at/all".into(),
        ..StdioPaths::default()
    };
    let error = Stdio::open(&missing, "ns", "c").await.expect_err("missing");
    let text = kata_like_failure::one_line(&error);
    assert!(
        text.contains("/nowhere/at/all") && text.contains("stdout"),
        "{text}"
    );
    let unknown = StdioPaths {
        stdout: "udp://host".into(),
        ..StdioPaths::default()
    };
    let error = Stdio::open(&unknown, "ns", "c").await.expect_err("unknown");
    assert!(error.to_string().contains("udp"));
}

#[tokio::test]
async fn a_logging_program_gets_both_outputs_and_its_environment() {
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("logger");
    let log = directory.path().join("log");
    let script = "#!/bin/sh\nexec 5>&-\nexec >\"$1\"\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID\"\ncat <&3\ncat <&4\n";
    std::fs::write(&program, script).expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&program, executable).expect("chmod");
    let paths = StdioPaths {
        stdout: format!("binary://{}?{}", program.display(), log.display()),
        ..StdioPaths::default()
    };
    let stdio = open(&paths).await;
    let (_stdin, mut stdout, mut stderr) = attach(&stdio);
    stdout.write_all(b"out\n").await.expect("write");
    stderr.write_all(b"err\n").await.expect("write");
    drop((stdout, stderr));
    stdio.close(Duration::from_secs(5)).await;
    let wanted = "ns/c\nout\nerr\n";
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut got = String::new();
    while got != wanted && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
        got.clear();
        let file = std::fs::File::open(&log);
        let _ = file.and_then(|mut file| file.read_to_string(&mut got));
    }
    assert_eq!(got, wanted);
}

/// A reader that takes a little at a time gets everything; one that takes nothing holds nobody up.
#[tokio::test]
async fn a_deletion_waits_for_a_slow_reader_and_not_for_a_stalled_one() {
    let streams = fifos();
    let mut client = reader(&streams.paths.stdout);
    let stdio = std::sync::Arc::new(open(&streams.paths).await);
    let (_stdin, mut stdout, stderr) = attach(&stdio);
    drop(stderr);
    let sent = vec![7u8; 200_000];
    let writer = tokio::spawn(async move {
        stdout.write_all(&sent).await.expect("the guest's output");
    });
    let closing = std::sync::Arc::clone(&stdio);
    let begin = Instant::now();
    let close = tokio::spawn(async move { closing.close(STALLED_READER).await });
    let (mut got, mut piece) = (0, vec![0; 8192]);
    loop {
        match client.read(&mut piece).await.expect("output") {
            0 => break,
            length => got += length,
        }
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert_eq!(got, 200_000);
    assert!(begin.elapsed() > STALLED_READER, "it was a slow reader");
    close.await.expect("the deletion");
    writer.await.expect("the guest");

    let streams = fifos();
    let _client = reader(&streams.paths.stdout);
    let stdio = open(&streams.paths).await;
    let (_stdin, mut stdout, _stderr) = attach(&stdio);
    let flood = vec![7u8; 1 << 20];
    tokio::spawn(async move { stdout.write_all(&flood).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let begin = Instant::now();
    stdio.close(Duration::from_millis(400)).await;
    assert!(begin.elapsed() < Duration::from_millis(900));
}

#[tokio::test]
async fn a_file_can_be_the_input_and_its_name_may_be_escaped() {
    let directory = tempfile::tempdir().expect("a directory");
    let input = directory.path().join("in");
    std::fs::write(&input, "from a file").expect("a file");
    let log = directory.path().join("a b/log");
    let paths = StdioPaths {
        stdin: input.display().to_string(),
        stdout: format!("file://{}", log.display()).replace(' ', "%20"),
        ..StdioPaths::default()
    };
    let stdio = open(&paths).await;
    let (mut stdin, mut stdout, _stderr) = attach(&stdio);
    let mut got = String::new();
    stdin.read_to_string(&mut got).await.expect("the input");
    assert_eq!(got, "from a file");
    stdout.write_all(b"out").await.expect("output");
    drop(stdout);
    stdio.close(Duration::from_secs(1)).await;
    assert_eq!(std::fs::read_to_string(&log).expect("the log"), "out");
}

/// By a byte, or by closing the descriptor; with a terminal there is one stream.
#[tokio::test]
async fn a_logging_program_says_when_it_is_ready() {
    let directory = tempfile::tempdir().expect("a directory");
    let program = |name: &str, text: &str| {
        use std::os::unix::fs::PermissionsExt;
        let path = directory.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a script");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&path, mode).expect("its mode");
        StdioPaths {
            stdout: format!("binary://{}", path.display()),
            terminal: true,
            ..StdioPaths::default()
        }
    };
    let out = directory.path().join("out");
    let byte = program(
        "byte",
        &format!(
            "echo >&5; cat <&4; cat <&3 >{0}.half; mv {0}.half {0}",
            out.display()
        ),
    );
    let stdio = open(&byte).await;
    assert!(stdio.has_stdout() && !stdio.has_stderr());
    let (_stdin, mut stdout, _) = attach(&stdio);
    stdout.write_all(b"tty").await.expect("output");
    drop(stdout);
    stdio.close(Duration::from_secs(1)).await;
    for _ in 0..500 {
        if out.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(std::fs::read_to_string(&out).expect("the log"), "tty");
    let dies = program("dies", "exit 3");
    open(&dies).await.close(Duration::ZERO).await;
}
