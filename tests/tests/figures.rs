//! The stats of a start, by which later work is measured: exits, time and memory.
//!
//! One vCPU, with 2 MiB pages and without. The VMM counts (KVM's statistics). At level debug the
//! shim logs the counts at the agent's dial, and when a container has been started.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, failure, figures, kata_like_only};

const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Sets the host's switch for huge pages of memfds, and resets it at the end.
struct HugePages(String);

impl HugePages {
    fn set(value: &str) -> TestResult<Self> {
        let text = fs::read_to_string(SWITCH)?;
        let now = text.split(['[', ']']).nth(1).unwrap_or("advise").to_owned();
        fs::write(SWITCH, value)?;
        Ok(Self(now))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, &self.0);
    }
}

#[test]
fn one_start_in_figures() -> TestResult {
    kata_like_only!();
    let host = Host::logging("debug")?;
    let config = "/run/figures.toml";
    fs::write(config, "max_vcpus = 1\n")?;
    let mut exits = Vec::new();
    for (name, value) in [("2 MiB pages", "advise"), ("4 KiB pages", "never")] {
        let _pages = HugePages::set(value)?;
        let logged = host.log().len();
        let options = ["--runtime-config-path", config];
        let pod = host.start("figures", &options, &["sleep", "1000"])?;
        for moment in ["the agent's dial", "the start of a container"] {
            let mut found = None;
            until(moment, Duration::from_secs(10), || {
                found = at(&host.log()[logged..], moment);
                found.is_some()
            })?;
            let counted = found.unwrap_or_default();
            let number = |field: &str| -> TestResult<u64> {
                counted
                    .get(field)
                    .copied()
                    .ok_or_else(|| failure(format!("{field}: {counted:?}")))
            };
            if exits.len() < 2 && moment == "the agent's dial" {
                exits.push(number("exits")?);
            }
            figures::note(&format!(
                "one vCPU, {name}: from the first KVM_RUN to {moment}: {} exits ({} to the VMM, {} page faults), {} ms, guest memory resident {:.1} MiB",
                number("exits")?,
                number("user_exits")?,
                number("page_faults")?,
                number("elapsed_ms")?,
                number("resident_bytes")? as f64 / f64::from(1 << 20),
            ));
        }
        let memory = pod.process("vmm")?.read("smaps_rollup")?;
        let pss = memory
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .unwrap_or("?");
        figures::note(&format!(
            "one vCPU, {name}: Pss of the VMM, guest memory included: {}",
            pss.trim()
        ));
        pod.remove()?;
    }
    let [huge, small] = exits[..] else {
        return Err(failure("two starts"));
    };
    assert!(
        huge > 0 && huge < small,
        "2 MiB pages save no exits: {huge} and {small}"
    );
    Ok(())
}

/// The fields of the line that was logged at a moment: `… figures moment="…" exits=3854 …`.
fn at(log: &str, moment: &str) -> Option<BTreeMap<String, u64>> {
    let line = log
        .lines()
        .find(|line| line.contains(&format!("moment={moment:?}")))?;
    let fields = line.split(' ').filter_map(|word| word.split_once('='));
    Some(
        fields
            .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
            .collect(),
    )
}
