//! The rules of the house, as tests over the sources. Nothing here needs a host.
//!
//! - Each Rust file begins with `//! `, is declared as a module, and has at most 500 lines.
//! - A crate names only the crates below it that `tables::CRATES` gives it.
//! - A crate of others' has a reason, in a comment above it, and one in the workspace's list is in
//!   use.
//! - **No circle.** An arrow goes from file A to file B of a crate if code of A names an item that
//!   B defines. `mod` is containment and no arrow. `pub use` hands a name on and is no arrow:
//!   whoever uses the name has an arrow to the file that defines the item. Following arrows, nobody
//!   comes back to the file, and neither to the room (a module with all that is below it), in which
//!   he began. So a parent that names its children's items may not be named by them.
//! - **Floors.** `tables::FLOORS` puts each room of the larger folders on a floor. A room names
//!   only rooms on lower floors. In other folders the floors follow from the arrows.
//! - No function has more than 80 lines, and no comment line more than 100 columns.
//! - `unsafe` stands only in the places of `tables::UNSAFE`.
//! - No names that say nothing, no notes to oneself, no hosts that packages come from.
//!
//! Exceptions are listed in `tables`; one that is not needed any more is a fault too, so that the
//! lists can only get shorter. `broken` breaks each rule in a copy of the tree and sees it told.

mod broken;
mod drawing;
mod faults;
mod rules;
mod tables;

use std::path::Path;
use std::sync::LazyLock;

use kata_like_tests::source::{Tree, safety};
use kata_like_tests::{TestResult, failure};

use rules::Complaint;

/// This repository, read once for all tests.
static TREE: LazyLock<Result<Tree, String>> = LazyLock::new(|| {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let top = top.canonicalize().map_err(|error| error.to_string())?;
    Tree::load(&top).map_err(|error| error.to_string())
});

fn tree() -> TestResult<&'static Tree> {
    TREE.as_ref().map_err(|error| failure(error.as_str()))
}

/// Fails with all that a rule has to say about this tree.
fn none(rule: impl Fn(&Tree) -> Vec<Complaint>) -> TestResult {
    let complaints: Vec<String> = rule(tree()?).iter().map(Complaint::to_string).collect();
    if complaints.is_empty() {
        return Ok(());
    }
    Err(failure(format!("\n  {}", complaints.join("\n  "))))
}

#[test]
fn each_file_says_what_it_is() -> TestResult {
    none(rules::headers)
}

#[test]
fn no_file_is_too_long() -> TestResult {
    none(rules::lengths)
}

#[test]
fn each_file_is_a_module() -> TestResult {
    none(rules::orphans)
}

#[test]
fn crates_name_those_they_may() -> TestResult {
    none(rules::crates)
}

#[test]
fn each_dependency_has_a_reason() -> TestResult {
    none(rules::reasons)
}

#[test]
fn no_circle() -> TestResult {
    none(drawing::circles)
}

#[test]
fn each_room_has_a_floor_and_names_none_above() -> TestResult {
    none(drawing::floors)
}

#[test]
fn no_exception_is_left_over() -> TestResult {
    none(drawing::exceptions)
}

#[test]
fn no_function_is_too_long() -> TestResult {
    none(rules::functions)
}

#[test]
fn no_comment_is_too_wide() -> TestResult {
    none(rules::comments)
}

#[test]
fn unsafe_stands_where_it_may() -> TestResult {
    none(rules::unsafe_code)
}

#[test]
fn words() -> TestResult {
    none(rules::words)
}

/// `house-figures --security` prints what belongs there.
#[test]
fn the_page_of_security_has_its_figures() -> TestResult {
    let table = safety(tree()?);
    match include_str!("../../../docs/security.md").contains(&table) {
        true => Ok(()),
        false => Err(failure(format!("docs/security.md has not:\n{table}"))),
    }
}
