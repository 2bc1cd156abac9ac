//! The OCI spec in the guest, by the oracle: what a container sees is what it would see under runc, but for
//! a written list of reasons. `src/oracle` has the catalogue, the comparison and the reasons.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use kata_like_tests::oracle::catalogue::cases;
use kata_like_tests::oracle::compare::{differences, table, whole};
use kata_like_tests::oracle::reasons::reason_of;
use kata_like_tests::oracle::{Oracle, Pair, REPORT};
use kata_like_tests::{Host, TestResult, failure};

/// The catalogue under both runtimes, once for all tests.
fn pairs() -> TestResult<&'static [Pair]> {
    static PAIRS: OnceLock<Result<Vec<Pair>, String>> = OnceLock::new();
    let run = || -> TestResult<Vec<Pair>> {
        let host = Host::shared()?;
        let pairs = Oracle::new(&host)?.run(&cases())?;
        let table = table(&pairs);
        // Shown whether the tests pass or not: libtest keeps only what the macros print.
        std::io::stdout().write_all(table.as_bytes())?;
        if let Some(path) = std::env::var_os(REPORT).map(PathBuf::from) {
            std::fs::write(&path, &table)?;
            std::fs::write(path.with_extension("json"), whole(&pairs))?;
        }
        Ok(pairs)
    };
    let pairs = PAIRS.get_or_init(|| run().map_err(|error| error.to_string()));
    pairs.as_deref().map_err(|error| failure(error.clone()))
}

#[test]
fn a_container_sees_what_it_sees_under_runc() -> TestResult {
    let mut unexplained = 0;
    for pair in pairs()? {
        let all = differences(pair);
        unexplained += all
            .iter()
            .filter(|difference| reason_of(difference, pair).is_none())
            .count();
    }
    assert_eq!(
        unexplained, 0,
        "differences without a reason; see the table"
    );
    Ok(())
}
