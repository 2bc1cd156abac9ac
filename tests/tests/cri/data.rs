//! What a pod's containers have written is on the host, however abruptly the pod is removed.

use std::fs;
use std::path::Path;
use std::time::Instant;

use kata_like_tests::cri::{Kubelet, volume};
use kata_like_tests::probe::{TOOL, Tool, check_stored};
use kata_like_tests::{Parts, TestResult, figures};

use super::host;

/// How many bytes a container stores through a mapping, without a sync.
const BYTES: u64 = 16 << 20;

/// The calls of `kubectl delete --force --grace-period=0`: the kubelet stops the container without
/// grace, then the pod, and removes both at once. A second pod is only stopped, as the kubelet
/// cleans up a pod that it does not know.
#[test]
fn a_pod_deleted_by_force_loses_nothing() -> TestResult {
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let tool = Tool::new(&host)?;
    let mut parts = Parts::new();
    for (name, by_container) in [("by its container", true), ("by the pod alone", false)] {
        parts.run(name, || {
            let pod = kubelet.pod("forced", "")?;
            let data = pod.volume("data")?;
            let mounts = format!(
                "{}{}",
                volume(&data, "/data", ""),
                volume(tool.path(), TOOL, "readonly: true")
            );
            let bytes = BYTES.to_string();
            let command = [TOOL, "store", "/data/file", &bytes, "hold"];
            let container = pod.start("stores", &command, &mounts)?;
            container.wait_log("stored")?;
            // The folder goes with the pod; a second name keeps the file.
            let kept = format!("/run/{}", host.name("kept"));
            fs::hard_link(data.join("file"), &kept)?;
            let begun = Instant::now();
            if by_container {
                assert_eq!(container.stop(0)?.exit_code, 137);
                container.remove()?;
            }
            pod.remove()?;
            figures::note(&format!(
                "a pod that has stored {} MiB, deleted by force: {:.1} s",
                BYTES >> 20,
                begun.elapsed().as_secs_f32()
            ));
            let whole = check_stored(Path::new(&kept), BYTES);
            fs::remove_file(&kept)?;
            whole
        });
    }
    parts.end()
}
