//! Each compiled list against what it was compiled from, for every call there can be.
//!
//! An interpreter of classic BPF reads the instructions as the kernel does (linux/bpf_common.h).

use rustix::process::{Pid, getpid};

use crate::lists::PROCESSES;
use crate::seccomp::{Answer, Check, Filter, Rule};

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
const NOT_LESS: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Architectures of calls (linux/audit.h), and the bit of the ABI x32.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const X32: u32 = 1 << 30;

const KILLED: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const MADE: u32 = libc::SECCOMP_RET_ALLOW;
const ABSENT: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// What the kernel makes of a call under this filter. `None`: it is no program that it would take.
fn verdict(filter: &Filter, architecture: u32, call: u32, arguments: [u64; 6]) -> Option<u32> {
    // `struct seccomp_data` in words: call, architecture, address, arguments.
    let mut data = vec![call, architecture, 0, 0];
    for argument in arguments {
        data.extend([argument as u32, (argument >> 32) as u32]);
    }
    let (mut at, mut accumulator) = (0, 0);
    // Jumps only go forward, so it ends.
    loop {
        let it = filter.program().get(at)?;
        let jump = |holds| usize::from(if holds { it.jt } else { it.jf });
        at += 1 + match u32::from(it.code) {
            LOAD => {
                accumulator = *data.get(it.k as usize / 4)?;
                0
            }
            AND => {
                accumulator &= it.k;
                0
            }
            JUMP => it.k as usize,
            EQUAL => jump(accumulator == it.k),
            GREATER => jump(accumulator > it.k),
            NOT_LESS => jump(accumulator >= it.k),
            RETURN => return Some(it.k),
            _ => return None,
        };
    }
}

/// What the rules of one call say.
fn said(rules: &[&Rule], process: Pid, arguments: &[u64; 6]) -> u32 {
    let holds = |check: &Check| {
        let (mask, values) = check.numbers(process);
        let bits = arguments[usize::from(check.argument)] as u32 & mask;
        values.iter().any(|value| value & mask == bits)
    };
    let answers = rules.iter().map(|rule| match rule.answer() {
        Answer::Allowed(checks) if checks.iter().all(holds) => MADE,
        Answer::Allowed(_) => KILLED,
        Answer::Absent => ABSENT,
    });
    // In the order of these numbers an answer goes before a call that is made, and that before the
    // end (seccomp(2)).
    answers.min().unwrap_or(KILLED)
}

/// Arguments at the edges of what the rules of one call say: each listed value, and each that
/// differs from one in one bit.
fn attempts(rules: &[&Rule], process: Pid) -> Vec<[u64; 6]> {
    let mut all = vec![[0; 6], [u64::MAX; 6]];
    for rule in rules {
        let Answer::Allowed(checks) = rule.answer() else {
            continue;
        };
        let mut good = [0; 6];
        for check in checks {
            good[usize::from(check.argument)] = check.numbers(process).1[0].into();
        }
        for check in checks {
            for value in check.numbers(process).1 {
                let value = u64::from(value);
                let others = (0..64).map(|bit| value ^ 1 << bit);
                for other in others.chain([value]) {
                    let mut arguments = good;
                    arguments[usize::from(check.argument)] = other;
                    all.push(arguments);
                }
            }
        }
    }
    all
}

/// All numbers that a call may have, on each of the ways into the kernel.
#[test]
fn each_filter_says_what_its_list_says() {
    let process = getpid();
    let threads = PROCESSES.iter().flat_map(|process| process.threads);
    for thread in threads {
        let (filter, rules) = (thread.filter(process, &[]).unwrap(), thread.rules());
        for call in 0..=1023_u32 {
            let rules: Vec<_> = rules
                .iter()
                .filter(|rule| rule.call() == i64::from(call))
                .collect();
            for arguments in attempts(&rules, process) {
                let verdict = |architecture, call| {
                    verdict(&filter, architecture, call, arguments).expect("a program")
                };
                let what = format!("{}: call {call} with {arguments:x?}", thread.name);
                let wanted = said(&rules, process, &arguments);
                assert_eq!(verdict(X86_64, call), wanted, "{what}");
                // A call that does not exist here does not exist there.
                let elsewhere = [KILLED, ABSENT];
                assert!(elsewhere.contains(&verdict(I386, call)), "{what}, of i386");
                assert_eq!(verdict(X86_64, call | X32), KILLED, "{what}, of x32");
            }
        }
    }
}
