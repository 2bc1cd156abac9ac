//! What a node reports about itself, and which pods it refuses.

use crate::cri::{HANDLER, Kubelet};
use crate::{Host, Parts, TestResult, is_oracle};
use kata_like_cri_client::Error;
use kata_like_cri_client::messages::*;

/// gRPC's code for an unknown call.
const UNIMPLEMENTED: u32 = 12;

/// What a node must know before it takes a pod. It refuses what it can't run here, in the pod's own
/// words.
pub fn a_node_offers_the_handler_and_refuses_what_is_the_hosts(host: &Host) -> TestResult {
    let kubelet = Kubelet::new(host)?;
    let version = kubelet.call(VersionRequest::new())?;
    assert_eq!(version.runtime_name, "containerd");
    let status = kubelet.call(StatusRequest::new())?;
    let mut parts = Parts::new();
    parts.run("conditions", || {
        for condition in ["RuntimeReady", "NetworkReady"] {
            let ready = status.status.conditions.iter();
            let ready = ready
                .filter(|one| one.type_ == condition)
                .any(|one| one.status);
            assert!(ready, "{condition}: {status}");
        }
        Ok(())
    });
    parts.run("handlers", || {
        let handlers: Vec<_> = status
            .runtime_handlers
            .iter()
            .map(|one| &one.name)
            .collect();
        // containerd 1.7 does not report it.
        let told = handlers.iter().any(|name| *name == HANDLER);
        assert!(told || handlers.is_empty(), "{handlers:?}");
        Ok(())
    });
    // Neither version of containerd has metrics under names of its own.
    parts.run("figures", || {
        let metrics = kubelet.try_call(ListMetricDescriptorsRequest::new());
        let refused = matches!(
            metrics,
            Err(Error::Refused {
                code: UNIMPLEMENTED,
                ..
            })
        );
        assert!(refused, "{metrics:?}");
        Ok(())
    });
    if is_oracle() {
        return parts.end();
    }

    let before = host.footprint();
    for (option, kind, name) in [
        ("network: NODE", "network", "hostNetwork"),
        ("pid: NODE", "pid", "hostPID"),
        ("ipc: NODE", "ipc", "hostIPC"),
    ] {
        parts.run(name, || {
            let config =
                format!("linux {{ security_context {{ namespace_options {{ {option} }} }} }}");
            let text = kubelet.no_pod("refused", &config)?;
            let field = format!("linux.namespaces without an entry of type {kind}");
            assert!(
                text.contains(&field) && text.contains(name),
                "{option}: {text}"
            );
            Ok(())
        });
    }
    parts.run("users of its own", || {
        user_namespaces(&kubelet, &version.runtime_version)
    });
    parts.run("the end", || host.leaves_nothing(&before));
    parts.end()
}

/// containerd 2.1 makes a pod's user namespace itself, on the host, which is refused; 1.7 lets the
/// runtime make it.
fn user_namespaces(kubelet: &Kubelet, containerd: &str) -> TestResult {
    let ids = "{ host_id: 100000 length: 65536 }";
    let users = format!("userns_options {{ mode: POD uids {ids} gids {ids} }}");
    let options = format!("namespace_options {{ pid: CONTAINER {users} }}");
    let config = format!("linux {{ security_context {{ {options} }} }}");
    if containerd.trim_start_matches('v').starts_with("1.") {
        let pod = kubelet.pod("users", &config)?;
        let map = pod.run("map", "cat /proc/self/uid_map", &config)?;
        let map: Vec<_> = map.split_whitespace().collect();
        assert_eq!(map, ["0", "100000", "65536"]);
        return pod.remove();
    }
    let text = kubelet.no_pod("users", &config)?;
    let field = "linux.namespaces of type user";
    assert!(text.contains(field) && text.contains("hostUsers"), "{text}");
    Ok(())
}
