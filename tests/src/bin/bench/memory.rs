//! The memory that one idle container costs the host.

use kata_like_tests::process::Process;
use kata_like_tests::{Host, TestResult};

use crate::measures::{Runtime, remove};
use crate::results::{Of, Results};
use crate::timing;

/// By the names of their programs: what a runtime leaves on the host for a container.
const PROCESSES: [&str; 6] = [
    "containerd-shim-kata-like-v2",
    "kata-like-",
    "containerd-shim-runc-v2",
    "containerd-shim-runsc-v1",
    "runsc",
    "sleep",
];

/// The proportional set size of all that the container has brought.
pub fn measure(host: &Host, runtime: &Runtime, results: &mut Results) -> TestResult {
    let before = ours();
    let id = host.name("bench");
    timing::run(runtime.run(host, "-d", &id, &[], &["sleep", "1000"]))?;
    let new: Vec<_> = ours()
        .into_iter()
        .filter(|it| !before.iter().any(|was| was.pid == it.pid))
        .collect();
    let mut kib = 0.0;
    for process in &new {
        let rollup = process.read("smaps_rollup")?;
        let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let pss = pss.and_then(|rest| rest.trim().strip_suffix(" kB"));
        kib += pss.unwrap_or("0").parse::<f64>()?;
    }
    remove(host, &id)?;
    let of = Of {
        group: "memory",
        name: "an idle container, all its processes (PSS)",
        unit: "MiB",
    };
    results.add(&of, runtime.name, kib / 1024.0);
    Ok(())
}

fn ours() -> Vec<Process> {
    let all = Process::all().into_iter();
    all.filter(|process| PROCESSES.iter().any(|name| process.is(name)))
        .collect()
}
