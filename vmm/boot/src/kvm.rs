//! Opens `/dev/kvm` for a VMM. If that fails, says which layer of the machine withholds it.
//!
//! Called by the shim and the command line tool before a boot request. Most machines without KVM
//! are themselves virtual machines, and what must change is outside of them: so the error says
//! where.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The device that makes virtual machines.
pub const KVM: &str = "/dev/kvm";

/// Why there is no KVM.
#[derive(Debug, thiserror::Error)]
#[error("open {} to run virtual machines ({hint})", path.display())]
pub struct KvmUnavailable {
    path: PathBuf,
    hint: String,
    #[source]
    source: io::Error,
}

/// Opens the device at `path`, which is [`KVM`] except in tests.
pub fn open_kvm(path: &Path) -> Result<OwnedFd, KvmUnavailable> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map(OwnedFd::from).map_err(|source| {
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                let loaded = Path::new("/sys/class/misc/kvm").exists();
                missing(&text, loaded).to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                let uid = rustix::process::geteuid().as_raw();
                format!("uid {uid} may not, or the device cgroup or mount forbids it")
            }
            _ => "it is there, but does not work as KVM's device".to_owned(),
        };
        KvmUnavailable {
            path: path.into(),
            hint,
            source,
        }
    })
}

/// Which layer is missing on a machine without the device: the lowest one that does not give it.
fn missing(cpuinfo: &str, loaded: bool) -> &'static str {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .unwrap_or_default();
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    if loaded {
        "KVM is loaded, but /dev here has no node of it: in a container, pass the device in"
    } else if has("vmx") {
        "the CPU can: load the kernel module kvm_intel"
    } else if has("svm") {
        "the CPU can: load the kernel module kvm_amd"
    } else if has("hypervisor") {
        "this machine is a virtual one, and the host below it does not pass virtualisation on: \
         allow nested virtualisation there"
    } else {
        "this CPU has no virtualisation (vmx, svm), or the firmware has switched it off"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layer_that_lacks_it_is_named() {
        let with = |flags: &str| format!("processor\t: 0\nflags\t\t: fpu {flags} sse2\nbugs\t:\n");
        for (flags, loaded, words) in [
            ("vmx", false, "kvm_intel"),
            ("svm hypervisor", false, "kvm_amd"),
            ("hypervisor", false, "allow nested virtualisation"),
            ("svm_lock", false, "firmware"),
            ("vmx", true, "no node"),
        ] {
            let hint = missing(&with(flags), loaded);
            assert!(hint.contains(words), "{flags}: {hint}");
        }
        assert!(missing("", false).contains("firmware"));
    }

    #[test]
    fn an_error_has_step_object_layer_and_cause() {
        let directory = Path::new("/nonexistent/kvm");
        let line = kata_like_failure::one_line(&open_kvm(directory).unwrap_err());
        let begin = "open /nonexistent/kvm to run virtual machines (";
        assert!(line.starts_with(begin), "{line}");
        assert!(
            line.ends_with("): No such file or directory (os error 2)"),
            "{line}"
        );
    }
}
