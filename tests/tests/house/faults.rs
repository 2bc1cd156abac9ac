//! `docs/faults.md` and the tests are one: each fault is shown by tests that exist, and none of the
//! tests that inject faults is missing from the page.

use std::fs;
use std::path::{Path, PathBuf};

use kata_like_tests::{TestResult, failure};

/// The binaries whose tests all inject faults.
const BINARIES: [&str; 3] = ["faults", "fail_points", "swapper"];

/// A row: the fault, what must follow, and the tests.
struct Row {
    fault: String,
    tests: Vec<String>,
}

fn rows(page: &str) -> Vec<Row> {
    let lines = page.lines().filter(|line| line.starts_with("| "));
    lines
        .skip(1)
        .map(|line| {
            let cells: Vec<_> = line.split('|').map(str::trim).collect();
            let last = cells.get(3).copied().unwrap_or_default();
            Row {
                fault: cells.get(1).copied().unwrap_or_default().to_owned(),
                tests: last
                    .split('`')
                    .filter(|word| word.contains("::"))
                    .map(str::to_owned)
                    .collect(),
            }
        })
        .collect()
}

/// The files that a test binary is made of.
fn files_of(top: &Path, binary: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in ["tests/tests", "vmm/tests"] {
        files.push(top.join(folder).join(format!("{binary}.rs")));
        let entries = fs::read_dir(top.join(folder).join(binary));
        let entries = entries.into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    files
}

/// The names of all tests in these files.
fn tests_in(files: &[PathBuf]) -> Vec<String> {
    let mut names = Vec::new();
    for file in files {
        let text = fs::read_to_string(file).unwrap_or_default();
        let mut lines = text.lines().map(str::trim);
        while let Some(line) = lines.next() {
            if !line.starts_with("#[test]") && !line.starts_with("#[tokio::test") {
                continue;
            }
            let signature = lines.by_ref().find(|line| line.contains("fn "));
            let name = signature
                .and_then(|line| line.split_once("fn "))
                .and_then(|(_, rest)| rest.split_once('('));
            names.extend(name.map(|(name, _)| name.to_owned()));
        }
    }
    names
}

/// What is wrong between a page and the tests below `top`.
fn faults_of(page: &str, top: &Path) -> Vec<String> {
    let rows = rows(page);
    let mut wrong = Vec::new();
    for row in &rows {
        if row.tests.is_empty() {
            wrong.push(format!("no test shows: {}", row.fault));
        }
        for test in &row.tests {
            let (place, name) = test.split_once("::").unwrap_or_default();
            let files = match place.contains('/') {
                true => vec![top.join(place)],
                false => files_of(top, place),
            };
            if !tests_in(&files).iter().any(|found| found == name) {
                wrong.push(format!("there is no test {test}"));
            }
        }
    }
    for binary in BINARIES {
        for name in tests_in(&files_of(top, binary)) {
            let test = format!("{binary}::{name}");
            if !rows.iter().any(|row| row.tests.contains(&test)) {
                wrong.push(format!("not on the page: {test}"));
            }
        }
    }
    wrong
}

#[test]
fn each_fault_is_shown_by_tests_that_exist() -> TestResult {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(top.join("docs/faults.md"))?;
    assert!(rows(&page).len() > 30, "the table is not found");
    match faults_of(&page, &top) {
        none if none.is_empty() => Ok(()),
        wrong => Err(failure(format!(
            "docs/faults.md:\n  {}",
            wrong.join("\n  ")
        ))),
    }
}

#[test]
fn a_wrong_page_is_told() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = "| fault | follows | tests |\n|---|---|---|\n\
        | one | x | `faults::no_such_test` |\n| two | x | |\n";
    let wrong = faults_of(page, &top);
    for words in [
        "there is no test faults::no_such_test",
        "no test shows: two",
        "not on the page: faults::killing_the_vmm_ends_the_pod",
    ] {
        assert!(wrong.iter().any(|line| line == words), "{words}: {wrong:?}");
    }
}
