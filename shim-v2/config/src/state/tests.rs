//! A pod's folder from its making to its end, and what must not be taken for one.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

struct Root(tempfile::TempDir);

const NETWORK: NetworkId = NetworkId {
    device: 4,
    inode: 4_026_531_840,
};

impl Root {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn path(&self) -> PathBuf {
        self.0.path().join("kata-like")
    }
    fn create(&self, id: &str) -> Result<StateFolder, StateError> {
        StateFolder::create_under(&self.path(), "default", id)
    }
    fn take(&self, id: &str) -> Occupied {
        NetworkLock::take_under(&self.path(), NETWORK, "default", id).unwrap()
    }
    fn networks(&self) -> usize {
        fs::read_dir(self.path()).unwrap().count()
    }
    fn open(&self, id: &str) -> Result<Option<StateFolder>, StateError> {
        StateFolder::open_under(&self.path(), "default", id)
    }
}

#[test]
fn a_folder_lives_from_create_to_remove() {
    let root = Root::new();
    assert!(root.open("pod").unwrap().is_none());
    let folder = root.create("pod").unwrap();
    let mode = fs::metadata(folder.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o700);
    assert!(matches!(root.create("pod"), Err(StateError::Exists { .. })));

    folder.create_file(name::GUEST_LOG).unwrap();
    assert!(folder.create_file(name::GUEST_LOG).is_err());
    folder.create_directory(name::SHARE).unwrap();
    fs::create_dir_all(folder.path().join("share/rootfs/web")).unwrap();
    symlink("/etc", folder.path().join("share/volumes")).unwrap();

    root.open("pod").unwrap().unwrap().remove().unwrap();
    assert!(root.open("pod").unwrap().is_none());
    assert!(Path::new("/etc").exists());
}

#[test]
fn the_record_comes_back_as_it_was_written() {
    let root = Root::new();
    let folder = root.create("pod").unwrap();
    assert_eq!(folder.read_record().unwrap(), None);
    let us = Process::current().unwrap();
    let record = Record {
        shim: Some(us),
        stand_ins: vec![StandIn {
            task: "web".into(),
            process: us,
        }],
        network: None,
        cgroups: vec!["/sys/fs/cgroup/pod/web".into(), "/sys/fs/cgroup/pod".into()],
        ..Record::new("default", "pod")
    };
    folder.write_record(&Record::new("default", "pod")).unwrap();
    folder.write_record(&record).unwrap();
    assert_eq!(
        root.open("pod").unwrap().unwrap().read_record().unwrap(),
        Some(record)
    );
}

#[test]
fn a_record_of_another_version_or_shape_is_refused_with_a_reason() {
    let root = Root::new();
    let folder = root.create("pod").unwrap();
    let good = serde_json::to_string(&Record::new("default", "pod")).unwrap();
    for (text, reason) in [
        (
            r#"{"version": 2, "vmm_pid": 17}"#,
            "version 2, this program's 1",
        ),
        (&good.replace("\"vmm\"", "\"vvm\""), "unknown field `vvm`"),
        (
            good.get(..good.len() / 2).unwrap(),
            "not a record of a pod: EOF",
        ),
        ("", "not a record of a pod: EOF"),
        ("[]", "not a record of a pod"),
    ] {
        fs::write(folder.path().join(name::RECORD), text).unwrap();
        let error = folder.read_record().unwrap_err().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

#[test]
fn a_planted_folder_or_link_is_refused() {
    let root = Root::new();
    let elsewhere = tempfile::tempdir().unwrap();

    symlink(elsewhere.path(), root.path()).unwrap();
    assert!(matches!(root.create("pod"), Err(StateError::Unsafe { .. })));
    fs::remove_file(root.path()).unwrap();

    fs::create_dir(root.path()).unwrap();
    for (mode, text) in [(0o777, "0777"), (0o770, "0770"), (0o702, "0702")] {
        fs::set_permissions(root.path(), fs::Permissions::from_mode(mode)).unwrap();
        let error = root.create("pod").unwrap_err().to_string();
        let text = format!("its mode is {text}, not 0700");
        assert!(error.ends_with(&text), "{error}");
    }
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();

    symlink(elsewhere.path(), root.path().join("default:pod")).unwrap();
    assert!(matches!(root.create("pod"), Err(StateError::Exists { .. })));
    assert!(matches!(root.open("pod"), Err(StateError::Unsafe { .. })));

    let folder = root.create("other").unwrap();
    symlink("/etc/passwd", folder.path().join(name::RECORD)).unwrap();
    assert!(folder.read_record().is_err());
    assert!(fs::read_dir(elsewhere.path()).unwrap().next().is_none());
}

#[test]
fn a_root_that_others_may_only_read_becomes_private() {
    let root = Root::new();
    fs::create_dir(root.path()).unwrap();
    let open = || fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mode = || fs::metadata(root.path()).unwrap().permissions().mode() & 0o7777;
    open();
    let folder = root.create("pod").unwrap();
    assert_eq!(mode(), 0o700);
    open();
    assert!(root.open("pod").unwrap().is_some());
    assert_eq!(mode(), 0o700);

    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let error = root.open("pod").unwrap_err().to_string();
    assert!(error.ends_with("its mode is 0755, not 0700"), "{error}");
}

#[test]
fn a_root_of_another_user_is_refused() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root can give a directory away.
    }
    let root = Root::new();
    fs::create_dir(root.path()).unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(root.path(), Some(1234), None).unwrap();
    let error = root.create("pod").unwrap_err().to_string();
    assert!(error.contains("belongs to uid 1234"), "{error}");
}

#[test]
fn no_name_becomes_a_path() {
    let root = Root::new();
    for bad in [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "-a",
        "a:b",
        "a\n",
        "ä",
        &"x".repeat(77),
    ] {
        assert!(
            matches!(root.create(bad), Err(StateError::Name { .. })),
            "{bad:?}"
        );
        let namespace = StateFolder::create_under(&root.path(), bad, "pod");
        assert!(matches!(namespace, Err(StateError::Name { .. })), "{bad:?}");
    }
}

#[test]
fn the_longest_names_have_sockets_too() {
    let root = Root::new();
    let long = "x".repeat(76);
    let folder = StateFolder::create_under(&root.path(), &long, &long).unwrap();
    let listener = folder.listen(name::STREAMS).unwrap();
    let _near = folder.connect(name::STREAMS).unwrap();
    listener.accept().unwrap();
    assert!(folder.path().join(name::STREAMS).exists());
    assert!(folder.listen(name::STREAMS).is_err());
}

#[test]
fn one_process_at_a_time_holds_the_lock() {
    let root = Root::new();
    let folder = root.create("pod").unwrap();
    let held = folder.try_lock().unwrap().unwrap();
    let second = root.open("pod").unwrap().unwrap();
    assert!(second.try_lock().unwrap().is_none());
    drop(held);
    assert!(second.try_lock().unwrap().is_some());
}

fn free(taken: Occupied) -> NetworkLock {
    match taken {
        Occupied::Free(lock) => lock,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_network_namespace_is_one_pod_s_until_that_leaves() {
    let root = Root::new();
    let lock = free(root.take("web"));
    assert_eq!(lock.id(), NETWORK);
    let Occupied::By { namespace, sandbox } = root.take("db") else {
        panic!("two pods have it");
    };
    assert_eq!((namespace.as_str(), sandbox.as_str()), ("default", "web"));
    lock.leaving().unwrap();
    assert!(matches!(root.take("db"), Occupied::Changing));
    assert_eq!(root.networks(), 1);
    drop(lock);
    assert_eq!(root.networks(), 0);
    let lock = free(root.take("db"));
    assert_eq!(lock.dead(), None);
    assert!(root.open("web").unwrap().is_none(), "it is no state folder");
}

/// What a killed shim has left: its descriptors are closed, and nothing else has happened.
#[test]
fn a_dead_pod_s_network_namespace_is_anybody_s() {
    let root = Root::new();
    let die = |lock: NetworkLock| lock.hand_over(); // to nobody
    die(free(root.take("dead")));
    assert_eq!(root.networks(), 1);
    let lock = free(root.take("new"));
    assert_eq!(lock.dead(), Some(("default", "dead")));
    assert!(matches!(root.take("db"), Occupied::By { sandbox, .. } if sandbox == "new"));
    lock.leaving().unwrap();
    die(lock);
    let lock = free(root.take("db"));
    assert_eq!(lock.dead(), Some(("default", "new")));
    drop(lock);
    assert_eq!(root.networks(), 0);
}

/// As a shim that has just been born gets it, from a process that ends.
#[test]
fn a_network_namespace_s_lock_is_handed_over() {
    let root = Root::new();
    let first = free(root.take("web"));
    let descriptor = first.as_fd().try_clone_to_owned().unwrap();
    first.hand_over();
    let lock = NetworkLock::inherited(descriptor).unwrap();
    assert_eq!(lock.id(), NETWORK);
    assert!(matches!(root.take("db"), Occupied::By { .. }));
    drop(lock);
    assert_eq!(root.networks(), 0);
    drop(free(root.take("db")));
    let other = File::open("/dev/null").unwrap();
    assert!(NetworkLock::inherited(other.into()).is_none());
}

/// What links there are: number and text.
fn uids(root: &Root) -> Vec<(u32, String)> {
    let entries = fs::read_dir(root.path()).unwrap().flatten();
    let links = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let number = name.strip_prefix("vmm:uid:")?.parse().ok()?;
        let text = fs::read_link(entry.path()).unwrap();
        Some((number, text.into_os_string().into_string().unwrap()))
    });
    let mut links: Vec<_> = links.collect();
    links.sort();
    links
}

#[test]
fn a_user_id_is_one_pod_s_until_its_state_is_removed() {
    let root = Root::new();
    let (web, db) = (root.create("web").unwrap(), root.create("db").unwrap());
    let (first, second) = (web.take_uid().unwrap(), db.take_uid().unwrap());
    assert!(UIDS.contains(&first) && UIDS.contains(&second) && first != second);
    let of = |pod: &str| format!("pod default:{pod}");
    let mut wanted = vec![(first, of("web")), (second, of("db"))];
    wanted.sort();
    assert_eq!(uids(&root), wanted);
    // Another one, since that is somebody's.
    let third = web.take_uid().unwrap();
    assert!(third != first && third != second);
    assert_eq!(uids(&root).len(), 2);
    web.remove().unwrap();
    db.remove().unwrap();
    assert!(uids(&root).is_empty());
}

/// A shim that was killed between any two steps, and a folder that somebody else has removed.
#[test]
fn a_dead_pod_s_user_id_is_taken_over_and_no_living_one_s() {
    let root = Root::new();
    let (web, db) = (root.create("web").unwrap(), root.create("db").unwrap());
    let uid = web.take_uid().unwrap();
    fs::remove_dir_all(web.path()).unwrap();
    drop(web);
    assert_eq!(uids(&root).len(), 1, "the link is there");
    assert_eq!(db.take_uid().unwrap(), uid);
    assert_eq!(uids(&root), [(uid, "pod default:db".to_owned())]);
    // Killed before the folder had its own link: the number is the folder's all the same.
    fs::remove_file(db.path().join("uid")).unwrap();
    let other = root.create("other").unwrap();
    assert_ne!(other.take_uid().unwrap(), uid);
    let again = root.open("db").unwrap().unwrap();
    again.remove().unwrap();
    let new = root.create("db").unwrap();
    assert_eq!(new.take_uid().unwrap(), uid, "that of one with its name");
    // What is no link of ours is left alone.
    let foreign = root.path().join(format!("vmm:uid:{uid}"));
    fs::remove_file(&foreign).unwrap();
    fs::write(&foreign, "").unwrap();
    assert_ne!(new.take_uid().unwrap(), uid);
    new.remove().unwrap();
    assert!(foreign.exists());
}

#[test]
fn many_at_once_get_a_user_id_each() {
    let root = Root::new();
    let uids: std::collections::BTreeSet<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16)
            .map(|number| {
                let root = &root;
                scope.spawn(move || {
                    let pod = root.create(&format!("pod-{number}")).unwrap();
                    pod.take_uid().unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    });
    assert_eq!(uids.len(), 16);
}
