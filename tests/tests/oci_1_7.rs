//! Ten specs of the catalogue under containerd 1.7, by the same oracle.

use kata_like_tests::oracle::catalogue::{TEN, cases};
use kata_like_tests::oracle::compare::differences;
use kata_like_tests::oracle::reasons::reason_of;
use kata_like_tests::oracle::{Oracle, keep};
use kata_like_tests::{Host, TestResult, Version};

#[test]
fn ten_containers_see_what_they_see_under_runc() -> TestResult {
    let mut ten = cases();
    ten.retain(|case| TEN.contains(&case.name));
    assert_eq!(ten.len(), TEN.len(), "a case has another name by now");
    let host = Host::on(Version::V1_7, false)?;
    let pairs = Oracle::new(&host)?.run(&ten)?;
    keep(&pairs, "oracle-1.7")?;
    for pair in &pairs {
        for difference in differences(pair) {
            let explained = reason_of(&difference, pair).is_some();
            assert!(explained, "{}: {}", pair.name, difference.place());
        }
    }
    Ok(())
}
