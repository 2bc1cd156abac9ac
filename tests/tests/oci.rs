//! The OCI spec in the guest, by the oracle: a container sees what it would see under runc, except
//! for a written list of reasons. `src/oracle` has the catalogue, the comparison and the reasons.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use kata_like_tests::oracle::catalogue::{REFUSED, cases};
use kata_like_tests::oracle::compare::differences;
use kata_like_tests::oracle::reasons::{REASONS, reason_of};
use kata_like_tests::oracle::{ONLY, Oracle, Outcome, Pair};
use kata_like_tests::{Host, TestResult, failure, kata_like_only};

/// Where users read about the differences.
const LIMITATIONS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/limitations.md");

/// What has been seen.
struct Seen {
    /// The catalogue under both runtimes.
    pairs: Vec<Pair>,
    /// The refused cases, and the words that must name the field.
    refused: Vec<(&'static str, Outcome)>,
}

/// Runs everything once for all tests, in one pod of each runtime.
fn seen() -> TestResult<&'static Seen> {
    static SEEN: OnceLock<Result<Seen, String>> = OnceLock::new();
    let run = || -> TestResult<Seen> {
        let host = Host::shared()?;
        let oracle = Oracle::new(&host)?;
        let pairs = oracle.run(&cases())?;
        kata_like_tests::oracle::keep(&pairs, "oracle")?;
        let refused = REFUSED
            .iter()
            .map(|(field, case)| Ok((*field, oracle.ours(case)?)))
            .collect::<TestResult<_>>()?;
        Ok(Seen { pairs, refused })
    };
    let seen = SEEN.get_or_init(|| run().map_err(|error| error.to_string()));
    seen.as_ref().map_err(|error| failure(error.clone()))
}

fn pairs() -> TestResult<&'static [Pair]> {
    Ok(&seen()?.pairs)
}

/// Whether only a few cases run, which prove nothing about the whole.
fn is_part() -> bool {
    std::env::var_os(ONLY).is_some_and(|only| !only.is_empty())
}

#[test]
fn a_container_sees_what_it_sees_under_runc() -> TestResult {
    let unexplained: Vec<_> = pairs()?.iter().flat_map(unexplained).collect();
    assert!(unexplained.is_empty(), "without a reason: {unexplained:#?}");
    Ok(())
}

fn unexplained(pair: &Pair) -> Vec<String> {
    let differences = differences(pair).into_iter();
    differences
        .filter(|difference| reason_of(difference, pair).is_none())
        .map(|difference| format!("{}: {}", pair.name, difference.place()))
        .collect()
}

/// Users should not read a reason that no longer explains anything.
#[test]
fn each_reason_is_still_one_and_in_the_documentation() -> TestResult {
    assert!(REASONS.len() <= 12, "{}", REASONS.len());
    let text = std::fs::read_to_string(LIMITATIONS)?;
    for reason in &REASONS {
        assert!(
            text.contains(&format!("| **{}** | ", reason.name)),
            "{}",
            reason.name
        );
    }
    if is_part() {
        return Ok(());
    }
    let mut seen = BTreeSet::new();
    for pair in pairs()? {
        seen.extend(
            differences(pair)
                .iter()
                .filter_map(|difference| reason_of(difference, pair)),
        );
    }
    assert_eq!(seen.len(), REASONS.len(), "only seen: {seen:?}");
    Ok(())
}

/// A case tests nothing if its container sees what one of the default spec sees.
#[test]
fn each_case_shows_something() -> TestResult {
    if is_part() {
        return Ok(());
    }
    let pairs = pairs()?;
    let mut seen = BTreeSet::new();
    let mut same = Vec::new();
    for pair in pairs {
        let text = match &pair.runc {
            Outcome::Report(report) => comparable(report).to_string(),
            // Each refusal has its own reason.
            _ => pair.name.to_owned(),
        };
        if !seen.insert(text) {
            same.push(pair.name);
        }
    }
    // In each of these cases runc does nothing, but another runtime might.
    let alike = [
        "containerd's default, alone",
        "no capabilities object",
        "a root that is a slave",
        "the pod's PID namespace",
        "the pod's ipc",
        "the pod's names",
        "mappings without a user namespace",
    ];
    same.retain(|name| !alike.contains(name));
    assert!(same.is_empty(), "see what another case sees: {same:?}");
    Ok(())
}

/// A report without the names that each container has of its own.
fn comparable(report: &serde_json::Value) -> serde_json::Value {
    let mut report = report.clone();
    for mount in report["places"]["mounts"]
        .as_object_mut()
        .into_iter()
        .flat_map(|all| all.values_mut())
    {
        mount["root"] = serde_json::Value::Null;
    }
    report
}

/// What is not supported is refused, and the error names the field.
#[test]
fn what_is_not_done_is_refused_by_its_field() -> TestResult {
    kata_like_only!();
    for (field, outcome) in &seen()?.refused {
        match outcome {
            Outcome::Refused(why) => assert!(why.contains(field), "{field}: {why}"),
            other => panic!("{field} was not refused: {other:?}"),
        }
    }
    Ok(())
}
