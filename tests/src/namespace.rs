//! A network namespace of the test, like one that a plugin makes, and what a test does inside it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{Call, Host, TestResult, failure};

/// A named network namespace, deleted with the value.
pub struct Namespace(String);

impl Namespace {
    /// Makes a namespace whose loopback is up.
    pub fn new(host: &Host, stem: &str) -> TestResult<Self> {
        let namespace = Self(host.name(stem));
        ip(&format!("netns add {}", namespace.0))?;
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.0)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }

    /// The option of `ctr run` for it.
    pub fn option(&self) -> String {
        format!("network:{}", self.path().display())
    }

    /// Runs `ip` inside.
    pub fn ip(&self, arguments: &str) -> TestResult<String> {
        ip(&format!("-n {} {arguments}", self.0))
    }

    /// Does something in a thread inside it; its sockets stay there.
    pub fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> TestResult<T> + Send + 'static,
    ) -> TestResult<T> {
        inside(&self.path(), work)
    }

    /// Interfaces, and traffic control's rules for them.
    pub fn look(&self) -> TestResult<String> {
        let links = self.ip("-o link")?;
        let names: Vec<&str> = links
            .lines()
            .filter_map(|line| line.split(": ").nth(1))
            .collect();
        let mut tc = Command::new("tc");
        tc.args(["-n", &self.0, "qdisc", "show"]);
        Ok(format!("{names:?}\n{}", Call::new(tc).ok()?.text()))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&format!("netns delete {}", self.0));
    }
}

/// Does something in a thread inside the namespace of this file; its sockets stay there.
pub fn inside<T: Send + 'static>(
    namespace: &Path,
    work: impl FnOnce() -> TestResult<T> + Send + 'static,
) -> TestResult<T> {
    let file = File::open(namespace)?;
    let thread = thread::spawn(move || {
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
        work()
    });
    thread.join().map_err(|_| failure("a thread panicked"))?
}

/// Bytes that show a lost, doubled or swapped piece.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// Runs `ip` on the host.
fn ip(arguments: &str) -> TestResult<String> {
    let mut command = Command::new("ip");
    command.args(arguments.split(' '));
    Ok(Call::new(command).ok()?.text())
}
