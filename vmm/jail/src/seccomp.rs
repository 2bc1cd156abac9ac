//! Allow-lists of system calls; any other call kills the process (seccomp(2)).
//!
//! A list is made of [`Rule`]s and becomes a [`Filter`], which holds for one thread or for all. A
//! second filter in a thread allows nothing that its first one forbids. Each rule says why it is
//! there: `kata-like jail` prints the lists of [`crate::lists`] with their reasons.

use std::collections::BTreeMap;
use std::io;

use rustix::process::Pid;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, apply_filter_all_threads, sock_filter,
};

use crate::JailError;
use crate::layers::{Layer, is_kept};

/// A system call that a list allows, with any arguments or only with some, or that it answers.
///
/// Of several rules for one call one suffices. A call that is allowed with any arguments has one
/// rule. See [`crate::rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    call: i64,
    name: &'static str,
    answer: Answer,
    reason: &'static str,
}

/// What becomes of a call that a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is made if all of these hold.
    Allowed(&'static [Check]),
    /// It is not made. The caller is told ENOSYS, as by a kernel that does not know the call.
    Absent,
}

/// Makes a [`Rule`] of the libc crate's name for a call and a reason: `rule!(SYS_read, "why")`
/// allows any arguments, `rule!(SYS_fcntl, CHECKS, "why")` those for which all checks hold.
#[macro_export]
macro_rules! rule {
    ($call:ident, $reason:expr) => {
        $crate::seccomp::Rule::allowed(libc::$call, stringify!($call), &[], $reason)
    };
    ($call:ident, $checks:expr, $reason:expr) => {
        $crate::seccomp::Rule::allowed(libc::$call, stringify!($call), $checks, $reason)
    };
}

/// Makes [`Value`]s of the libc crate's constants: `values![F_GETFL, F_SETFL]`.
#[macro_export]
macro_rules! values {
    ($($name:ident),+) => {
        &[$($crate::seccomp::Value::new(stringify!($name), libc::$name as u32)),+]
    };
}

impl Rule {
    /// Call number `call` of the libc crate's `name`, `SYS_…`, if all of `checks` hold.
    pub const fn allowed(
        call: i64,
        name: &'static str,
        checks: &'static [Check],
        reason: &'static str,
    ) -> Self {
        let answer = Answer::Allowed(checks);
        Self {
            call,
            name,
            answer,
            reason,
        }
    }

    /// Call number `call` is answered, but not made.
    pub const fn absent(call: i64, name: &'static str, reason: &'static str) -> Self {
        let answer = Answer::Absent;
        Self {
            call,
            name,
            answer,
            reason,
        }
    }

    /// The call's number.
    pub const fn call(&self) -> i64 {
        self.call
    }

    /// The call's name, as its manual page has it.
    pub fn name(&self) -> &'static str {
        self.name.trim_start_matches("SYS_")
    }

    /// What becomes of the call.
    pub const fn answer(&self) -> Answer {
        self.answer
    }

    /// Whether the call can be made at all.
    pub fn is_made(&self) -> bool {
        matches!(self.answer, Answer::Allowed(_))
    }

    /// Why the list has it.
    pub const fn reason(&self) -> &'static str {
        self.reason
    }

    /// Whether both say the same of the same call, for whatever reason.
    pub fn is_like(&self, other: &Self) -> bool {
        self.call == other.call && self.answer == other.answer
    }
}

/// A number that an argument may be, with the name that headers give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    /// Its name.
    pub name: &'static str,
    number: u32,
}

impl Value {
    /// See [`crate::values`].
    pub const fn new(name: &'static str, number: u32) -> Self {
        Self { name, number }
    }
}

/// What must hold for one argument of a call.
///
/// The check is of the low 32 bits. For an argument that the kernel takes as an int, and for flags
/// and masks of that size, they are all that the kernel looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Check {
    /// Which one, from 0 to 5.
    pub argument: u8,
    /// What it may be.
    pub may_be: MayBe,
}

/// What an argument may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayBe {
    /// One of these: a request, a command, an option.
    OneOf(&'static [Value]),
    /// In the bits of the first, one of these: a file type of a mode.
    Masked(Value, &'static [Value]),
    /// Anything that has none of these bits: a protection without `PROT_EXEC`.
    Without(&'static [Value]),
    /// The process itself, by its number.
    OwnProcess,
}

impl Check {
    /// The argument is one of `values`.
    pub const fn one_of(argument: u8, values: &'static [Value]) -> Self {
        let may_be = MayBe::OneOf(values);
        Self { argument, may_be }
    }

    /// The argument's bits in `mask` are one of `values`.
    pub const fn masked(argument: u8, mask: Value, values: &'static [Value]) -> Self {
        let may_be = MayBe::Masked(mask, values);
        Self { argument, may_be }
    }

    /// The argument has no bit of any of `values`.
    pub const fn without(argument: u8, values: &'static [Value]) -> Self {
        let may_be = MayBe::Without(values);
        Self { argument, may_be }
    }

    /// The argument is the number of the process that the filter is for.
    pub const fn own_process(argument: u8) -> Self {
        let may_be = MayBe::OwnProcess;
        Self { argument, may_be }
    }

    /// The mask, and the values under it.
    pub(crate) fn numbers(&self, process: Pid) -> (u32, Vec<u32>) {
        let all = |values: &[Value]| values.iter().map(|value| value.number).collect();
        match self.may_be {
            MayBe::OneOf(values) => (u32::MAX, all(values)),
            MayBe::Masked(mask, values) => (mask.number, all(values)),
            MayBe::Without(bits) => (bits.iter().fold(0, |sum, bit| sum | bit.number), vec![0]),
            MayBe::OwnProcess => (u32::MAX, vec![process.as_raw_pid().cast_unsigned()]),
        }
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
pub struct Filter {
    name: &'static str,
    program: BpfProgram,
}

impl Filter {
    /// Allows what `rules` allow, in a thread of `process`. Every other call ends the whole process
    /// with SIGSYS. `name` is that of the thread which it is for.
    pub fn new(name: &'static str, rules: &[Rule], process: Pid) -> Result<Self, JailError> {
        let program =
            compile(rules, process).map_err(|why| failed("compile the seccomp filter", why))?;
        Ok(Self { name, program })
    }

    /// Its instructions.
    #[cfg(test)]
    pub(crate) fn program(&self) -> &[sock_filter] {
        &self.program
    }

    /// From now on the filter holds, and it can't be undone. Needs no_new_privs, or sets it.
    pub fn install(&self, threads: Threads) -> Result<(), JailError> {
        if !is_kept(Layer::Filter(self.name)) {
            return Ok(());
        }
        match threads {
            Threads::Calling => apply_filter(&self.program),
            Threads::All => apply_filter_all_threads(&self.program),
        }
        .map_err(|why| failed("install the seccomp filter", why))
    }
}

fn compile(rules: &[Rule], process: Pid) -> Result<BpfProgram, BackendError> {
    let mut list: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut program = Vec::new();
    for rule in rules {
        let known = list.contains_key(&rule.call);
        let ways = list.entry(rule.call).or_default();
        let checks = match rule.answer {
            Answer::Allowed(checks) => checks,
            Answer::Absent => &[],
        };
        // Without ways the call is allowed whatever its arguments are: see the library's
        // SeccompFilter. So a rule beside such a one would change what it says.
        if known && (ways.is_empty() || checks.is_empty()) {
            return Err(BackendError::EmptyRule);
        }
        if rule.answer == Answer::Absent {
            program.extend(absent(rule.call));
        }
        if checks.is_empty() {
            continue;
        }
        let more = alternatives(checks, process)?;
        if more.is_empty() {
            return Err(BackendError::EmptyRule);
        }
        ways.extend(more);
    }
    let kill = SeccompAction::KillProcess;
    let list = SeccompFilter::new(list, kill, SeccompAction::Allow, TargetArch::x86_64)?;
    program.extend(BpfProgram::try_from(list)?);
    Ok(program)
}

/// What stands before a list for a call that is answered with ENOSYS, since a list of the library's
/// has one answer for all that it names. Its jumps are relative, so it may stand behind.
fn absent(call: i64) -> [sock_filter; 3] {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS; the call's number is word 0
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let instruction = |code, jf, k| sock_filter { code, jt: 0, jf, k };
    [
        instruction(LOAD_WORD, 0, 0),
        instruction(JUMP_IF_EQUAL, 1, call as u32), // a call's number has 32 bits
        instruction(RETURN, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32),
    ]
}

/// Every way to take one of the values of each check.
fn alternatives(checks: &[Check], process: Pid) -> Result<Vec<SeccompRule>, BackendError> {
    let mut ways: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for check in checks {
        let (mask, values) = check.numbers(process);
        let mut longer = Vec::new();
        for value in values {
            let condition = SeccompCondition::new(
                check.argument,
                SeccompCmpArgLen::Dword,
                SeccompCmpOp::MaskedEq(mask.into()),
                value.into(),
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
