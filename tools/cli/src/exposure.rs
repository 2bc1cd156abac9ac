//! What on this host lets one guest learn of another, or of the host, whatever kata-like does.
//!
//! Called by `host` for `check`. All of it is for the administrator to decide: a note says what is
//! so, what comes of it, and what changes it. Each is read from a file of the kernel's
//! (Documentation/ABI/testing); a file that is missing gives no note, unless that is the news.

use std::fs;
use std::path::Path;

/// The notes on the host whose root directory is `root`.
pub fn notes(root: &Path) -> Vec<String> {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let mut notes: Vec<String> = [
        read("sys/devices/system/cpu/smt/active").and_then(|text| threads(&text)),
        read("sys/kernel/mm/ksm/run").and_then(|text| same_page_merging(&text)),
        read("proc/swaps").and_then(|text| swap(&text)),
        read("sys/module/kvm_intel/parameters/nested").and_then(|text| nested("kvm_intel", &text)),
        read("sys/module/kvm_amd/parameters/nested").and_then(|text| nested("kvm_amd", &text)),
        landlock(&read("sys/kernel/security/lsm").unwrap_or_default()),
    ]
    .into_iter()
    .flatten()
    .collect();
    notes.extend(vulnerable(
        &root.join("sys/devices/system/cpu/vulnerabilities"),
    ));
    notes
}

/// kata-like gives no guest a core scheduling cookie (core-scheduling.rst).
fn threads(active: &str) -> Option<String> {
    (active.trim() == "1").then(|| {
        "note: two guests can run on one core at once (SMT is on, and kata-like does no core scheduling), where one may \
         learn of the other by the time that things take; boot with `nosmt` if the pods do not trust each other"
            .into()
    })
}

fn same_page_merging(run: &str) -> Option<String> {
    (run.trim() == "1").then(|| {
        "note: the host merges equal pages (KSM), by which one process learns what another one holds; \
         `echo 2 >/sys/kernel/mm/ksm/run` ends that"
            .into()
    })
}

/// The first line is the heading (proc_swaps(5)).
fn swap(swaps: &str) -> Option<String> {
    let names = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    let names: Vec<_> = names.collect();
    (!names.is_empty()).then(|| {
        format!(
            "note: what a guest holds in memory may be written to {} (swap), and stay there after its end; encrypt that, \
             or do without (`swapoff -a`)",
            names.join(", ")
        )
    })
}

fn nested(module: &str, parameter: &str) -> Option<String> {
    matches!(parameter.trim(), "1" | "Y").then(|| {
        format!(
            "note: KVM offers nested virtualisation ({module}.nested=1), which no pod uses; it is code that a guest can \
             do without: `options {module} nested=0` in /etc/modprobe.d"
        )
    })
}

fn landlock(modules: &str) -> Option<String> {
    let has_it = modules.trim().split(',').any(|module| module == "landlock");
    (!has_it).then(|| {
        "note: Landlock is not among this kernel's security modules (/sys/kernel/security/lsm), so pods lack that layer \
         of their jail; add it to the boot parameter `lsm=`"
            .into()
    })
}

/// A line for all that the kernel calls vulnerable.
fn vulnerable(folder: &Path) -> Option<String> {
    let mut found: Vec<String> = fs::read_dir(folder)
        .ok()?
        .flatten()
        .filter(|entry| {
            fs::read_to_string(entry.path()).is_ok_and(|text| text.contains("Vulnerable"))
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    found.sort_unstable();
    (!found.is_empty()).then(|| {
        format!(
            "note: this CPU leaks to guests what is not theirs, says the kernel: {}; see \
             /sys/devices/system/cpu/vulnerabilities, update the microcode, and boot without `mitigations=off`",
            found.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: [(&str, &str); 8] = [
        ("sys/devices/system/cpu/smt/active", "0\n"),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("proc/swaps", "Filename\t\tType\t\tSize\n"),
        ("sys/module/kvm_intel/parameters/nested", "N\n"),
        ("sys/module/kvm_amd/parameters/nested", "0\n"),
        (
            "sys/kernel/security/lsm",
            "lockdown,capability,landlock,yama",
        ),
        (
            "sys/devices/system/cpu/vulnerabilities/mds",
            "Mitigation: Clear CPU buffers; SMT vulnerable\n",
        ),
        (
            "sys/devices/system/cpu/vulnerabilities/meltdown",
            "Not affected\n",
        ),
    ];

    /// The notes on a host whose kernel says what [`FINE`] has, but for one file.
    fn with(path: &str, text: &str) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in FINE.into_iter().chain([(path, text)]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        notes(root.path())
    }

    fn note(path: &str, text: &str) -> String {
        let mut notes = with(path, text);
        assert_eq!(notes.len(), 1, "{notes:?}");
        notes.remove(0)
    }

    #[test]
    fn a_host_that_is_set_up_has_no_note() {
        assert_eq!(with(FINE[0].0, FINE[0].1), [""; 0]);
    }

    #[test]
    fn a_host_without_the_files_lacks_landlock_alone() {
        let root = tempfile::tempdir().unwrap();
        let notes = notes(root.path());
        assert!(
            matches!(&notes[..], [one] if one.contains("Landlock")),
            "{notes:?}"
        );
    }

    #[test]
    fn threads_of_a_core_are_told() {
        assert!(note("sys/devices/system/cpu/smt/active", "1\n").contains("nosmt"));
    }

    #[test]
    fn merged_pages_are_told() {
        assert!(note("sys/kernel/mm/ksm/run", "1\n").contains("KSM"));
        assert_eq!(with("sys/kernel/mm/ksm/run", "2\n"), [""; 0], "unmerged");
    }

    #[test]
    fn swap_is_told_by_its_names() {
        let text = "Filename Type Size\n/dev/sda2 partition 1\n/swap file 2\n";
        assert!(note("proc/swaps", text).contains("/dev/sda2, /swap"));
    }

    #[test]
    fn nested_virtualisation_is_told_by_its_module() {
        let path = "sys/module/kvm_intel/parameters/nested";
        assert!(note(path, "Y\n").contains("kvm_intel.nested=1"));
        assert!(note("sys/module/kvm_amd/parameters/nested", "1\n").contains("kvm_amd"));
    }

    #[test]
    fn a_missing_landlock_is_told() {
        assert!(note("sys/kernel/security/lsm", "capability,yama\n").contains("lsm="));
    }

    #[test]
    fn what_the_cpu_leaks_is_told_by_name() {
        let folder = "sys/devices/system/cpu/vulnerabilities";
        let line = note(&format!("{folder}/retbleed"), "Vulnerable\n");
        assert!(line.contains("retbleed"), "{line}");
        let line = note(&format!("{folder}/itlb_multihit"), "KVM: Vulnerable\n");
        assert!(line.contains("itlb_multihit"), "{line}");
    }
}
