//! Many pods, one after the other and at once.

use std::collections::BTreeSet;
use std::fs;
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kata_like_tests::cri::{Kubelet, Pod, SMALL};
use kata_like_tests::{TestResult, failure, figures, kata_like_only};

use super::host;

/// One after the other.
const IN_TURN: usize = 20;

/// At once.
const AT_ONCE: usize = 20;

#[test]
fn twenty_pods_one_after_the_other() -> TestResult {
    kata_like_only!();
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    for _ in 0..IN_TURN {
        let pod = kubelet.pod("next", SMALL)?;
        let vmm = pod.vmm()?;
        pod.stop()?;
        was_gone_before_its_network(&pod, vmm)?;
        pod.remove()?;
    }
    host.leaves_nothing(&before)
}

/// All are requested at once, are up at once, each with a guest of its own, and are removed at
/// once.
#[test]
fn twenty_pods_at_once() -> TestResult {
    kata_like_only!();
    let host = host()?;
    let kubelet = Kubelet::new(&host)?;
    let before = host.footprint();
    let (free, began) = (available()?, Instant::now());
    let (longest, all_are_there) = (Mutex::new(Duration::ZERO), Barrier::new(AT_ONCE));
    let one = || -> TestResult<String> {
        let run = || -> TestResult<(Pod<'_>, String)> {
            let asked = Instant::now();
            let pod = kubelet.pod("many", SMALL)?;
            let mut longest = longest.lock().map_err(|_| failure("a thread panicked"))?;
            *longest = asked.elapsed().max(*longest);
            drop(longest);
            let boot = pod.run("boot", "cat /proc/sys/kernel/random/boot_id", "")?;
            Ok((pod, boot))
        };
        let made = run();
        // Whatever the result, nobody waits for ever.
        if all_are_there.wait().is_leader() {
            let left = available()?;
            println!(
                "{AT_ONCE} pods at once: up after {:.1?}, {} MiB of the host's memory",
                began.elapsed(),
                (free.saturating_sub(left)) >> 10
            );
        }
        let (pod, boot) = made?;
        let vmm = pod.vmm()?;
        pod.stop()?;
        was_gone_before_its_network(&pod, vmm)?;
        pod.remove()?;
        Ok(boot)
    };
    let results: Vec<TestResult<String>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(one)).collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .map_err(|_| failure("a pod's thread panicked"))?
            })
            .collect()
    });
    let (mut boots, mut errors) = (BTreeSet::new(), Vec::new());
    for result in results {
        match result {
            Ok(boot) => drop(boots.insert(boot)),
            Err(error) => errors.push(error.to_string()),
        }
    }
    assert!(
        errors.is_empty(),
        "{} of {AT_ONCE}: {errors:#?}",
        errors.len()
    );
    assert_eq!(boots.len(), AT_ONCE, "guests of their own");
    // A kubelet gives each pod four minutes: twice its `runtimeRequestTimeout`.
    figures::note(&format!(
        "{AT_ONCE} pods of CRI at once: RunPodSandbox took at most {:.0?}, up and gone: {:.0?}",
        longest.into_inner().unwrap_or_default(),
        began.elapsed()
    ));
    host.leaves_nothing(&before)
}

/// The VMM was gone when CNI was told to remove the interface, and the namespace held only that
/// interface.
fn was_gone_before_its_network(pod: &Pod, vmm: i64) -> TestResult {
    let seen = pod.seen_at_del()?;
    assert!(seen.contains(" eth0"), "{seen}");
    assert!(!seen.contains("kltap"), "{seen}");
    let process = format!("/proc/{vmm}/comm");
    assert!(!seen.lines().any(|line| line == process), "{vmm}: {seen}");
    Ok(())
}

/// In KiB.
fn available() -> TestResult<u64> {
    let memory = fs::read_to_string("/proc/meminfo")?;
    let line = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    Ok(number.ok_or_else(|| failure("no MemAvailable"))?.parse()?)
}
