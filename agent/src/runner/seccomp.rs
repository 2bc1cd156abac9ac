//! The container's seccomp filter. libseccomp compiles it before anything else. It is loaded just
//! before the command, or before the privileges go where loading needs them.
//!
//! Called by `init` and `exec`. As under runc, a stub before the rules answers ENOSYS to system
//! calls newer than any that the profile names. A profile with EPERM as its default would otherwise
//! break programs that try a new call first (clone3, faccessat2) and fall back on ENOSYS only.

use kata_like_failure::{Failure, Step};
use kata_like_spec::{NOTIFY, SECCOMP_FLAG};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg,
    LinuxSeccompFilterFlag as Flag, LinuxSeccompOperator as Operator, LinuxSyscall, Spec,
};

use super::error::Result;
use super::syscall;

/// System calls have this many arguments at most.
const ARGUMENTS: usize = 6;
/// From this many rules on, libseccomp's binary tree is worth its making.
const TREE_FROM: usize = 32;

/// A filter, ready to be loaded.
#[derive(Debug, Default)]
pub(super) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Compiles the profile of the spec, if it has one.
    pub(super) fn of(spec: &Spec) -> Result<Option<Self>> {
        let linux = spec.linux().as_ref();
        let profile = linux.and_then(|linux| linux.seccomp().as_ref());
        profile.map(Self::compile).transpose()
    }

    fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let default = action(
            profile.default_action(),
            profile.default_errno_ret(),
            "linux.seccomp.defaultAction",
        )?;
        let rules = profile.syscalls().as_deref().unwrap_or_default();
        let mut context =
            ScmpFilterContext::new(default).step(|| "make the container's seccomp filter")?;
        for architecture in profile.architectures().iter().flatten() {
            add_architecture(&mut context, *architecture)?;
        }
        if rules.iter().map(|rule| rule.names().len()).sum::<usize>() > TREE_FROM {
            // Older versions of the library do without.
            let _ = context.set_ctl_optimize(2);
        }
        for (index, rule) in rules.iter().enumerate() {
            add_rule(
                &mut context,
                rule,
                default,
                &format!("linux.seccomp.syscalls[{index}]"),
            )?;
        }
        let mut program = match default {
            ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_) => Vec::new(),
            _ => unknown_calls(profile),
        };
        program.extend(export(&context)?);
        Ok(Self {
            program,
            flags: flags(profile)?,
        })
    }

    /// Loads the filter for this process.
    pub(super) fn load(&self) -> Result<()> {
        syscall::seccomp_set_filter(&self.program, self.flags)
            .step(|| "load the container's seccomp filter")
    }
}

fn action(action: Action, value: Option<u32>, field: &str) -> Result<ScmpAction> {
    let value = value.unwrap_or(libc::EPERM.cast_unsigned());
    let value = u16::try_from(value)
        .map_err(|_| Failure::bad(field, format!("{value} is no error number")))?;
    Ok(match action {
        Action::ScmpActKill | Action::ScmpActKillThread => ScmpAction::KillThread,
        Action::ScmpActKillProcess => ScmpAction::KillProcess,
        Action::ScmpActTrap => ScmpAction::Trap,
        Action::ScmpActErrno => ScmpAction::Errno(value.into()),
        Action::ScmpActTrace => ScmpAction::Trace(value),
        Action::ScmpActLog => ScmpAction::Log,
        Action::ScmpActAllow => ScmpAction::Allow,
        Action::ScmpActNotify => {
            return Err(NOTIFY.of(format_args!("{field}: SCMP_ACT_NOTIFY")));
        }
    })
}

fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong> {
    let Some(listed) = profile.flags() else {
        return Ok(libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    };
    let mut flags = 0;
    for flag in listed {
        flags |= match flag {
            // There is one thread.
            Flag::SeccompFilterFlagTsync => 0,
            Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            Flag::SeccompFilterFlagWaitKillableRecv => {
                return Err(SECCOMP_FLAG.of("linux.seccomp.flags"));
            }
        };
    }
    Ok(flags)
}

fn add_architecture(context: &mut ScmpFilterContext, architecture: Arch) -> Result<()> {
    let step = || format!("linux.seccomp.architectures: add {architecture}");
    let known: ScmpArch = architecture.to_string().parse().step(step)?;
    if !context.is_arch_present(known).step(step)? {
        context.add_arch(known).step(step)?;
    }
    Ok(())
}

fn add_rule(
    context: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
    field: &str,
) -> Result<()> {
    let action = action(rule.action(), rule.errno_ret(), &format!("{field}.action"))?;
    if action == default {
        return Ok(());
    }
    let arguments = rule.args().as_deref().unwrap_or_default();
    let conditions = arguments
        .iter()
        .map(|argument| condition(argument, &format!("{field}.args")))
        .collect::<Result<Vec<_>>>()?;
    let repeated = (0..ARGUMENTS).any(|index| {
        arguments
            .iter()
            .filter(|argument| argument.index() == index)
            .count()
            > 1
    });
    for name in rule.names() {
        // A call that this machine does not have is no danger to it.
        let Ok(call) = ScmpSyscall::from_name(name) else {
            continue;
        };
        let step = || format!("{field}: add a rule for {name}");
        if repeated {
            // Several conditions on one argument can't be in one rule. Each becomes a rule, and any
            // of them matches.
            for condition in &conditions {
                context
                    .add_rule_conditional(action, call, &[*condition])
                    .step(step)?;
            }
        } else if conditions.is_empty() {
            context.add_rule(action, call).step(step)?;
        } else {
            context
                .add_rule_conditional(action, call, &conditions)
                .step(step)?;
        }
    }
    Ok(())
}

fn condition(argument: &LinuxSeccompArg, field: &str) -> Result<ScmpArgCompare> {
    let index = u32::try_from(argument.index())
        .ok()
        .filter(|_| argument.index() < ARGUMENTS)
        .ok_or_else(|| Failure::bad(field, format!("there is no argument {}", argument.index())))?;
    let (value, second) = (argument.value(), argument.value_two().unwrap_or(0));
    let (operator, datum) = match argument.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, value),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, value),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, value),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, value),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, value),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, value),
        Operator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(value), second),
    };
    Ok(ScmpArgCompare::new(index, operator, datum))
}

fn export(context: &ScmpFilterContext) -> Result<Vec<libc::sock_filter>> {
    use std::io::{Read, Seek};
    let step = || "write the container's seccomp filter";
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC).step(step)?;
    let mut memory = std::fs::File::from(memory);
    context.export_bpf(&memory).step(step)?;
    memory.rewind().step(step)?;
    let mut bytes = Vec::new();
    memory.read_to_end(&mut bytes).step(step)?;
    Ok(bytes
        .chunks_exact(size_of::<libc::sock_filter>())
        .map(|chunk| libc::sock_filter {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jt: chunk[2],
            jf: chunk[3],
            k: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect())
}

// Opcodes of classic BPF (linux/bpf_common.h).
const LOAD: u16 = 0x20; // a word of struct seccomp_data
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_SET: u16 = 0x45;
const RETURN: u16 = 0x06;
const RETURN_ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// x32's calls are those of x86-64 with this bit.
const X32_BIT: u32 = 0x4000_0000;

fn op(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Answers ENOSYS to calls newer than the newest one in the profile, for each architecture in it.
fn unknown_calls(profile: &LinuxSeccomp) -> Vec<libc::sock_filter> {
    let listed = profile.architectures().as_deref().unwrap_or_default();
    let newest = |wanted: &[Arch], architecture: ScmpArch| {
        wanted
            .iter()
            .any(|arch| listed.contains(arch))
            .then(|| newest(profile, architecture))?
    };
    let native: &[Arch] = &[Arch::ScmpArchNative, Arch::ScmpArchX86_64];
    let wide = newest(native, ScmpArch::X8664);
    let x32 = newest(&[Arch::ScmpArchX32], ScmpArch::X32);
    let narrow = newest(&[Arch::ScmpArchX86], ScmpArch::X86);

    let mut sections = Vec::new();
    if wide.is_some() || x32.is_some() {
        // A mode without rules of its own is left to the filter: no number is greater than this.
        let (wide, x32) = (wide.unwrap_or(u32::MAX), x32.unwrap_or(u32::MAX));
        sections.push((
            Arch::ScmpArchX86_64,
            vec![
                op(LOAD, 0, 0, 0),
                op(JUMP_IF_SET, X32_BIT, 1, 0),
                op(JUMP_IF_GREATER, wide, 1, 2),
                op(JUMP_IF_GREATER, x32, 0, 1),
                op(RETURN, RETURN_ENOSYS, 0, 0),
            ],
        ));
    }
    if let Some(narrow) = narrow {
        sections.push((
            Arch::ScmpArchX86,
            vec![
                op(LOAD, 0, 0, 0),
                op(JUMP_IF_GREATER, narrow, 0, 1),
                op(RETURN, RETURN_ENOSYS, 0, 0),
            ],
        ));
    }
    let mut program = Vec::new();
    // From the last section to the first: each ends with a jump over those that follow.
    for (architecture, mut section) in sections.into_iter().rev() {
        section.push(op(JUMP, program.len() as u32, 0, 0));
        let over = section.len() as u8; // seven at most
        section.insert(0, op(JUMP_IF_EQUAL, architecture as u32, 0, over));
        section.append(&mut program);
        program = section;
    }
    if !program.is_empty() {
        // A foreign architecture goes past all sections. The accumulator holds `arch` at offset 4.
        program.insert(0, op(LOAD, 4, 0, 0));
    }
    program
}

fn newest(profile: &LinuxSeccomp, architecture: ScmpArch) -> Option<u32> {
    profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(LinuxSyscall::names)
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, architecture).ok())
        // Negative: the architecture has no such call.
        .filter_map(|call| u32::try_from(call.as_raw_syscall()).ok())
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runner::error::refused;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    /// What the kernel would make of the filter for one call.
    fn verdict(filter: &Filter, arch: u32, call: u32, arguments: [u64; 6]) -> u32 {
        let mut data = vec![call, arch, 0, 0];
        for argument in arguments {
            data.extend([argument as u32, (argument >> 32) as u32]);
        }
        let (mut at, mut accumulator) = (0usize, 0u32);
        loop {
            let instruction = filter.program[at];
            let k = instruction.k;
            let mut jump = |yes: bool| {
                at += usize::from(if yes { instruction.jt } else { instruction.jf });
            };
            match instruction.code {
                LOAD => accumulator = data[k as usize / 4],
                JUMP => at += k as usize,
                JUMP_IF_EQUAL => jump(accumulator == k),
                JUMP_IF_GREATER => jump(accumulator > k),
                0x35 => jump(accumulator >= k),
                JUMP_IF_SET => jump(accumulator & k != 0),
                0x54 => accumulator &= k,
                RETURN => return k,
                other => panic!("{other:#x}"),
            }
            at += 1;
        }
    }

    const WIDE: u32 = Arch::ScmpArchX86_64 as u32;
    const NARROW: u32 = Arch::ScmpArchX86 as u32;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

    #[test]
    fn an_allow_list_denies_the_rest_and_does_not_know_what_is_newer() {
        let filter = Filter::compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ["read", "write", "no_such_call", "openat2"], "action": "SCMP_ACT_ALLOW"}]}"#,
        ))
        .unwrap();
        let verdict = |arch, call: u32| verdict(&filter, arch, call, [0; 6]);
        assert_eq!(
            verdict(WIDE, libc::SYS_read as u32),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(WIDE, libc::SYS_open as u32), EPERM);
        assert_eq!(
            verdict(WIDE, libc::SYS_openat2 as u32),
            libc::SECCOMP_RET_ALLOW
        );
        assert_eq!(verdict(WIDE, libc::SYS_faccessat2 as u32), RETURN_ENOSYS);
        assert_eq!(
            verdict(WIDE, X32_BIT | libc::SYS_faccessat2 as u32),
            RETURN_ENOSYS
        );
        assert_eq!(verdict(NARROW, 3), libc::SECCOMP_RET_ALLOW); // read
        assert_eq!(verdict(NARROW, 5), EPERM); // open
        assert_eq!(verdict(NARROW, 439), RETURN_ENOSYS); // faccessat2
        assert_eq!(verdict(0xc00000b7, 0), libc::SECCOMP_RET_KILL_THREAD); // not listed
    }

    #[test]
    fn arguments_are_compared() {
        let filter = Filter::compile(&profile(
            r#"{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [
                  {"names": ["personality"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38,
                   "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
                  {"names": ["clone"], "action": "SCMP_ACT_ERRNO",
                   "args": [{"index": 0, "value": 268435456, "valueTwo": 268435456, "op": "SCMP_CMP_MASKED_EQ"}]}]}"#,
        ))
        .unwrap();
        let call = |call: libc::c_long, argument| {
            verdict(&filter, WIDE, call as u32, [argument, 0, 0, 0, 0, 0])
        };
        assert_eq!(call(libc::SYS_personality, 8), RETURN_ENOSYS);
        assert_eq!(call(libc::SYS_personality, 0), libc::SECCOMP_RET_ALLOW);
        assert_eq!(call(libc::SYS_clone, 0x1000_0011), EPERM);
        assert_eq!(call(libc::SYS_clone, 0x11), libc::SECCOMP_RET_ALLOW);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (json, field) in [
            (
                r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#,
                "linux.seccomp.defaultAction",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls":
                 [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}"#,
                "linux.seccomp.syscalls[0].action",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO",
                 "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#,
                "linux.seccomp.syscalls[0].args",
            ),
            (
                r#"{"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]}"#,
                "linux.seccomp.flags",
            ),
        ] {
            let error = Filter::compile(&profile(json)).unwrap_err();
            assert_eq!(refused(&error), field);
        }
    }
}
