//! One allow-list of system calls for a whole process; any other call kills it (seccomp(2)).
//!
//! The lists belong to the callers: only they know what they do.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads,
};

use crate::JailError;

/// Allows the system calls in `allowed` (numbers as in `libc::SYS_…`), and `ioctl` only with a
/// request in `ioctls`. Every other call ends the process with SIGSYS. This holds for all threads
/// and can't be undone. It needs no_new_privs.
pub fn install(allowed: &[i64], ioctls: &[u32]) -> Result<(), JailError> {
    let program = compile(allowed, ioctls, SeccompAction::KillProcess)
        .map_err(|why| failed("compile the seccomp filter", why))?;
    apply_filter_all_threads(&program).map_err(|why| failed("install the seccomp filter", why))
}

fn compile(
    allowed: &[i64],
    ioctls: &[u32],
    otherwise: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        allowed.iter().map(|call| (*call, Vec::new())).collect();
    if !ioctls.is_empty() {
        let requests = ioctls
            .iter()
            .map(|request| {
                // The kernel takes `cmd` as an unsigned int, so 32 bits are all of it.
                let is_it = SeccompCondition::new(
                    1,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    u64::from(*request),
                )?;
                SeccompRule::new(vec![is_it])
            })
            .collect::<Result<Vec<_>, _>>()?;
        rules.insert(libc::SYS_ioctl, requests);
    }
    let arch = TargetArch::x86_64;
    SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch)?.try_into()
}

fn failed(step: &'static str, why: impl std::fmt::Display) -> JailError {
    JailError::new(step, io::Error::other(why.to_string()))
}
