//! A program hears of a write that can't be kept: at `write`, or at the latest at `close`, `fsync`
//! and `msync`.
//!
//! The same commands run under runc and under kata-like, on roots and volumes on small file systems
//! of the host, without room and within a project's quota. Their output and exit status must be
//! equal.

use std::fs;
use std::path::{Path, PathBuf};

use kata_like_tests::disk::Disk;
use kata_like_tests::oracle::RUNTIMES;
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::shim_pod::ShimPod;
use kata_like_tests::task::Streams;
use kata_like_tests::task_api::done;
use kata_like_tests::{Host, TestResult, failure, userland};

use containerd_shim_protos::types::mount::Mount;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

/// In MiB: what is left on a full disk, and what a quota allows.
const LEFT: u64 = 4;

/// Prints a line for each command that finds no room, with its exit status and the last words of
/// its error. `/source` has 12 MiB, for 4 of which there is room.
const NO_ROOM: &str = r#"
try() {
    what=$1; shift
    "$@" >/tmp/out 2>/tmp/err
    code=$?
    echo "$place $what: $code" $(sed 's/.*: //' /tmp/err | tail -n 1) $(tail -n 1 /tmp/out)
    rm -rf ./*
}
word=$(head -c 65536 /dev/zero | tr '\0' x)
git='/usr/bin/git init -q r && cd r && /usr/bin/git -c core.compression=0 --work-tree=/source add file'
export word HOME=/tmp
for place in /here /data; do
    cd $place
    try cat sh -c 'cat /source/file >f'
    try dd dd if=/source/file of=f bs=256k status=none
    try cp cp /source/file f
    try tar tar xf /source/tar
    try append sh -c 'for i in $(seq 200); do echo "$word" >>f || exit 3; done'
    try write /tool fill f 12582912
    try map /tool fill-map f 12582912
    try limit sh -c 'ulimit -f 64; exec dd if=/dev/zero of=f bs=1k count=100'
    [ ! -e /usr/bin/git ] || try git sh -c "$git"
    try far dd if=/dev/zero of=f bs=1 count=1 seek=17592186044416
done
"#;

/// What works once there is room, and what is read then.
const ROOM: &str = r#"
for place in /here /data; do
    cd $place
    cp /source/file f && cmp f /source/file && /tool fill g 1048576 >/tmp/out && rm f g && echo "$place works"
done
"#;

/// A file system below the containers.
struct Below {
    kind: &'static str,
    mib: u64,
    make: &'static [&'static str],
    options: &'static str,
    quota: bool,
}

/// xfs wants 300 MiB at least.
const BELOW: [Below; 5] = [
    Below {
        kind: "tmpfs",
        mib: 40,
        make: &[],
        options: "",
        quota: false,
    },
    Below {
        kind: "ext4",
        mib: 64,
        make: &["-q", "-m", "0"],
        options: "",
        quota: false,
    },
    Below {
        kind: "ext4",
        mib: 128,
        make: &["-q", "-O", "quota,project", "-E", "quotatype=prjquota"],
        options: "prjquota",
        quota: true,
    },
    Below {
        kind: "xfs",
        mib: 320,
        make: &["-q"],
        options: "",
        quota: false,
    },
    Below {
        kind: "btrfs",
        mib: 160,
        make: &["-q"],
        options: "",
        quota: false,
    },
];

/// Where a container's root and volume lie on a disk.
struct Place {
    upper: PathBuf,
    work: PathBuf,
    volume: PathBuf,
    /// Whether it has Debian's programs, such as git.
    userland: bool,
}

impl Place {
    fn make(within: &Path, userland: bool) -> TestResult<Self> {
        let [upper, work, volume] = ["upper", "work", "volume"].map(|name| within.join(name));
        for directory in [&upper.join("here"), &work, &volume] {
            fs::create_dir_all(directory)?;
        }
        Ok(Self {
            upper,
            work,
            volume,
            userland,
        })
    }

    fn options(&self, lower: &Path) -> [String; 3] {
        [
            format!("lowerdir={}", lower.display()),
            format!("upperdir={}", self.upper.display()),
            format!("workdir={}", self.work.display()),
        ]
    }

    /// A spec's mounts: the volume, the source, the tool, and a place for output that is never
    /// full.
    fn mounts(&self, source: &Path, tool: &Tool) -> TestResult<Vec<Value>> {
        let bind = |from: &Path, to: &str, how: &str| json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", how]});
        let mut mounts = vec![
            bind(&self.volume, "/data", "rw"),
            bind(source, "/source", "ro"),
            bind(tool.path(), TOOL, "ro"),
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]}),
        ];
        if self.userland {
            for (from, to) in [("", "/usr"), ("lib", "/lib"), ("lib64", "/lib64")] {
                mounts.push(bind(&userland::path(from)?, to, "ro"));
            }
        }
        Ok(mounts)
    }
}

/// Runs scripts one after the other, with a step in between, in a container of one of the runtimes.
struct Both<'a> {
    host: &'a Host,
    pod: &'a ShimPod<'a>,
    source: &'a Path,
    tool: &'a Tool,
}

impl Both<'_> {
    fn spec(&self, place: &Place) -> TestResult<Value> {
        let mut spec = self.pod.spec(&["sleep", "1000"]);
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.extend(place.mounts(self.source, self.tool)?);
        }
        Ok(spec)
    }

    fn kata_like(
        &self,
        place: &Place,
        scripts: [&str; 2],
        between: impl FnOnce() -> TestResult,
    ) -> TestResult<[String; 2]> {
        let task = self.pod.task("full");
        let created = task.create_with(&self.spec(place)?, &Streams::default(), |request| {
            request.rootfs.push(Mount {
                type_: "overlay".into(),
                source: "overlay".into(),
                options: place.options(self.pod.root()).into(),
                ..Default::default()
            });
            let bundle = Path::new(&request.bundle).join("rootfs");
            let _ = fs::create_dir(bundle);
        })?;
        done(created)?;
        done(task.start("")?)?;
        let first = task.output(scripts[0])?;
        between()?;
        let second = task.output(scripts[1])?;
        task.end()?;
        Ok([first, second])
    }

    fn runc(
        &self,
        place: &Place,
        scripts: [&str; 2],
        between: impl FnOnce() -> TestResult,
    ) -> TestResult<[String; 2]> {
        let id = self.host.name("full-runc");
        let root = self.pod.files().join(&id);
        fs::create_dir(&root)?;
        let options = std::ffi::CString::new(place.options(self.pod.root()).join(","))?;
        mount(
            "overlay",
            &root,
            "overlay",
            MountFlags::empty(),
            options.as_c_str(),
        )?;
        let result = self.runc_in(&id, &root, place, scripts, between);
        unmount(&root, UnmountFlags::DETACH)?;
        result
    }

    fn runc_in(
        &self,
        id: &str,
        root: &Path,
        place: &Place,
        scripts: [&str; 2],
        between: impl FnOnce() -> TestResult,
    ) -> TestResult<[String; 2]> {
        let mut spec = self.spec(place)?;
        spec["root"]["path"] = root.display().to_string().into();
        spec["linux"]["cgroupsPath"] = format!("/{id}").into();
        spec["annotations"] = json!({});
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            for namespace in namespaces {
                namespace.as_object_mut().map(|it| it.remove("path"));
            }
        }
        let config = root.with_extension("json");
        fs::write(&config, spec.to_string())?;
        let config = config.display().to_string();
        let pod = kata_like_tests::CtrContainer::new(self.host, id.to_owned());
        let run = [
            "run",
            "-d",
            "--runtime",
            RUNTIMES[0],
            "--config",
            &config,
            id,
        ];
        self.host.ctr(run).ok()?;
        let output = |script: &str| -> TestResult<String> {
            Ok(pod.exec_call(&[], &["sh", "-c", script]).output()?.text())
        };
        let first = output(scripts[0])?;
        between()?;
        let second = output(scripts[1])?;
        pod.remove()?;
        Ok([first, second])
    }
}

/// The lines of a whole run on one kind of file system, without room and with it.
fn lines(both: &Both, below: &Below, ours: bool) -> TestResult<[String; 2]> {
    let disk = Disk::new(both.host, below.kind, below.mib, below.make, below.options)?;
    let within = disk.path().join("project");
    fs::create_dir(&within)?;
    if below.quota {
        disk.limit(&within, LEFT)?;
    }
    let place = Place::make(&within, below.kind == "ext4" && !below.quota)?;
    if !below.quota {
        disk.fill(LEFT as usize)?;
    }
    let between = || match below.quota {
        true => disk.limit(&within, 0),
        false => disk.make_room(),
    };
    let scripts = [NO_ROOM, ROOM];
    match ours {
        true => both.kata_like(&place, scripts, between),
        false => both.runc(&place, scripts, between),
    }
}

#[test]
fn no_room_is_told_to_who_writes() -> TestResult {
    let host = Host::shared()?;
    let pod = ShimPod::start(&host)?;
    let tool = Tool::new(&host)?;
    let source = pod.files().join("source");
    fs::create_dir(&source)?;
    // Bytes that no program can compress.
    let words = (1..=3 << 19).map(|at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(source.join("file"), bytes)?;
    let mut tar = std::process::Command::new("tar");
    tar.current_dir(&source).args(["cf", "tar", "file"]);
    kata_like_tests::Call::new(tar).ok()?;
    let both = Both {
        host: &host,
        pod: &pod,
        source: &source,
        tool: &tool,
    };
    let mut differences = Vec::new();
    for below in &BELOW {
        let [ours, wanted] = [lines(&both, below, true)?, lines(&both, below, false)?];
        let what = format!("{}{}", below.kind, if below.quota { ", quota" } else { "" });
        println!("{what}: {}\n{}", wanted[0], wanted[1]);
        if wanted[1] != "/here works\n/data works" || !wanted[0].contains("cat: 1 ") {
            differences.push(format!("{what}: runc itself: {wanted:?}"));
        }
        for (ours, wanted) in ours.iter().zip(&wanted) {
            for (ours, wanted) in ours.lines().zip(wanted.lines()) {
                if ours != wanted {
                    differences.push(format!("{what}: {ours:?}, under runc {wanted:?}"));
                }
            }
            if ours.lines().count() != wanted.lines().count() {
                differences.push(format!("{what}: {ours:?}, under runc {wanted:?}"));
            }
        }
    }
    pod.remove()?;
    match differences.is_empty() {
        true => Ok(()),
        false => Err(failure(differences.join("\n"))),
    }
}
