//! Why a report may differ from runc's. Each reason is a property of a machine of one's own.
//!
//! `docs/limitations.md` has the same list, under "What a container sees otherwise than under
//! runc". A reason explains a difference only if both values are exactly those that it is about.
//! `oci.rs` requires that each reason is seen, so the catalogue tests that the differences are
//! still these.

use serde_json::Value;

use super::compare::Difference;
use super::{Outcome, Pair};

/// One reason.
pub struct Reason {
    /// Its name in the tables, also in `docs/limitations.md`.
    pub name: &'static str,
    /// What differs, for the table.
    pub text: &'static str,
    explains: fn(&[&str], &Difference, &Reports) -> bool,
}

/// Both whole reports, for a reason that needs more than one value.
struct Reports<'a> {
    runc: &'a Value,
    ours: &'a Value,
}

impl Reports<'_> {
    /// The mount at a place under kata-like, or the one above it.
    fn mount_of(&self, place: &str) -> &Value {
        let mounts = &self.ours["places"]["mounts"];
        let mut at = place;
        while mounts[at].is_null() && at.len() > 1 {
            at = at
                .rsplit_once('/')
                .map_or("/", |(above, _)| if above.is_empty() { "/" } else { above });
        }
        &mounts[at]
    }
}

/// All mounts on a place, the first one first.
fn layers(report: &Value, place: &str) -> Vec<Value> {
    let mounts = &report["places"]["mounts"];
    let later = (2..).map(|number| &mounts[format!("{place} ({number})")]);
    let all = std::iter::once(&mounts[place]).chain(later);
    all.take_while(|mount| !mount.is_null()).cloned().collect()
}

/// All reasons.
pub const REASONS: [Reason; 8] = [
    Reason {
        name: "virtio-fs",
        text: "the root and the volumes are files of the host's that virtio-fs carries into the machine",
        explains: virtio_fs,
    },
    Reason {
        name: "propagation",
        text: "what is mounted on the host later does not reach the container: root, volumes and devices that are bound \
               are no slaves",
        explains: propagation,
    },
    Reason {
        name: "mounts in volumes",
        text: "what is mounted in a volume on the host is mounted in the guest when it is first looked into, \
               with the options of the volume",
        explains: mounts_in_volumes,
    },
    Reason {
        name: "nodes",
        text: "the file server has no right to make device nodes on the root and in volumes",
        explains: nodes,
    },
    Reason {
        name: "sysfs",
        text: "sysfs is made once for the machine and is writable; the mount in the container is read-only",
        explains: sysfs,
    },
    Reason {
        name: "kernel",
        text: "the guest's kernel is built for a virtual machine: it lacks what that has no use for",
        explains: kernel,
    },
    Reason {
        name: "first process",
        text: "the pause container runs nothing: where containers share its PID namespace, PID 1 is a process of the \
               agent's, of which nothing can be seen",
        explains: first_process,
    },
    Reason {
        name: "left out",
        text: "what the spec leaves out is taken from the guest: its limits, OOM score and cgroups",
        explains: left_out,
    },
];

/// The first reason that explains a difference.
pub fn reason_of(difference: &Difference, pair: &Pair) -> Option<usize> {
    let (Outcome::Report(runc), Outcome::Report(ours)) = (&pair.runc, &pair.ours) else {
        return None;
    };
    let reports = Reports { runc, ours };
    let path: Vec<_> = difference.path.iter().map(String::as_str).collect();
    REASONS
        .iter()
        .position(|reason| (reason.explains)(&path, difference, &reports))
}

/// Type, source and file-system options of a mount of files; everything else of it is equal.
fn virtio_fs(path: &[&str], _: &Difference, reports: &Reports) -> bool {
    let [
        "places",
        "mounts",
        place,
        "type" | "source" | "root" | "file system",
    ] = path
    else {
        return false;
    };
    let own = &reports.ours["places"]["mounts"][*place];
    reports.runc["places"]["mounts"][*place]["type"] == "tmpfs"
        && own["type"] == "virtiofs"
        && (own["source"] == "none" || own["source"] == "volumes")
}

fn propagation(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    let ["places", "mounts", place, "propagation"] = path else {
        return false;
    };
    let kind = &reports.mount_of(place)["type"];
    (kind == "virtiofs" || kind == "devtmpfs")
        && difference.runc == serde_json::json!(["master"])
        && difference.ours == serde_json::json!([])
}

fn mounts_in_volumes(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    match path {
        // Except for the host's mounts, the place has the same ones: none, or one that masks it.
        ["places", "mounts", place, ..] => {
            let place = place.split(" (").next().unwrap_or_default();
            let above = place.rsplit_once('/').map_or("", |(above, _)| above);
            let mut theirs = layers(reports.runc, place);
            let all = theirs.len();
            theirs.retain(|mount| mount["type"] != "tmpfs" || mount["source"] != "below");
            theirs.len() < all
                && theirs == layers(reports.ours, place)
                && reports.mount_of(above)["type"] == "virtiofs"
        }
        ["places", "files", place, "write"] => {
            let options = reports.mount_of(place)["options"]
                .as_str()
                .unwrap_or_default();
            reports.runc["places"]["mounts"][*place]["source"] == "below"
                && options.split(',').any(|option| option == "ro")
                && difference.runc == "created"
                && difference.ours == "EROFS"
        }
        _ => false,
    }
}

fn nodes(path: &[&str], difference: &Difference, _: &Reports) -> bool {
    matches!(path, ["attempts", "make a device in the root"])
        && difference.runc == "done"
        && difference.ours == "EPERM"
}

fn sysfs(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    let (runc, ours) = (&difference.runc, &difference.ours);
    match path {
        ["places", "mounts", "/sys", "file system"] => {
            reports.ours["places"]["mounts"]["/sys"]["type"] == "sysfs"
                && runc == "ro"
                && ours == "rw"
        }
        // The pod's first container has made the sysfs of its network read-only for all.
        ["places", "files", "/sys" | "/sys/firmware", "write"] => {
            runc == "EROFS" && ours == "EPERM"
        }
        _ => false,
    }
}

/// Files of /proc that belong to an option or device which the guest's kernel lacks.
const ABSENT: [&str; 4] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/sysrq-trigger",
    "/dev/core",
];

/// The options of a devtmpfs without its size, which follows from the machine's memory.
fn without_size(options: &Value) -> Vec<&str> {
    let sized = |option: &&str| option.starts_with("size=") || option.starts_with("nr_inodes=");
    let options = options.as_str().unwrap_or_default().split(',');
    options.filter(|option| !sized(option)).collect()
}

fn kernel(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    let (runc, ours) = (&difference.runc, &difference.ours);
    match path {
        // Memory and ports as devices: the guest has no driver that could refuse to open them.
        ["attempts", "device c 1:1" | "device c 1:4"] => {
            runc == "refused when opened" && ours == "allowed"
        }
        // CONFIG_ZSWAP
        ["places", "cgroup", "memory.zswap.max"] => runc == "max" && ours == "ENOENT",
        // CONFIG_CGROUP_FAVOR_DYNMODS
        ["places", "mounts", "/sys/fs/cgroup", "file system"] => {
            let text = ours.as_str().unwrap_or_default();
            text.strip_prefix("favordynmods,") == runc.as_str()
        }
        // Devices are bound, since a user namespace's root can't make any.
        ["places", "mounts", place, "file system"]
            if reports.ours["places"]["mounts"][*place]["type"] == "devtmpfs" =>
        {
            without_size(runc) == without_size(ours)
        }
        ["places", "files", place] => ABSENT.contains(place) && ours == "ENOENT",
        ["places", "mounts", place] | ["places", "devices", place] => {
            ABSENT.contains(place) && ours.is_null()
        }
        // The guest has no bus with devices.
        ["places", "files", "/proc/bus" | "/sys/firmware", "read"] => {
            runc == "names" && ours == "empty"
        }
        _ => false,
    }
}

fn first_process(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    let (runc, ours) = (&difference.runc, &difference.ours);
    match path {
        ["process", "pids", "/proc/1/comm"] => runc == "probe" && ours == "pause",
        _ if reports.ours["process"]["pids"]["/proc/1/comm"] != "pause" => false,
        ["process", "pids", _] => ours == "EACCES",
        ["process", "namespaces", _] => {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            text(runc).replace(", of PID 1", ", not of PID 1") == text(ours)
        }
        ["attempts", "join the mounts of PID 1"] => runc == "EPERM" && ours == "EACCES",
        _ => false,
    }
}

fn left_out(path: &[&str], difference: &Difference, reports: &Reports) -> bool {
    let (runc, ours) = (&difference.runc, &difference.ours);
    match path {
        ["process", "limits", "nproc"] => runc.is_string() && ours == "unlimited unlimited",
        ["process", "limits", "sigpending" | "nofile"] => runc.is_string() && ours.is_string(),
        // containerd's shim has a score of its own.
        ["process", "oom_score_adj"] => runc == "1" && ours == "0",
        // Without a cgroup namespace it is the machine's own mount.
        [
            "places",
            "mounts",
            "/sys/fs/cgroup",
            "source" | "file system",
        ] => reports.ours["process"]["namespaces"]["cgroup"] == "the machine's, of PID 1",
        ["process", "cgroup"] => {
            let (runc, ours) = (
                runc.as_str().unwrap_or_default(),
                ours.as_str().unwrap_or_default(),
            );
            runc.starts_with("0::/oracle/") && ours.starts_with("0::/_")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn reason(path: &[&str], runc: Value, ours: Value) -> Option<&'static str> {
        let difference = Difference {
            path: path.iter().map(ToString::to_string).collect(),
            runc,
            ours,
        };
        let mounts = |kind: &str, source: &str, options: &str| {
            json!({"places": {"mounts": {
                "/": {"type": kind, "source": source, "options": "rw"},
                "/data": {"type": kind, "source": source, "options": options},
                "/sys": {"type": "sysfs"},
                "/dev/null": {"type": "devtmpfs", "source": "udev"},
            }}})
        };
        let mut under_runc = mounts("tmpfs", "oracle", "ro");
        under_runc["places"]["mounts"]["/data/below"] = json!({"type": "tmpfs", "source": "below"});
        let pair = Pair {
            name: "a case",
            runc: Outcome::Report(under_runc),
            ours: Outcome::Report(mounts("virtiofs", "none", "ro")),
            took: Default::default(),
        };
        Some(REASONS[reason_of(&difference, &pair)?].name)
    }

    #[test]
    fn a_reason_explains_its_own_values_and_no_others() {
        let node = ["attempts", "make a device in the root"];
        assert_eq!(reason(&node, json!("done"), json!("EPERM")), Some("nodes"));
        assert_eq!(reason(&node, json!("done"), json!("EROFS")), None);
        assert_eq!(reason(&node, json!("EPERM"), json!("done")), None);
        let sysfs = ["places", "mounts", "/sys", "file system"];
        assert_eq!(reason(&sysfs, json!("ro"), json!("rw")), Some("sysfs"));
        assert_eq!(reason(&sysfs, json!("rw"), json!("ro")), None);
        let options = ["places", "mounts", "/data", "options"];
        assert_eq!(reason(&options, json!("ro"), json!("rw")), None);
    }

    #[test]
    fn a_mount_in_a_volume_is_as_the_volume_is() {
        let write = ["places", "files", "/data/below", "write"];
        assert_eq!(
            reason(&write, json!("created"), json!("EROFS")),
            Some("mounts in volumes")
        );
        assert_eq!(reason(&write, json!("created"), json!("EPERM")), None);
        let elsewhere = ["places", "files", "/opt", "write"];
        assert_eq!(reason(&elsewhere, json!("created"), json!("EROFS")), None);
    }

    #[test]
    fn a_mask_of_a_mount_in_a_volume_is_the_only_mount_there() {
        let below = json!({"type": "tmpfs", "source": "below", "file system": "rw"});
        let mask = json!({"type": "tmpfs", "source": "tmpfs", "file system": "ro"});
        let reason = |theirs: &Value, ours: &Value| {
            let pair = Pair {
                name: "a case",
                runc: Outcome::Report(json!({"places": {"mounts": {
                    "/data": {"type": "tmpfs"}, "/data/below": below, "/data/below (2)": theirs,
                }}})),
                ours: Outcome::Report(json!({"places": {"mounts": {
                    "/data": {"type": "virtiofs"}, "/data/below": ours,
                }}})),
                took: Default::default(),
            };
            let all = super::super::compare::differences(&pair);
            let of_below = all.iter().find(|one| one.path[2] == "/data/below");
            Some(REASONS[reason_of(of_below?, &pair)?].name)
        };
        assert_eq!(reason(&mask, &mask), Some("mounts in volumes"));
        assert_eq!(reason(&mask, &Value::Null), None);
        assert_eq!(
            reason(
                &mask,
                &json!({"type": "tmpfs", "source": "tmpfs", "file system": "rw"})
            ),
            None
        );
    }

    #[test]
    fn devices_that_are_bound_are_as_large_as_the_machine() {
        let null = ["places", "mounts", "/dev/null", "file system"];
        let runc = json!("inode64,mode=755,nr_inodes=9,rw,size=9k");
        let own = json!("inode64,mode=755,nr_inodes=5,rw,size=5k");
        assert_eq!(reason(&null, runc.clone(), own), Some("kernel"));
        let other = json!("mode=700,nr_inodes=9,rw,size=9k");
        assert_eq!(reason(&null, runc, other), None);
        let slave = ["places", "mounts", "/dev/null", "propagation"];
        assert_eq!(
            reason(&slave, json!(["master"]), json!([])),
            Some("propagation")
        );
        assert_eq!(reason(&slave, json!([]), json!(["master"])), None);
    }
}
