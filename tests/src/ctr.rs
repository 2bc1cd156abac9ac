//! One call of `ctr`: with a deadline, its streams read to the end, its time taken.
//!
//! `Host` makes the calls. A call that does not end in time is killed and is an error that shows
//! what it had said so far.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::{Patience, TestResult, failure};

/// Emulation is slow and cases run side by side; a hang is what this is to find.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// A call to be made.
pub struct Call {
    command: Command,
    input: Option<Vec<u8>>,
    deadline: Duration,
}

/// What a call has left.
#[derive(Debug)]
pub struct Output {
    /// The exit code; a signal is 128 + its number.
    pub status: i32,
    /// The standard output.
    pub stdout: Vec<u8>,
    /// The standard error.
    pub stderr: Vec<u8>,
    /// From start to end.
    pub took: Duration,
}

impl Call {
    /// Prepares a call.
    pub fn new(command: Command) -> Self {
        Self {
            command,
            input: None,
            deadline: DEADLINE,
        }
    }

    /// What the standard input holds; without it, it is `/dev/null`.
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Another deadline than [`DEADLINE`].
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Makes the call and waits for its end.
    pub fn output(mut self) -> TestResult<Output> {
        let started = Instant::now();
        let stdin = if self.input.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        let mut child = self
            .command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failure(format!("start {}: {error}", self.text())))?;
        if let (Some(bytes), Some(mut stdin)) = (self.input.take(), child.stdin.take()) {
            // The reader may leave early: then what is left is dropped, as a shell's pipe does it.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let status = wait(&mut child, &Patience::new(self.deadline))?;
        let grace = Duration::from_secs(5);
        let (stdout, stderr) = (stdout.finish(grace), stderr.finish(grace));
        let took = started.elapsed();
        match status {
            Some(status) => Ok(Output {
                status,
                stdout,
                stderr,
                took,
            }),
            None => Err(failure(format!(
                "{}: not done after {:?}; stdout {:?}, stderr {:?}",
                self.text(),
                self.deadline,
                tail(&stdout),
                tail(&stderr)
            ))),
        }
    }

    /// Makes the call; another exit code than 0 is an error.
    pub fn ok(self) -> TestResult<Output> {
        let text = self.text();
        let output = self.output()?;
        if output.status != 0 {
            return Err(failure(format!(
                "{text}: exit code {}; {}",
                output.status,
                output.both()
            )));
        }
        Ok(output)
    }

    /// Starts the call and does not wait for it.
    pub fn spawn(mut self) -> TestResult<Child> {
        let text = self.text();
        self.command
            .spawn()
            .map_err(|error| failure(format!("start {text}: {error}")))
    }

    fn text(&self) -> String {
        let mut text = self.command.get_program().to_string_lossy().into_owned();
        for argument in self.command.get_args() {
            text.push(' ');
            text.push_str(&argument.to_string_lossy());
        }
        text
    }
}

impl Output {
    /// The standard output as text, without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout)
            .trim_end_matches('\n')
            .to_owned()
    }

    /// The standard error as text, without the last newline.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr)
            .trim_end_matches('\n')
            .to_owned()
    }

    /// Both, for messages.
    pub fn both(&self) -> String {
        format!(
            "stdout {:?}, stderr {:?}",
            tail(&self.stdout),
            tail(&self.stderr)
        )
    }
}

fn tail(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(2000)..]).into_owned()
}

/// Waits for a child for so long, kills it then. `None`: it had to be killed.
pub fn wait(child: &mut Child, patience: &Patience) -> TestResult<Option<i32>> {
    use std::os::unix::process::ExitStatusExt;
    loop {
        if let Some(status) = child.try_wait()? {
            let code = status
                .code()
                .or_else(|| status.signal().map(|signal| 128 + signal));
            return Ok(code);
        }
        if patience.is_over() {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The bytes of a stream, read by a thread.
struct Collected(mpsc::Receiver<Vec<u8>>);

fn collect(stream: Option<impl Read + Send + 'static>) -> Collected {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut stream) = stream {
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
    }
    Collected(receiver)
}

impl Collected {
    /// Everything up to the stream's end, or until nothing came for `grace` (somebody else holds
    /// it).
    fn finish(self, grace: Duration) -> Vec<u8> {
        let mut all = Vec::new();
        while let Ok(part) = self.0.recv_timeout(grace) {
            all.extend_from_slice(&part);
        }
        all
    }
}
