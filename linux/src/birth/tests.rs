//! Children of the test, and what they are born with.

use super::*;
use std::io::Read;

/// What a shell command prints, and how it was born.
fn output(
    script: &str,
    cgroup: Option<BorrowedFd>,
    change: impl FnOnce(&mut Birth),
) -> Result<String, BirthError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let descriptors = [None, Some(writer.as_fd())];
    let mut how = Birth {
        program: Path::new("/bin/sh"),
        arguments: &["sh", "-c", script],
        environment: &["PATH=/usr/bin:/bin".to_owned()],
        directory: Path::new("/"),
        cgroup,
        network: Network::Inherited,
        namespaces: UnshareFlags::empty(),
        mounts: None,
        label: None,
        oom_score: None,
        descriptors: &descriptors,
    };
    change(&mut how);
    let newborn = birth(&how)?;
    drop(writer);
    let mut text = String::new();
    std::fs::File::from(reader)
        .read_to_string(&mut text)
        .unwrap();
    let ended = waitid(WaitId::PidFd(newborn.pidfd.as_fd()), WaitIdOptions::EXITED);
    assert_eq!(ended.unwrap().unwrap().exit_status(), Some(0));
    Ok(text)
}

#[test]
fn a_child_starts_where_and_as_it_is_told() {
    let text = output("pwd; umask; echo $PATH", None, |how| {
        how.directory = Path::new("/proc");
    });
    assert_eq!(text.unwrap(), "/proc\n0022\n/usr/bin:/bin\n");
}

/// Needs root.
#[test]
fn a_network_of_its_own_has_no_interface_that_is_up() {
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    let text = output("readlink /proc/self/ns/net", None, |how| {
        how.network = Network::New;
    });
    let text = text.unwrap();
    assert!(text.starts_with("net:[") && text.trim() != own.to_str().unwrap());
}

/// Needs root. The shell is process 1 of its namespace, so no signal of its own ends it; the
/// last `echo` shows that it lives.
#[test]
fn a_child_is_alone_in_new_namespaces() {
    let spaces = [
        ("cgroup", UnshareFlags::NEWCGROUP),
        ("ipc", UnshareFlags::NEWIPC),
        ("pid", UnshareFlags::NEWPID),
        ("uts", UnshareFlags::NEWUTS),
    ];
    let all = spaces.iter().map(|(_, flag)| *flag).collect();
    let script = "for space in cgroup ipc pid uts; do readlink /proc/self/ns/$space; done; \
         kill -KILL $$; kill -ABRT $$; echo $$";
    let text = output(script, None, |how| how.namespaces = all).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    for ((space, _), theirs) in spaces.iter().zip(&lines) {
        let ours = std::fs::read_link(format!("/proc/self/ns/{space}")).unwrap();
        assert_ne!(ours.to_str().unwrap(), *theirs);
    }
    assert_eq!(lines[4], "1");
}

/// Needs root and cgroup2. In a new cgroup namespace it is also the root.
#[test]
fn a_child_is_born_in_its_cgroup() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let top = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|words| words.get(2) == Some(&"cgroup2"));
    let Some(top) = top else { return };
    let name = format!("born-here-{}", std::process::id());
    let path = Path::new(top[1]).join(&name);
    if std::fs::create_dir(&path).is_err() {
        return;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
    let seen = |namespaces| {
        let script = "cat /proc/self/cgroup";
        let text = output(script, Some(cgroup.as_fd()), |how| {
            how.namespaces = namespaces
        });
        let text = text.unwrap();
        let own = text.lines().find_map(|line| line.strip_prefix("0::"));
        own.unwrap().to_owned()
    };
    let (from_outside, from_inside) = (seen(UnshareFlags::empty()), seen(UnshareFlags::NEWCGROUP));
    std::fs::remove_dir(&path).unwrap();
    assert!(
        from_outside.ends_with(&format!("/{name}")),
        "{from_outside}"
    );
    assert_eq!(from_inside, "/");
}

#[test]
fn a_child_is_born_with_its_score() {
    let score = |wanted| {
        let text = output("cat /proc/self/oom_score_adj", None, |how| {
            how.oom_score = wanted;
        });
        text.map(|text| text.trim().to_owned())
    };
    let own = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(score(None).unwrap(), own.trim());
    assert_eq!(score(Some(1000)).unwrap(), "1000");
    let refused = score(Some(1001)).unwrap_err().to_string();
    assert_eq!(refused, "set oom_score_adj of /bin/sh");
}

#[test]
fn what_is_no_cgroup_is_named_as_the_cause() {
    let root = std::fs::File::open("/").unwrap();
    let refused = output("true", Some(root.as_fd()), |_| ()).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "clone into its cgroup to start /bin/sh"
    );
}

#[test]
fn a_step_that_fails_is_named() {
    let refused = output("true", None, |how| how.program = Path::new("/nowhere/x")).unwrap_err();
    assert_eq!(refused.to_string(), "run /nowhere/x");
    let refused = output("true", None, |how| how.directory = Path::new("/nowhere")).unwrap_err();
    assert_eq!(refused.to_string(), "enter the directory of /bin/sh");
}
