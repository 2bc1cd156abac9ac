//! The SELinux label that the pod's VMM and fs server run under.
//!
//! containerd's CRI plugin gives a pod a label of its own where the host has SELinux and the plugin
//! uses it (`enable_selinux`); to a runtime of virtual machines it gives the one for those
//! (`kvm_process` of the policy's `lxc_contexts`), with the categories of the pod's files. The
//! guest has no SELinux: the label confines what of the pod runs on the host. Called by `pod`;
//! `spawn` sets the label, so that the programs begin under it.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::io::Errno;

use kata_like_failure::Failure;

/// There where the kernel has SELinux and somebody has mounted its files, as who loads a policy
/// does.
const ENFORCE: &str = "/sys/fs/selinux/enforce";

/// The extended attribute that is a file's label.
const ATTRIBUTE: &str = "security.selinux";

/// The end of an error.
const CURE: &str =
    "`selinux = false` in /etc/kata-like/config.toml runs VMM and fs server under the shim's label";

/// What a pod's spec names of SELinux.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Labels {
    /// Of its processes: `process.selinuxLabel`.
    pub process: Option<String>,
    /// Of its files: `linux.mountLabel`.
    pub file: Option<String>,
}

impl Labels {
    /// What holds on this host: nothing where it has no SELinux, or the configuration wants none.
    pub fn on_this_host(self, wanted: bool) -> Self {
        match wanted && Path::new(ENFORCE).exists() {
            true => self,
            false => Self::default(),
        }
    }

    /// Gives a file that was made for VMM or fs server the label of the pod's files. Where that
    /// can't be, the policy may still let them use it: only a line in the log.
    pub fn mark(&self, what: &str, file: impl AsFd) {
        let (Some(_), Some(label)) = (&self.process, &self.file) else {
            return;
        };
        // By its path, for a descriptor may be one of O_PATH.
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        let flags = rustix::fs::XattrFlags::empty();
        if let Err(errno) = rustix::fs::setxattr(path, ATTRIBUTE, label.as_bytes(), flags) {
            tracing::warn!("give the {what} the SELinux label {label}: {errno}");
        }
    }

    /// An error of the start of what runs under the label, which the policy may be the cause of:
    /// names label and cure.
    pub fn blame(&self, error: Failure) -> Failure {
        match &self.process {
            None => error,
            Some(label) => error.during(format!(
                "run VMM and fs server under the SELinux label {label}, as process.selinuxLabel asks (where the policy of \
                 this host refuses that, `ausearch -m avc` tells what it lacks; {CURE})"
            )),
        }
    }

    /// The same for what the guest was refused: it reaches only such files of the host's as the
    /// label may use.
    pub fn blame_files(&self, error: Failure) -> Failure {
        let refused = Errno::ACCESS.to_string();
        match &self.process {
            Some(label) if error.one_line().contains(&refused) => error.during(format!(
                "use the files of the host under the SELinux label {label} (a volume needs a label that this one may use: \
                 `ausearch -m avc` tells which has not; {CURE})"
            )),
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kata_like_failure::Kind;

    #[test]
    fn only_an_error_under_a_label_names_it() {
        let labels = Labels {
            process: Some("a:b:c:s0".into()),
            file: None,
        };
        assert_eq!(labels.clone().on_this_host(false), Labels::default());
        let error = || Failure::new(Kind::Failed, "start the VMM");
        let line = labels.blame(error()).one_line();
        assert!(line.starts_with("run VMM and fs server under the SELinux label a:b:c:s0, "));
        assert!(line.contains("`selinux = false`") && line.ends_with(": start the VMM"));
        assert_eq!(Labels::default().blame(error()).one_line(), "start the VMM");

        assert_eq!(labels.blame_files(error()).one_line(), "start the VMM");
        let error = || Failure::failed("look", std::io::Error::from(Errno::ACCESS));
        let line = labels.blame_files(error()).one_line();
        assert!(line.contains(" a:b:c:s0 ") && line.contains("`selinux = false`"));
        assert!(
            !Labels::default()
                .blame_files(error())
                .one_line()
                .contains("SELinux")
        );
    }
}
