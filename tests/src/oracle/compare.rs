//! Compares two reports, and makes a table of the differences.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::Value;

use super::reasons::{REASONS, reason_of};
use super::{Outcome, Pair};

/// One value that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Where in the report, from the top.
    pub path: Vec<String>,
    /// Under runc; null if it has none.
    pub runc: Value,
    /// Under kata-like.
    pub ours: Value,
}

impl Difference {
    /// The path as text.
    pub fn place(&self) -> String {
        self.path.join(" > ")
    }
}

/// All values in which the two outcomes differ.
pub fn differences(pair: &Pair) -> Vec<Difference> {
    let mut found = Vec::new();
    match (&pair.runc, &pair.ours) {
        (Outcome::Report(runc), Outcome::Report(ours)) => {
            descend(&mut Vec::new(), runc, ours, &mut found);
        }
        // The two need not use the same words.
        (Outcome::Refused(_), Outcome::Refused(_)) | (Outcome::Failed(_), Outcome::Failed(_)) => {}
        (runc, ours) => found.push(Difference {
            path: vec!["outcome".into()],
            runc: text(runc).into(),
            ours: text(ours).into(),
        }),
    }
    found
}

fn text(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Report(_) => "a report".into(),
        Outcome::Refused(why) => format!("refused: {why}"),
        Outcome::Failed(why) => format!("started, and failed: {why}"),
        Outcome::Broken(why) => format!("the test failed: {why}"),
    }
}

fn descend(path: &mut Vec<String>, runc: &Value, ours: &Value, found: &mut Vec<Difference>) {
    if runc == ours {
        return;
    }
    match (runc, ours) {
        (Value::Object(left), Value::Object(right)) => {
            let keys: BTreeSet<_> = left.keys().chain(right.keys()).collect();
            for key in keys {
                path.push(key.clone());
                descend(path, &runc[key], &ours[key], found);
                path.pop();
            }
        }
        _ => found.push(Difference {
            path: path.clone(),
            runc: runc.clone(),
            ours: ours.clone(),
        }),
    }
}

/// The table of all cases, and below it each difference without a reason.
pub fn table(pairs: &[Pair]) -> String {
    let mut table = format!(
        "{:46} | equal       | seconds   | differences by reason\n{:-<47}|-------------|-----------|---\n",
        "case", ""
    );
    let mut rest = String::new();
    let mut seen = BTreeSet::new();
    for pair in pairs {
        let mut counts = vec![0; REASONS.len()];
        let mut unexplained = 0;
        for difference in differences(pair) {
            if let Some(reason) = reason_of(&difference, pair) {
                counts[reason] += 1;
                seen.insert(reason);
                continue;
            }
            unexplained += 1;
            let _ = writeln!(
                rest,
                "{}: {}\n    runc      {}\n    kata-like {}",
                pair.name,
                difference.place(),
                difference.runc,
                difference.ours
            );
        }
        let mut reasons: Vec<_> = counts
            .iter()
            .enumerate()
            .filter(|(_, count)| **count > 0)
            .map(|(reason, count)| format!("{} ({count})", REASONS[reason].name))
            .collect();
        if unexplained > 0 {
            reasons.push(format!("WITHOUT A REASON ({unexplained})"));
        }
        let equal = match (unexplained, reasons.is_empty(), &pair.runc) {
            (1.., ..) => "NO",
            (_, _, Outcome::Refused(_)) => "both refuse",
            (_, _, Outcome::Failed(_)) => "both fail",
            (_, true, _) => "yes",
            (_, false, _) => "but",
        };
        let _ = writeln!(
            table,
            "{:46} | {equal:11} | {:4.1} {:4.1} | {}",
            pair.name,
            pair.took[0].as_secs_f64(),
            pair.took[1].as_secs_f64(),
            reasons.join(", ")
        );
    }
    let _ = writeln!(
        table,
        "\n{} cases; {} of {} reasons seen:",
        pairs.len(),
        seen.len(),
        REASONS.len()
    );
    for reason in &REASONS {
        let _ = writeln!(table, "  {:20} {}", reason.name, reason.text);
    }
    if !rest.is_empty() {
        let _ = write!(table, "\nWithout a reason:\n{rest}");
    }
    table
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn pair(runc: Outcome, ours: Outcome) -> Pair {
        Pair {
            name: "a case",
            runc,
            ours,
            took: [Duration::ZERO; 2],
        }
    }

    #[test]
    fn each_value_that_differs_is_named_with_its_place() {
        let runc = Outcome::Report(json!({"a": {"b": 1, "same": [1]}, "gone": "x"}));
        let ours = Outcome::Report(json!({"a": {"b": 2, "same": [1]}, "new": null}));
        let found = differences(&pair(runc, ours));
        let places: Vec<_> = found.iter().map(Difference::place).collect();
        assert_eq!(places, ["a > b", "gone"]);
        assert_eq!((&found[0].runc, &found[0].ours), (&json!(1), &json!(2)));
    }

    #[test]
    fn two_refusals_are_equal_and_a_failed_test_is_equal_to_nothing() {
        let refused = |why: &str| Outcome::Refused(why.into());
        let failed = |why: &str| Outcome::Failed(why.into());
        let broken = || Outcome::Broken("no report".into());
        let report = || Outcome::Report(json!({}));
        assert_eq!(differences(&pair(refused("a"), refused("b"))), []);
        assert_eq!(differences(&pair(failed("a"), failed("b"))), []);
        for (runc, ours) in [
            (refused("a"), report()),
            (failed("a"), refused("a")),
            (broken(), broken()),
            (report(), broken()),
        ] {
            assert_eq!(differences(&pair(runc, ours)).len(), 1);
        }
    }

    #[test]
    fn what_has_no_reason_is_shown_whole() {
        let runc = Outcome::Report(json!({"process": {"cwd": "/"}}));
        let ours = Outcome::Report(json!({"process": {"cwd": "/tmp"}}));
        let table = table(&[pair(runc, ours)]);
        assert!(table.contains("| NO "), "{table}");
        assert!(
            table.contains("a case: process > cwd\n    runc      \"/\"\n    kata-like \"/tmp\""),
            "{table}"
        );
    }
}
