//! A container's states, with a placeholder: it has them all, and needs no process for it.
//!
//! They need root and a mounted cgroup v2: what the guest has at fixed places, a test has in a
//! mount namespace of its own.

use std::fs;
use std::time::Duration;

use kata_like_failure::Kind;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change};
use rustix::thread::UnshareFlags;
use serde_json::json;
use tokio::time::timeout;

use super::*;
use crate::cgroup::tests::hierarchy;
use crate::stdio::Wanted;
use crate::storage::VOLUMES;

/// Does `test` with the guest's places, on a runtime of its own.
fn in_guest<T: Send, F: Future<Output = T>>(test: impl FnOnce() -> F + Send) -> T {
    let work = || {
        kata_like_linux::namespace::unshare(UnshareFlags::NEWNS | UnshareFlags::FS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        mount_bind(hierarchy(), crate::cgroup::ROOT).unwrap();
        mount("none", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
        for share in [ROOTFS.target, VOLUMES.target] {
            fs::create_dir_all(share).unwrap();
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test())
    };
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

async fn placeholder(name: &str) -> Arc<Container> {
    let spec = json!({
        "ociVersion": "1.2.0",
        "hostname": "pod",
        "process": {"cwd": "/", "args": ["/pause"], "user": {"uid": 65535, "gid": 65535}},
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "pid"},
        ]},
    });
    let mut made_of = Creation::parse(spec.to_string().as_bytes()).unwrap();
    made_of.placeholder = true;
    let around = Arc::new(Surroundings {
        events: Events::default(),
        tokens: Arc::default(),
        volumes: Default::default(),
    });
    let name = format!("{name}-{}", std::process::id());
    let container = Arc::new(Container::new(name, made_of, around));
    let pid = container.create(Vec::new()).await;
    assert_eq!(pid.unwrap(), 0);
    container
}

fn wrong(result: Result<(), Failure>) -> String {
    match result {
        Err(error) if error.kind() == Kind::WrongState => {
            let text = error.to_string();
            text.split_once(" is ").unwrap().1.to_owned()
        }
        other => panic!("{other:?}"),
    }
}

async fn exited(container: &Container) -> Option<u32> {
    let next = container.around.events.next();
    match timeout(Duration::from_millis(50), next).await {
        Ok(Event::Exited { exec, status, .. }) if exec.is_empty() => Some(status),
        Ok(other) => panic!("{other:?}"),
        Err(_) => None,
    }
}

#[test]
fn each_call_has_its_states() {
    in_guest(|| async {
        let container = placeholder("states").await;
        assert_eq!(wrong(container.pause().await), "created, not running");
        assert_eq!(wrong(container.resume().await), "created, not paused");
        container.start().await.unwrap();
        assert_eq!(wrong(container.start().await), "running, not created");
        assert_eq!(wrong(container.resume().await), "running, not paused");
        let exec = || {
            let process = json!({"cwd": "/", "args": ["x"], "user": {"uid": 0, "gid": 0}});
            let process = serde_json::from_value(process).unwrap();
            container.exec("e", process, Wanted::default())
        };
        assert_eq!(
            wrong(exec().await.map(drop)),
            "the pod's placeholder, not one that runs processes"
        );

        container.pause().await.unwrap();
        let freeze = container
            .cgroup()
            .unwrap()
            .directory()
            .join("cgroup.freeze");
        assert_eq!(fs::read_to_string(&freeze).unwrap(), "1\n");
        assert_eq!(wrong(container.pause().await), "paused, not running");
        container.update(b"{}").await.unwrap();
        container.resume().await.unwrap();
        assert_eq!(fs::read_to_string(&freeze).unwrap(), "0\n");
        container.pause().await.unwrap();

        // The figures stay until it is deleted.
        container.signal("", SIGKILL).unwrap();
        assert_eq!(exited(&container).await, Some(137));
        assert_eq!(wrong(container.resume().await), "stopped, not paused");
        assert_eq!(wrong(container.update(b"{}").await), "stopped, not created");
        assert!(container.stats().await.is_ok());
        let cgroup = container.cgroup().unwrap();
        container.delete().await.unwrap();
        assert!(!cgroup.directory().exists());
        assert!(container.stats().await.is_err());
        assert_eq!(exited(&container).await, None);
    });
}

#[test]
fn a_placeholder_ends_as_the_usual_pause_program() {
    in_guest(|| async {
        for (signal, status) in [(15, 0), (2, 0), (9, 137)] {
            let container = placeholder("ends").await;
            container.start().await.unwrap();
            container.signal("", 1).unwrap();
            assert_eq!(exited(&container).await, None);
            container.signal_all(signal).unwrap();
            assert_eq!(exited(&container).await, Some(status), "{signal}");
            assert!(container.signal("", signal).is_err(), "it has gone");
            container.delete().await.unwrap();
        }
        // Deleted while it lives, it has been killed.
        let container = placeholder("ends").await;
        container.delete().await.unwrap();
        assert_eq!(exited(&container).await, Some(137));
    });
}

#[test]
fn a_placeholders_namespaces_can_be_joined_as_long_as_it_is_there() {
    in_guest(|| async {
        let container = placeholder("joined").await;
        let link = |fd: &OwnedFd| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(fd);
            fs::read_link(format!("/proc/self/fd/{fd}")).unwrap()
        };
        for (kind, name) in [
            (LinuxNamespaceType::Ipc, "ipc"),
            (LinuxNamespaceType::Uts, "uts"),
        ] {
            let joined = link(&container.namespace(kind).await.unwrap());
            assert!(joined.to_str().unwrap().starts_with(name), "{joined:?}");
            let own = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
            assert_ne!(joined, own);
        }
        container.delete().await.unwrap();
        let gone = container.namespace(LinuxNamespaceType::Uts).await;
        assert_eq!(gone.err().map(|error| error.kind()), Some(Kind::WrongState));
    });
}
