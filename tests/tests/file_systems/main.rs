//! The host's file systems in a container: which are carried, which are the guest's own, which are
//! refused, and what the carried ones can do, beside runc.
//!
//! These tests read `docs/file-systems.md` and try each line of its tables, unless the line says
//! that it was not tried.

mod kinds;
mod page;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kata_like_tests::oracle::RUNTIMES;
use kata_like_tests::probe::{TOOL, Tool};
use kata_like_tests::process::until;
use kata_like_tests::volume::bind;
use kata_like_tests::{
    Call, CtrContainer, Directory, Host, IMAGE, TestResult, failure, kata_like_only,
};

use kinds::{KINDS, Mounted};

/// The words in the page's second column that mean "carried".
const CARRIED: [&str; 2] = ["carried", "carried, read-only"];
const OWN: &str = "the guest's own";
const REFUSED: &str = "refused";

/// A waiting container under this runtime.
fn start<'a>(host: &'a Host, runtime: &str, options: &[&str]) -> TestResult<CtrContainer<'a>> {
    let pod = CtrContainer::new(host, host.name("waits"));
    let mut all = vec!["run", "-d", "--runtime", runtime];
    all.extend(options);
    all.extend([IMAGE, pod.id(), "sleep", "1000"]);
    host.ctr(all).ok()?;
    Ok(pod)
}

fn run(program: &str, arguments: &[&str]) -> TestResult<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(Call::new(command).ok()?.text())
}

/// The page has each kind that is tried here, and says that it is tried.
#[test]
fn the_page_and_the_kinds_are_one() -> TestResult {
    let mut wrong = Vec::new();
    for line in page::file_systems()? {
        let known = KINDS.iter().any(|kind| kind.name == line.name);
        if known != line.tried {
            wrong.push(format!(
                "{}: tried {}, known here {known}",
                line.name, line.tried
            ));
        }
        let what = line.what.as_str();
        if !CARRIED.contains(&what) && what != OWN && what != REFUSED {
            wrong.push(format!("{}: {what:?} is none of the words", line.name));
        }
    }
    for kind in KINDS {
        if !page::file_systems()?
            .iter()
            .any(|line| line.name == kind.name)
        {
            wrong.push(format!("{}: no line", kind.name));
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(failure(wrong.join("\n"))),
    }
}

/// The host has what the container wrote, and the container has read what the host wrote.
#[test]
fn what_is_carried_comes_through_as_under_runc() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let tool = Tool::new(&host)?;
    let lines = page::file_systems()?;
    let wanted: Vec<_> = lines
        .iter()
        .filter(|line| line.tried && CARRIED.contains(&line.what.as_str()))
        .collect();
    for runtime in RUNTIMES {
        let (place, mut mounted) = (Directory::new(&host)?, Vec::new());
        for line in &wanted {
            mounted.push(Mounted::new(&place, &line.name)?);
        }
        let mut mounts = vec![tool.mount()];
        for (line, one) in wanted.iter().zip(&mounted) {
            mounts.push(bind(one.path(), &format!("/fs/{}", line.name), "rbind:rw"));
        }
        let options: Vec<&str> = mounts
            .iter()
            .flat_map(|mount| ["--mount", mount.as_str()])
            .collect();
        let pod = start(&host, runtime, &options)?;
        let script =
            format!("cd /fs; for one in *; do echo \"$one: $({TOOL} carried $one)\"; done");
        let output = pod.exec(&["sh", "-c", &script])?;
        println!("{runtime}\n{}", output.both());
        let told: BTreeMap<String, String> = pairs(&output.text());
        for (line, one) in wanted.iter().zip(&mounted) {
            let word = match line.what.as_str() {
                "carried" => "carried",
                _ => "read-only",
            };
            assert_eq!(
                told.get(&line.name).map(String::as_str),
                Some(word),
                "{runtime}: {}",
                line.name
            );
            if word == "carried" {
                let read = |name: &str| fs::read(one.path().join(name));
                assert_eq!(read("written")?, b"of the container\n", "{}", line.name);
                assert!(
                    read("mapped")?.starts_with(b"through the mapping"),
                    "{}",
                    line.name
                );
                assert!(!one.path().join("new").exists(), "{}", line.name);
            }
        }
        pod.remove()?;
    }
    Ok(())
}

/// `NAME: RESULT` on each line.
fn pairs(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, result)| (name.to_owned(), result.to_owned()))
        .collect()
}

/// Each is refused at Create with the field, the type and what helps, in the page's words. Nothing
/// stays.
#[test]
fn what_is_refused_is_refused_by_its_name() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let place = Directory::new(&host)?;
    let lines = page::file_systems()?;
    for line in lines
        .iter()
        .filter(|line| line.tried && line.what == REFUSED)
    {
        let one = Mounted::new(&place, &line.name)?;
        let before = host.footprint();
        let mount = bind(one.path(), "/x", "rbind:ro");
        let options = ["--mount", mount.as_str()];
        let output = host
            .run(&host.name("refused"), &options, &["true"])
            .output()?;
        let text = output.error_text();
        println!("{}: {text}", line.name);
        assert_ne!(output.status, 0, "{}", line.name);
        let wanted = [
            "mounts[",
            "(/x)",
            &format!("of type {} is not supported: ", line.name),
            &line.helps,
        ];
        for part in wanted {
            assert!(text.contains(part), "{}: no {part:?} in {text}", line.name);
        }
        host.leaves_nothing(&before)?;
    }
    Ok(())
}

/// A bind mount of the whole file system becomes a mount of the container's own.
#[test]
fn the_guest_has_its_own() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let lines = page::file_systems()?;
    let own = lines.iter().filter(|line| line.tried && line.what == OWN);
    let (mut mounts, mut names) = (Vec::new(), Vec::new());
    let place = Directory::new(&host)?;
    let mut mounted = Vec::new();
    for line in own {
        let one = Mounted::new(&place, &line.name)?;
        mounts.push(bind(
            one.path(),
            &format!("/own/{}", line.name),
            "rbind:rslave:ro",
        ));
        mounted.push(one);
        names.push(line.name.clone());
    }
    let mut options = Vec::new();
    for mount in &mounts {
        options.extend(["--mount", mount.as_str()]);
    }
    let pod = host.start("own", &options, &["sleep", "1000"])?;
    let of_host = host.name("of-the-host");
    let marker = Path::new("/sys/fs/cgroup").join(&of_host);
    fs::create_dir(&marker)?;
    let found = pod.exec(&[
        "sh",
        "-c",
        "grep ' /own/' /proc/self/mountinfo; ls /own/cgroup2",
    ]);
    fs::remove_dir(&marker)?;
    let found = found?;
    let text = found.text();
    println!("{text}");
    for name in &names {
        let here = format!(" /own/{name} ro,");
        let line = text.lines().find(|line| line.contains(&here));
        let line = line.ok_or_else(|| failure(format!("no {here}: {}", found.both())))?;
        assert!(line.contains(&format!(" - {name} {name} ")), "{line}");
    }
    assert!(
        text.contains("\ncgroup.procs") && !text.contains(&of_host),
        "{text}"
    );
    // A part of the host's is none of the guest's.
    let part = bind(Path::new("/sys/fs/cgroup/cgroup.procs"), "/x", "bind:ro");
    let output = host
        .run(&host.name("part"), &["--mount", &part], &["true"])
        .output()?;
    let text = output.error_text();
    assert!(text.contains("of type cgroup2 is not supported"), "{text}");
    pod.remove()
}

/// With the host's `/` comes nothing of its kernel's: these directories are empty, and the log
/// names them.
#[test]
fn a_tree_comes_without_what_is_of_the_host_s_kernel() -> TestResult {
    kata_like_only!();
    let host = Host::alone()?;
    let place = Directory::new(&host)?;
    fs::create_dir_all(place.join("deep"))?;
    let deep = Mounted::at(&place.join("deep"), "tmpfs")?;
    let below = Mounted::at(&place.join("deep/debug"), "debugfs")?;
    let mounts = [
        bind(Path::new("/"), "/host", "rbind:rslave:ro"),
        place.at("/place", "rbind:rw"),
    ];
    let mut options = Vec::new();
    for mount in &mounts {
        options.extend(["--mount", mount.as_str()]);
    }
    let pod = host.start("tree", &options, &["sleep", "1000"])?;
    let script = "ls -A /host/proc /host/sys /host/dev /place/deep/debug >/tmp/seen 2>&1; cat /place/deep/kept; \
        ls -A /place/deep/debug | wc -l; ls /host/etc/passwd";
    let found = pod.exec(&["sh", "-c", script])?;
    let wanted = "of the host\n0\n/host/etc/passwd";
    assert_eq!(found.text(), wanted, "{}", found.both());
    // Everything that the file server sees below the mounts is on the root's own file system.
    let table = fs::read_to_string(format!("/proc/{}/mountinfo", pod.process("fsd")?.pid))?;
    let kinds = table
        .lines()
        .filter_map(|line| line.split_once(" - ")?.1.split(' ').next());
    let kinds: BTreeSet<_> = kinds.collect();
    println!("{kinds:?}");
    let lines = page::file_systems()?;
    let unfit = |kind: &&str| {
        lines
            .iter()
            .any(|line| line.name == *kind && !CARRIED.contains(&line.what.as_str()))
    };
    assert!(
        !kinds.iter().any(unfit) && kinds.contains("tmpfs"),
        "{table}"
    );
    let log = host.log();
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("left out with all below"))
        .collect();
    println!("{told:#?}");
    assert_eq!(told.len(), 2, "{told:?}");
    for part in ["(/host)", "/proc (proc)", "/sys (sysfs)", "/dev (devtmpfs)"] {
        assert!(
            told.iter().any(|line| line.contains(part)),
            "no {part} in {told:?}"
        );
    }
    assert!(
        told.iter()
            .any(|line| line.ends_with("/deep/debug (debugfs)\"")
                || line.contains("/deep/debug (debugfs)"))
    );
    assert!(deep.path().join("debug").exists() && fs::read_dir(below.path())?.count() > 0);
    pod.remove()
}

/// Each feature is as the page says; where it says "as runc" both are equal.
#[test]
fn features_are_as_the_page_says() -> TestResult {
    kata_like_only!();
    let host = Host::shared()?;
    let tool = Tool::new(&host)?;
    let [runc, ours] = RUNTIMES.map(|runtime| features(&host, &tool, runtime));
    let (runc, ours) = (runc?, ours?);
    let lines = page::features()?;
    let mut wrong = Vec::new();
    for (place, runc, ours) in PLACES
        .iter()
        .enumerate()
        .map(|(index, place)| (place, &runc[index], &ours[index]))
    {
        for (name, theirs) in runc {
            println!(
                "{place} | {name} | runc: {theirs} | kata-like: {}",
                ours[name]
            );
        }
        let names: Vec<_> = lines.iter().map(|line| &line.name).collect();
        let other = runc.keys().filter(|name| !names.contains(name));
        wrong.extend(other.map(|name| format!("the page has no line for {name}")));
    }
    for line in &lines {
        for (index, claim) in line.claims.iter().enumerate() {
            let (theirs, mine) = (runc[index].get(&line.name), ours[index].get(&line.name));
            let right = match claim.as_str() {
                "as runc" => mine.is_some() && mine == theirs,
                claim => mine.is_some_and(|mine| mine == claim) && mine != theirs,
            };
            if !right {
                let place = PLACES[index];
                wrong.push(format!(
                    "{}, {place}: {claim:?}, but {mine:?}; runc {theirs:?}",
                    line.name
                ));
            }
        }
    }
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(failure(wrong.join("\n"))),
    }
}

/// The columns of the page's second table, in their order.
const PLACES: [&str; 3] = ["ext4", "xfs", "root"];

/// What a container finds in each of the places.
fn features(host: &Host, tool: &Tool, runtime: &str) -> TestResult<[BTreeMap<String, String>; 3]> {
    let place = Directory::new(host)?;
    let [ext4, xfs] = ["ext4", "xfs"].map(|kind| Mounted::new(&place, kind));
    let (ext4, xfs) = (ext4?, xfs?);
    let mounts = [
        tool.mount(),
        bind(ext4.path(), "/ext4", "rbind:rw"),
        bind(xfs.path(), "/xfs", "rbind:rw"),
    ];
    let mut options = vec!["--cap-add", "CAP_SYS_ADMIN"]; // for trusted attributes
    for mount in &mounts {
        options.extend(["--mount", mount.as_str()]);
    }
    let pod = start(host, runtime, &options)?;
    let mut all = Vec::new();
    for (name, of_host) in PLACES
        .iter()
        .zip([Some(ext4.path()), Some(xfs.path()), None])
    {
        let script = format!("mkdir /{name}/features && {TOOL} features /{name}/features");
        let output = pod.exec_call(&[], &["sh", "-c", &script]).ok()?;
        let mut found = pairs(&output.text());
        if let Some(of_host) = of_host {
            let told = inotify_of_the_host(&pod, name, of_host)?;
            found.insert("inotify of the host's changes".into(), told.into());
        }
        all.push(found);
    }
    pod.remove()?;
    all.try_into().map_err(|_| failure("three places"))
}

/// Whether a container hears of a file that the host makes. It surely hears of a file that it makes
/// itself afterwards.
fn inotify_of_the_host(pod: &CtrContainer, name: &str, of_host: &Path) -> TestResult<&'static str> {
    let script = format!(
        "mkdir /{name}/watched; {TOOL} watch /{name}/watched >/tmp/{name} 2>&1 & \
         until grep -q watching /tmp/{name}; do sleep 0.1; done"
    );
    pod.exec_call(&[], &["sh", "-c", &script]).ok()?;
    fs::write(of_host.join("watched/of-the-host"), "")?;
    let mut told = String::new();
    let script = format!("touch /{name}/watched/own; cat /tmp/{name}");
    until("the own file is told of", Duration::from_secs(20), || {
        told = match pod.exec(&["sh", "-c", &script]) {
            Ok(output) => output.text(),
            Err(error) => error.to_string(),
        };
        told.contains("own")
    })?;
    Ok(match told.contains("of-the-host") {
        true => "tells",
        false => "tells nothing",
    })
}
