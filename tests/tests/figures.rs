//! The first figures, which become the bars of later work: exits, time and memory of one start.
//!
//! One vCPU, with 2 MiB pages and without. The VMM counts (KVM's statistics), the shim keeps what it
//! told in `figures.json` in the pod's state folder: at the agent's dial and once the container's
//! first instruction is let go.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kata_like_tests::process::until;
use kata_like_tests::{Host, TestResult, failure, figures, kata_like_only};
use serde_json::Value;

const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Sets the host's switch for huge pages of memfds, and back at the end.
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
    let host = Host::alone()?;
    let config = "/run/figures.toml";
    fs::write(config, "max_vcpus = 1\n")?;
    let mut exits = Vec::new();
    for (name, value) in [("2 MiB pages", "advise"), ("4 KiB pages", "never")] {
        let _pages = HugePages::set(value)?;
        let pod = host.start(
            "figures",
            &["--runtime-config-path", config],
            &["sleep", "1000"],
        )?;
        let path = pod.state_folder().join("figures.json");
        until("figures.json", Duration::from_secs(10), || {
            read(&path).is_ok_and(|all| all["first_instruction"].is_object())
        })?;
        let all = read(&path)?;
        for (moment, key) in [
            ("agent's dial", "agent_dial"),
            ("first instruction", "first_instruction"),
        ] {
            let at = &all[key];
            let number = |field: &str| {
                at[field]
                    .as_u64()
                    .ok_or_else(|| failure(format!("{field}: {all}")))
            };
            figures::note(&format!(
                "one vCPU, {name}: from the first KVM_RUN to the {moment}: {} exits ({} to the VMM, {} page faults), {} ms; guest memory resident {:.1} MiB",
                number("exits")?,
                number("user_exits")?,
                number("page_faults")?,
                number("elapsed_ns")? / 1_000_000,
                number("resident_bytes")? as f64 / f64::from(1 << 20),
            ));
        }
        exits.push(all["agent_dial"]["exits"].as_u64().unwrap_or(0));
        let vmm = pod.process("vmm")?;
        let memory = vmm.read("smaps_rollup")?;
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

fn read(path: &Path) -> TestResult<Value> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}
