//! A container of a CRI pod, and its log.

use std::fs;
use std::path::{Path, PathBuf};

use kata_like_cri_client::messages::*;
use protobuf::EnumOrUnknown;

use super::{Kubelet, MINUTE, no_answer};
use crate::process::until;
use crate::{TestResult, failure};

/// A container of a pod; it goes with the pod.
pub struct Container<'pod> {
    pub(super) kubelet: &'pod Kubelet<'pod>,
    pub(super) id: String,
    pub(super) log: PathBuf,
}

impl Container<'_> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its state.
    pub fn status(&self) -> TestResult<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.kubelet.call(request)?;
        answer.status.0.map(|status| *status).ok_or_else(no_answer)
    }

    /// The request to start it.
    pub fn start(&self) -> StartContainerRequest {
        StartContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        }
    }

    /// Waits for its end.
    pub fn wait_exit(&self) -> TestResult<ContainerStatus> {
        self.kubelet.until("a container's end", || {
            Ok(Some(self.status()?).filter(|status| status.state == exited()))
        })
    }

    /// The same, until an event that CRI gets beside the exit has brought the reason.
    pub fn wait_reason(&self, reason: &str) -> TestResult<ContainerStatus> {
        let mut status = self.wait_exit()?;
        let told = until(reason, MINUTE, || {
            status = self.status().unwrap_or_default();
            status.reason == reason
        });
        told.map_err(|error| failure(format!("{error}: {status}")))?;
        Ok(status)
    }

    /// Its stats.
    pub fn stats(&self) -> TestResult<ContainerStats> {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let stats = self.kubelet.call(request)?.stats;
        stats.0.map(|stats| *stats).ok_or_else(no_answer)
    }

    /// The request to run a command in it; 0: without a time-out.
    pub fn command(&self, command: &[&str], seconds: i64) -> ExecSyncRequest {
        ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            timeout: seconds,
            ..Default::default()
        }
    }

    /// Runs a shell script in it and returns its standard output without the last newline. Any exit
    /// code other than 0 is an error.
    pub fn exec(&self, script: &str) -> TestResult<String> {
        let answer = self.kubelet.call(self.command(&["sh", "-c", script], 0))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let (stdout, stderr) = (text(&answer.stdout), text(&answer.stderr));
        match answer.exit_code {
            0 => Ok(stdout),
            code => Err(failure(format!(
                "{script:?}: exit code {code}, stdout {stdout:?}, stderr {stderr:?}"
            ))),
        }
    }

    /// Stops it: SIGTERM, and SIGKILL if it is still there after `seconds`.
    pub fn stop(&self, seconds: i64) -> TestResult<ContainerStatus> {
        self.kubelet.call(StopContainerRequest {
            container_id: self.id.clone(),
            timeout: seconds,
            ..Default::default()
        })?;
        self.status()
    }

    /// Removes it.
    pub fn remove(self) -> TestResult {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        self.kubelet.call(request).map(drop)
    }

    /// The file of its log.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// All output in its log.
    pub fn log_text(&self) -> TestResult<String> {
        text_of_log(&self.log)
    }

    /// The output in its log of one stream, `stdout` or `stderr`.
    pub fn log_text_of(&self, stream: &str) -> TestResult<String> {
        text_of(&self.log, &[stream])
    }

    /// Waits until its log contains `text`.
    pub fn wait_log(&self, text: &str) -> TestResult {
        self.kubelet
            .until(text, || Ok(self.log_text()?.contains(text).then_some(())))
    }
}

/// The text in a CRI log. Each line has a time, a stream, and whether it is partial (`P`) or full
/// (`F`).
pub fn text_of_log(path: &Path) -> TestResult<String> {
    text_of(path, &["stdout", "stderr"])
}

fn text_of(path: &Path, streams: &[&str]) -> TestResult<String> {
    let log = fs::read_to_string(path)
        .map_err(|error| failure(format!("read {}: {error}", path.display())))?;
    let mut text = String::new();
    for line in log.lines() {
        let mut parts = line.splitn(4, ' ');
        let (time, stream, tag) = (parts.next(), parts.next(), parts.next());
        let known = time.is_some_and(|time| time.contains('T'))
            && matches!(stream, Some("stdout" | "stderr"))
            && matches!(tag, Some("F" | "P"));
        if !known {
            return Err(failure(format!("{}: {line:?}", path.display())));
        }
        if !stream.is_some_and(|stream| streams.contains(&stream)) {
            continue;
        }
        text.push_str(parts.next().unwrap_or_default());
        if tag == Some("F") {
            text.push('\n');
        }
    }
    Ok(text)
}

fn exited() -> EnumOrUnknown<ContainerState> {
    ContainerState::CONTAINER_EXITED.into()
}
