//! Who the container's process is: limits, user, groups, capabilities, and what it can never gain
//! again.
//!
//! Called by `init`, `exec` and `placeholder` in the container's process, in runc's order. What
//! needs privileges comes before they go. A filter that may be loaded without them is loaded last
//! of all, by the caller.

use std::ffi::CString;
use std::io;
use std::os::fd::AsFd;

use kata_like_failure::{Failure, Step};
use oci_spec::runtime::{Capabilities, LinuxCapabilities, PosixRlimit, PosixRlimitType, Process};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set,
    remove_capability_from_bounding_set, set_keep_capabilities, set_no_new_privs,
};

use super::error::Result;
use super::seccomp::Filter;
use super::syscall;

/// The permission "search" of a key, for its owner and for others (linux/key.h: KEY_USR_SEARCH,
/// KEY_OTH_SEARCH).
const OWNER_SEARCHES: u32 = 0x8_0000;
const OTHERS_SEARCH: u32 = 0x8;

/// The highest number of a user or group. Beyond it they would be negative somewhere.
const HIGHEST_ID: u32 = i32::MAX.cast_unsigned();

/// A process's user and rights, checked.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) uid: u32,
    gid: u32,
    groups: Vec<u32>,
    umask: u32,
    no_new_privileges: bool,
    limits: Vec<(Resource, Rlimit, PosixRlimitType)>,
    bounding: CapabilitySet,
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

impl Identity {
    /// Checks the process's own fields. `field` is its path in the spec. `capabilities` and
    /// `limits` may be those of the container where an exec has none.
    pub(super) fn of(
        process: &Process,
        capabilities: Option<&LinuxCapabilities>,
        limits: &[PosixRlimit],
        field: &str,
    ) -> Result<Self> {
        let user = process.user();
        let groups = user.additional_gids().clone().unwrap_or_default();
        for (name, ids) in [
            ("uid", &[user.uid()][..]),
            ("gid", &[user.gid()][..]),
            ("additionalGids", &groups[..]),
        ] {
            if let Some(id) = ids.iter().find(|&&id| id > HIGHEST_ID) {
                return Err(Failure::bad(
                    format!("{field}.user.{name}"),
                    format!("{id} is not in the range 0-{HIGHEST_ID}"),
                ));
            }
        }
        let umask = user.umask().unwrap_or(0o022);
        if umask > 0o777 {
            return Err(Failure::bad(
                format!("{field}.user.umask"),
                format!("{umask:#o} is no umask"),
            ));
        }
        let mut checked: Vec<(Resource, Rlimit, PosixRlimitType)> = Vec::new();
        for (index, limit) in limits.iter().enumerate() {
            let field = || format!("{field}.rlimits[{index}]");
            let kind = limit.typ();
            if limit.soft() > limit.hard() {
                return Err(Failure::bad(field(), "soft is above hard"));
            }
            if checked.iter().any(|(_, _, earlier)| *earlier == kind) {
                return Err(Failure::bad(field(), format!("a second entry for {kind}")));
            }
            let value = |value: u64| (value != u64::MAX).then_some(value);
            let limit = Rlimit {
                current: value(limit.soft()),
                maximum: value(limit.hard()),
            };
            checked.push((resource(kind), limit, kind));
        }
        let set = |of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            set(capabilities.and_then(|capabilities| of(capabilities).as_ref()))
        };
        Ok(Self {
            uid: user.uid(),
            gid: user.gid(),
            groups,
            umask,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            limits: checked,
            bounding: set(LinuxCapabilities::bounding),
            effective: set(LinuxCapabilities::effective),
            permitted: set(LinuxCapabilities::permitted),
            inheritable: set(LinuxCapabilities::inheritable),
            ambient: set(LinuxCapabilities::ambient),
        })
    }

    /// Whether a filter may be loaded after the privileges are gone.
    pub(super) fn loads_filter_last(&self) -> bool {
        self.no_new_privileges
    }

    /// Takes this identity on. Where loading the filter needs a privilege, it is loaded on the way.
    /// `cwd` is entered with the privileges and, where that is not permitted, as the user.
    pub(super) fn assume(&self, filter: Option<&Filter>, cwd: &std::path::Path) -> Result<()> {
        for (resource, limit, kind) in &self.limits {
            rustix::process::setrlimit(*resource, *limit).step(|| format!("set limit {kind}"))?;
        }
        rustix::process::umask(rustix::fs::Mode::from(self.umask));
        own_streams(self.uid)?;
        if self.no_new_privileges {
            set_no_new_privs(true).step(|| "set no_new_privs")?;
        } else if let Some(filter) = filter {
            filter.load()?;
        }
        self.drop_bounding()?;
        set_keep_capabilities(true).step(|| "keep capabilities over setuid")?;
        let entered = enter(cwd);
        self.change_user()?;
        match entered {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => enter(cwd),
            result => result,
        }
        .step(|| format!("chdir to cwd ({cwd:?}) set in config.json failed"))?;
        set_keep_capabilities(false).step(|| "forget about keeping capabilities")?;
        self.set_capabilities()
    }

    /// Drops the capabilities that this identity does not have. Nothing else changes.
    pub(super) fn limit_capabilities(&self) -> Result<()> {
        self.drop_bounding()?;
        self.set_capabilities()
    }

    fn drop_bounding(&self) -> Result<()> {
        // All that the kernel has, not only those that this program knows by name.
        for number in 0..u64::BITS {
            // We ask the kernel how many there are: that needs no file of the container's.
            let capability = CapabilitySet::from_bits_retain(1 << number);
            let Ok(true) = capability_is_in_bounding_set(capability) else {
                continue;
            };
            if !self.bounding.contains(capability) {
                remove_capability_from_bounding_set(capability)
                    .step(|| format!("drop capability {number} from the bounding set"))?;
            }
        }
        Ok(())
    }

    fn change_user(&self) -> Result<()> {
        let groups: Vec<_> = self
            .groups
            .iter()
            .map(|&group| rustix::fs::Gid::from_raw(group))
            .collect();
        rustix::thread::set_thread_groups(&groups).step(|| "set the supplementary groups")?;
        rustix::thread::set_thread_gid(rustix::fs::Gid::from_raw(self.gid))
            .step(|| format!("become group {}", self.gid))?;
        rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(self.uid))
            .step(|| format!("become user {}", self.uid))
    }

    fn set_capabilities(&self) -> Result<()> {
        let known = known_capabilities();
        let sets = CapabilitySets {
            effective: self.effective & known,
            permitted: self.permitted & known,
            inheritable: self.inheritable & known,
        };
        rustix::thread::set_capabilities(None, sets).step(|| "set the capabilities")?;
        rustix::thread::clear_ambient_capability_set().step(|| "clear the ambient capabilities")?;
        for capability in (self.ambient & known).iter() {
            rustix::thread::configure_capability_in_ambient_set(capability, true)
                .step(|| format!("raise the ambient capability {capability:?}"))?;
        }
        Ok(())
    }
}

/// The capabilities that the kernel has. Nobody can give others, even if the spec lists them.
fn known_capabilities() -> CapabilitySet {
    (0..u64::BITS)
        .map(|number| CapabilitySet::from_bits_retain(1 << number))
        .filter(|&capability| capability_is_in_bounding_set(capability).is_ok())
        .fold(CapabilitySet::empty(), |known, one| known | one)
}

fn set(listed: Option<&Capabilities>) -> CapabilitySet {
    listed
        .into_iter()
        .flatten()
        .fold(CapabilitySet::empty(), |set, capability| {
            // Both crates take the names from linux/capability.h.
            let name = format!("CAP_{capability}").replace("CAP_CAP_", "CAP_");
            match name.parse::<caps::Capability>() {
                Ok(known) => set | CapabilitySet::from_bits_retain(1 << known.index()),
                Err(_) => set,
            }
        })
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Enters the working directory, which must be inside the root.
fn enter(cwd: &std::path::Path) -> io::Result<()> {
    rustix::process::chdir(cwd)?;
    let reached = rustix::process::getcwd(Vec::new())?;
    if reached.to_bytes().first() != Some(&b'/') {
        return Err(io::Error::other("it is outside of the container's root"));
    }
    Ok(())
}

/// Gives the streams to the user, who may then open them again by /dev/stdout, as a file of its
/// own.
fn own_streams(uid: u32) -> Result<()> {
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    for stream in streams {
        let stream = stream.as_fd();
        let step = || "give the standard streams to the user";
        let status = rustix::fs::fstat(stream).step(step)?;
        if is_null(&status) || status.st_uid == uid {
            continue;
        }
        match rustix::fs::fchown(stream, Some(rustix::fs::Uid::from_raw(uid)), None) {
            // Some files have no owner to change. What can be done with them stays the same.
            Ok(())
            | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM | rustix::io::Errno::ROFS) => {
            }
            Err(error) => return Err(error).step(step),
        }
    }
    Ok(())
}

/// Whether a stream is /dev/null, which stays everybody's.
pub(super) fn is_null(status: &rustix::fs::Stat) -> bool {
    status.st_rdev == rustix::fs::makedev(1, 3)
}

/// Makes a session keyring of the container's own, in place of the agent's, that execs may search
/// for. With `users` of another namespace all but its owner may, as under runc.
pub(super) fn make_keyring(container: &str, users: bool) -> Result<()> {
    let Some(key) = join_keyring(container)? else {
        return Ok(());
    };
    let step = || "let the container's session keyring be found";
    let description = syscall::describe_key(key).step(step)?;
    let permissions = description
        .split(';')
        .nth(3)
        .and_then(|permissions| u32::from_str_radix(permissions, 16).ok())
        .ok_or_else(|| Failure::failed(step(), format!("{description:?}")))?;
    let searchable = if users { OTHERS_SEARCH } else { OWNER_SEARCHES };
    syscall::set_key_permissions(key, permissions | searchable).step(step)
}

/// Joins the session keyring of the container by its name, or makes it. `None`: the kernel has no
/// keys, so there are none to leak.
pub(super) fn join_keyring(container: &str) -> Result<Option<libc::c_long>> {
    let name = CString::new(format!("_ses.{container}"))
        .step(|| "name the container's session keyring")?;
    match syscall::join_session_keyring(&name) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(None),
        result => result
            .map(Some)
            .step(|| "join the container's session keyring"),
    }
}

/// Sets how the kernel ranks the process when memory runs out. This comes before the birth: the
/// agent's own rank, which the process would inherit, keeps it from ever being chosen.
pub(super) fn set_oom_score(score: i32) -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .step(|| format!("set oom_score_adj to {score}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(json: &str) -> Process {
        serde_json::from_str(json).unwrap()
    }

    fn identity(json: &str) -> Result<Identity> {
        let process = process(json);
        let limits = process.rlimits().clone().unwrap_or_default();
        Identity::of(
            &process,
            process.capabilities().as_ref(),
            &limits,
            "process",
        )
    }

    #[test]
    fn ids_that_would_wrap_are_refused() {
        for id in [1u32 << 31, u32::MAX] {
            let error = identity(&format!(
                r#"{{"cwd": "/", "user": {{"uid": {id}, "gid": 0}}}}"#
            ))
            .unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("process.user.uid: {id} is not in the range 0-2147483647")
            );
        }
    }

    #[test]
    fn capabilities_have_their_kernel_numbers() {
        let identity = identity(
            r#"{"cwd": "/", "user": {"uid": 0, "gid": 0}, "capabilities":
                {"bounding": ["CAP_CHOWN", "CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE"], "ambient": ["CAP_SYSLOG"]}}"#,
        )
        .unwrap();
        assert_eq!(identity.bounding.bits(), 1 | 1 << 13 | 1 << 40);
        assert_eq!(identity.ambient.bits(), 1 << 34);
        assert!(identity.effective.is_empty());
    }

    #[test]
    fn limits_are_checked() {
        let limit = |soft, hard| {
            identity(&format!(
                r#"{{"cwd": "/", "user": {{"uid": 0, "gid": 0}},
                    "rlimits": [{{"type": "RLIMIT_NOFILE", "soft": {soft}, "hard": {hard}}}]}}"#
            ))
        };
        assert_eq!(limit(5u64, u64::MAX).unwrap().limits[0].1.maximum, None);
        assert_eq!(
            limit(6, 5).unwrap_err().one_line(),
            "process.rlimits[0]: soft is above hard"
        );
    }
}
