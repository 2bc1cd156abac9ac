//! A process, its kinds of threads, and a thread's list.

use std::collections::BTreeSet;

use rustix::process::Pid;

use crate::JailError;
use crate::seccomp::{Filter, Rule};

/// A process and its kinds of threads.
#[derive(Debug)]
pub struct Process {
    /// What the docs call it.
    pub name: &'static str,
    /// When its filters are closed.
    pub when: &'static str,
    /// Its kinds of threads.
    pub threads: &'static [&'static Thread],
}

/// A kind of thread.
#[derive(Debug, PartialEq, Eq)]
pub struct Thread {
    /// What the docs call it.
    pub name: &'static str,
    /// What it does.
    pub what: &'static str,
    /// What it may do.
    pub lists: &'static [&'static [Rule]],
}

impl Thread {
    /// All of its rules. One that is in several lists comes once, with its first reason.
    pub fn rules(&self) -> Vec<Rule> {
        let mut rules: Vec<Rule> = Vec::new();
        for rule in self.lists.iter().copied().flatten() {
            if !rules.iter().any(|known| known.is_like(rule)) {
                rules.push(*rule);
            }
        }
        rules
    }

    /// The system calls that it may make, by name.
    pub fn calls(&self) -> BTreeSet<&'static str> {
        let rules = self.rules();
        let made = rules.iter().filter(|rule| rule.is_made());
        made.map(Rule::name).collect()
    }

    /// Its list as the kernel takes it, for a thread of `process`. `more` is for tests and debug
    /// builds.
    pub fn filter(&self, process: Pid, more: &[Rule]) -> Result<Filter, JailError> {
        let mut rules = self.rules();
        let new: Vec<_> = more.iter().filter(|rule| !rules.contains(rule)).collect();
        rules.extend(new);
        Filter::new(self.name, &rules, process)
    }
}
