//! Allow-lists of system calls; any other call kills the process (seccomp(2)).
//!
//! The lists belong to the callers: only they know what they do. A list is made of [`Rule`]s and
//! becomes a [`Filter`], which holds for one thread or for all. A second filter in a thread allows
//! nothing that its first one forbids.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads,
};

use crate::JailError;

/// A system call that a list allows, with any arguments or only with some.
///
/// Of several rules for one call one suffices. A call that is allowed with any arguments has one
/// rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule<'a> {
    call: i64,
    checks: &'a [Check<'a>],
}

impl<'a> Rule<'a> {
    /// Call `call` (a number as in `libc::SYS_…`) with any arguments.
    pub const fn any(call: i64) -> Self {
        Self { call, checks: &[] }
    }

    /// The call if all of `checks` hold; there must be one.
    pub const fn only(call: i64, checks: &'a [Check<'a>]) -> Self {
        Self { call, checks }
    }

    /// The call's number.
    pub const fn call(&self) -> i64 {
        self.call
    }
}

/// What must hold for one argument of a call.
///
/// The check is of the low 32 bits. For an argument that the kernel takes as an int, and for flags
/// and masks of that size, they are all that the kernel looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check<'a> {
    argument: u8,
    mask: u32,
    values: &'a [u32],
}

impl<'a> Check<'a> {
    /// The argument, from 0 to 5, is one of `values`: a request, a command, an option.
    pub const fn one_of(argument: u8, values: &'a [u32]) -> Self {
        Self::masked(argument, u32::MAX, values)
    }

    /// The argument's bits in `mask` are one of `values`: a file type of a mode.
    pub const fn masked(argument: u8, mask: u32, values: &'a [u32]) -> Self {
        Self {
            argument,
            mask,
            values,
        }
    }

    /// The argument has none of `bits`: a protection without `PROT_EXEC`.
    pub const fn without(argument: u8, bits: u32) -> Self {
        Self::masked(argument, bits, &[0])
    }
}

/// The threads that a filter holds for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling one, and those that it starts later.
    Calling,
    /// All of the process. Fails if one of them has a filter that the calling thread has not.
    All,
}

/// A list that the kernel can use.
#[derive(Clone, Debug)]
pub struct Filter(BpfProgram);

impl Filter {
    /// Allows what `rules` allow. Every other call ends the whole process with SIGSYS.
    pub fn new(rules: &[Rule]) -> Result<Self, JailError> {
        compile(rules)
            .map(Self)
            .map_err(|why| failed("compile the seccomp filter", why))
    }

    /// From now on the filter holds, and it can't be undone. Needs no_new_privs, or sets it.
    pub fn install(&self, threads: Threads) -> Result<(), JailError> {
        match threads {
            Threads::Calling => apply_filter(&self.0),
            Threads::All => apply_filter_all_threads(&self.0),
        }
        .map_err(|why| failed("install the seccomp filter", why))
    }
}

fn compile(rules: &[Rule]) -> Result<BpfProgram, BackendError> {
    let mut list: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        let known = list.contains_key(&rule.call);
        let ways = list.entry(rule.call).or_default();
        // Without ways the call is allowed whatever its arguments are: see the library's
        // SeccompFilter. So a rule beside such a one would change what it says.
        if known && (ways.is_empty() || rule.checks.is_empty()) {
            return Err(BackendError::EmptyRule);
        }
        if rule.checks.is_empty() {
            continue;
        }
        let more = alternatives(rule.checks)?;
        if more.is_empty() {
            return Err(BackendError::EmptyRule);
        }
        ways.extend(more);
    }
    let kill = SeccompAction::KillProcess;
    SeccompFilter::new(list, kill, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Every way to take one of the values of each check.
fn alternatives(checks: &[Check]) -> Result<Vec<SeccompRule>, BackendError> {
    let mut ways: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for check in checks {
        let mut longer = Vec::new();
        for value in check.values {
            let condition = SeccompCondition::new(
                check.argument,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::MaskedEq(check.mask.into()),
                u64::from(*value),
            )?;
            longer.extend(ways.iter().map(|way| {
                let mut way = way.clone();
                way.push(condition.clone());
                way
            }));
        }
        ways = longer;
    }
    ways.into_iter().map(SeccompRule::new).collect()
}

fn failed(step: &'static str, why: impl std::fmt::Display) -> JailError {
    JailError::new(step, io::Error::other(why.to_string()))
}
