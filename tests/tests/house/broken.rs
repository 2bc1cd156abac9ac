//! Each rule can fail: a copy of the tree with one fault in it, and exactly that rule's complaint.
//!
//! The faults are put into rooms that have long been as they are, so that the tests survive a move.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use kata_like_tests::source::Tree;
use kata_like_tests::{TestResult, failure};
use tempfile::TempDir;

use crate::rules::{self, Complaint};
use crate::tree;

/// A device of the VMM: it may not know the transport, which stands on the same floor.
const DEVICE: &str = "vmm/src/virtio/rng.rs";

/// A room on the ground floor of a crate without a list of floors.
const GROUND: &str = "vmm/boot/src/channel.rs";

/// What is wrong with the tree itself.
static BEFORE: LazyLock<Result<Vec<Complaint>, String>> = LazyLock::new(|| {
    let tree = tree().map_err(|error| error.to_string())?;
    Ok(rules::all(tree))
});

/// A copy of what the rules look at.
struct Copy(TempDir);

impl Copy {
    fn new() -> TestResult<Self> {
        let copy = Self(tempfile::tempdir()?);
        let tree = tree()?;
        for file in &tree.files {
            copy.write(&file.path, &file.text)?;
        }
        for (path, text) in &tree.others {
            copy.write(path, text)?;
        }
        Ok(copy)
    }

    fn write(&self, path: &Path, text: &str) -> TestResult {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap_or(self.0.path()))?;
        Ok(fs::write(path, text)?)
    }

    /// Adds lines to a file, and gives the number of the first one.
    fn add(&self, path: &str, lines: &str) -> TestResult<usize> {
        let old = fs::read_to_string(self.0.path().join(path))?;
        self.write(Path::new(path), &format!("{old}{lines}\n"))?;
        Ok(old.lines().count() + 1)
    }

    /// What is wrong with it and not with the tree itself.
    fn complaints(&self) -> TestResult<Vec<Complaint>> {
        let before = BEFORE.as_ref().map_err(|error| failure(error.as_str()))?;
        let mut complaints = rules::all(&Tree::load(self.0.path())?);
        complaints.retain(|complaint| !before.contains(complaint));
        Ok(complaints)
    }

    /// Exactly this rule complains, and names this place.
    fn is_told(&self, rule: &str, path: &str, line: usize) -> TestResult {
        let complaints = self.complaints()?;
        let found = complaints
            .iter()
            .any(|complaint| complaint.path == path && complaint.line == line);
        if found && complaints.iter().all(|complaint| complaint.rule == rule) {
            return Ok(());
        }
        let complaints: Vec<String> = complaints
            .iter()
            .map(|complaint| format!("{}: {complaint}", complaint.rule))
            .collect();
        let complaints = complaints.join("\n  ");
        Err(failure(format!(
            "not {rule} at {path}:{line}, but\n  {complaints}"
        )))
    }
}

/// Adds lines to a file: the rule complains about one of them.
fn added(rule: &str, path: &str, lines: &str, at: usize) -> TestResult {
    let copy = Copy::new()?;
    let first = copy.add(path, lines)?;
    copy.is_told(rule, path, first + at)
}

#[test]
fn an_import_up() -> TestResult {
    added("floor", DEVICE, "use super::mmio::Transport as _;", 0)
}

#[test]
fn an_import_up_among_others() -> TestResult {
    let lines = "use crate::{\n    layout,\n    virtio::{self as all, mmio::{Transport}},\n};";
    added("floor", DEVICE, lines, 2)
}

#[test]
fn a_path_up_in_code() -> TestResult {
    let lines = "fn up() {\n    crate::virtio::mmio::Transport::up();\n}";
    added("floor", DEVICE, lines, 1)
}

#[test]
fn a_path_up_in_a_macro() -> TestResult {
    let lines = "fn up() {\n    println!(\"{}\", super::mmio::Transport::up());\n}";
    added("floor", DEVICE, lines, 1)
}

#[test]
fn a_path_up_in_an_attribute() -> TestResult {
    let lines = "#[serde(with = \"super::mmio::Transport\")]\npub struct Up;";
    added("floor", DEVICE, lines, 0)
}

#[test]
fn a_path_up_through_the_name_of_a_module() -> TestResult {
    let lines = "use crate::virtio::mmio as under;\nfn up() {\n    under::Transport::up();\n}";
    added("floor", DEVICE, lines, 2)
}

#[test]
fn an_import_up_by_a_glob() -> TestResult {
    let lines = "use crate::virtio::mmio::*;\nfn up() {\n    Transport::up();\n}";
    added("floor", DEVICE, lines, 2)
}

#[test]
fn an_import_up_in_a_file_with_a_path() -> TestResult {
    let copy = Copy::new()?;
    copy.add(DEVICE, "#[path = \"odd.rs\"]\nmod even;")?;
    let odd = "vmm/src/virtio/odd.rs";
    copy.write(
        Path::new(odd),
        "//! Odd.\n\nuse super::super::mmio::Transport;\n",
    )?;
    let complaints = copy.complaints()?;
    // The new file is a room of its own in the drawing, and has no floor.
    let told = |path: &str| complaints.iter().any(|complaint| complaint.path == path);
    assert!(told("vmm/src/virtio") && !complaints.iter().any(|one| one.rule == "orphan"));
    Ok(())
}

#[test]
fn an_import_up_of_tests_is_none() -> TestResult {
    let copy = Copy::new()?;
    copy.add(
        DEVICE,
        "#[cfg(test)]\nmod up {\n    use crate::virtio::mmio::Transport;\n}",
    )?;
    assert_eq!(copy.complaints()?, []);
    Ok(())
}

#[test]
fn a_room_without_a_floor() -> TestResult {
    let copy = Copy::new()?;
    copy.add("vmm/src/virtio/mod.rs", "mod attic;")?;
    copy.write(Path::new("vmm/src/virtio/attic.rs"), "//! Above all.\n")?;
    copy.is_told("floor", "vmm/src/virtio", 1)
}

#[test]
fn a_circle_of_files() -> TestResult {
    added("circle", GROUND, "use crate::vm::Request as _;", 0)
}

#[test]
fn a_circle_of_a_parent_and_its_child() -> TestResult {
    let copy = Copy::new()?;
    copy.add(
        GROUND,
        "mod child;\nfn down() {\n    child::CHILD;\n}\nconst UP: u8 = 1;",
    )?;
    let child = "vmm/boot/src/channel/child.rs";
    let text = "//! Below.\n\npub(super) const CHILD: u8 = super::UP;\n";
    copy.write(Path::new(child), text)?;
    copy.is_told("circle", child, 3)
}

/// Handing on a child's name is no arrow: the child may use what its parent has.
#[test]
fn a_name_handed_on_is_no_circle() -> TestResult {
    let copy = Copy::new()?;
    copy.add(
        GROUND,
        "mod child;\npub use child::CHILD;\nconst UP: u8 = 1;",
    )?;
    let text = "//! Below.\n\npub const CHILD: u8 = super::UP;\n";
    copy.write(Path::new("vmm/boot/src/channel/child.rs"), text)?;
    assert_eq!(copy.complaints()?, []);
    Ok(())
}

/// No file comes back to itself here, but one room names the other and is named by it.
#[test]
fn a_circle_of_rooms() -> TestResult {
    let copy = Copy::new()?;
    let line = copy.add("vmm/boot/src/lib.rs", "mod one;\nmod two;")?;
    assert!(line > 1);
    for (name, other) in [("one", "two"), ("two", "one")] {
        let text = "//! A room.\n\nmod low;\nmod high;\n";
        copy.write(Path::new(&format!("vmm/boot/src/{name}.rs")), text)?;
        let text = "//! Named.\n\npub const LOW: u8 = 1;\n";
        copy.write(Path::new(&format!("vmm/boot/src/{name}/low.rs")), text)?;
        let text = format!("//! Naming.\n\nuse crate::{other}::low::LOW;\n");
        copy.write(Path::new(&format!("vmm/boot/src/{name}/high.rs")), &text)?;
    }
    copy.is_told("circle", "vmm/boot/src/two/high.rs", 3)
}

#[test]
fn a_dependency_without_a_reason() -> TestResult {
    let manifest = "tests/limits/Cargo.toml";
    added("reason", manifest, "\n[build-dependencies]\nodd = \"1\"", 2)
}

#[test]
fn a_dependency_that_nobody_takes() -> TestResult {
    let lines = "\n[workspace.dependencies]\n# For nothing.\nodd = \"1\"";
    added("reason", "Cargo.toml", lines, 3)
}

#[test]
fn a_long_function() -> TestResult {
    let lines = format!("fn long() {{\n{}}}", "    ();\n".repeat(79));
    added("function", GROUND, &lines, 0)
}

#[test]
fn a_function_that_is_just_not_too_long() -> TestResult {
    let copy = Copy::new()?;
    let lines = format!("fn long() {{\n{}}}", "    ();\n".repeat(78));
    copy.add(GROUND, &lines)?;
    assert_eq!(copy.complaints()?, []);
    Ok(())
}

#[test]
fn a_wide_comment() -> TestResult {
    added("comment", GROUND, &format!("// {}", "x".repeat(98)), 0)
}

#[test]
fn a_comment_that_is_just_not_too_wide() -> TestResult {
    let copy = Copy::new()?;
    copy.add(GROUND, &format!("// {}", "x".repeat(97)))?;
    assert_eq!(copy.complaints()?, []);
    Ok(())
}

#[test]
fn unsafe_code_in_a_place_for_none() -> TestResult {
    let lines = "fn odd() {\n    // SAFETY: never called.\n    unsafe { odd() }\n}";
    added("unsafe", DEVICE, lines, 2)
}

#[test]
fn unsafe_code_in_a_macro() -> TestResult {
    let lines = "fn odd() {\n    print!(\"{}\", unsafe { 1 });\n}";
    added("unsafe", DEVICE, lines, 1)
}

#[test]
fn a_file_without_a_header() -> TestResult {
    let copy = Copy::new()?;
    copy.add(GROUND, "mod bare;")?;
    let bare = "vmm/boot/src/channel/bare.rs";
    copy.write(Path::new(bare), "// Bare.\n")?;
    copy.is_told("header", bare, 1)
}

#[test]
fn a_long_file() -> TestResult {
    let copy = Copy::new()?;
    copy.add(GROUND, "mod long;")?;
    let long = "vmm/boot/src/channel/long.rs";
    copy.write(Path::new(long), &format!("//! Long.\n{}", "\n".repeat(500)))?;
    copy.is_told("length", long, 501)
}

#[test]
fn a_file_that_nobody_declares() -> TestResult {
    let copy = Copy::new()?;
    let lost = "vmm/boot/src/lost.rs";
    copy.write(Path::new(lost), "//! Lost.\n")?;
    copy.is_told("orphan", lost, 1)
}

#[test]
fn a_dependency_that_is_not_allowed() -> TestResult {
    let copy = Copy::new()?;
    let manifest = "vmm/boot/Cargo.toml";
    let line = copy.add(manifest, "[dependencies]\nkata-like-jail = \"0.1\"")?;
    copy.is_told("crates", manifest, line + 1)
}

#[test]
fn a_note_to_oneself() -> TestResult {
    added("words", GROUND, "// TODO: more.", 0)
}

#[test]
fn a_name_that_says_nothing() -> TestResult {
    let copy = Copy::new()?;
    copy.add(GROUND, "mod helpers;")?;
    let helpers = "vmm/boot/src/channel/helpers.rs";
    copy.write(Path::new(helpers), "//! Much.\n")?;
    copy.is_told("words", helpers, 1)
}
