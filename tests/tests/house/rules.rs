//! The rules that look at one file at a time: each gives what is wrong, with file and line.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use kata_like_tests::source::{File, MOST_COLUMNS, MOST_LINES, Place, Tree};

use crate::drawing;
use crate::tables::{CRATES, LONG, UNSAFE, WIDE};

/// No source file is longer.
const MOST_FILE_LINES: usize = 500;

/// Where the tables stand: a fault of theirs is told there.
pub const TABLES: &str = "tests/tests/house/tables.rs";

/// Something that is against a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    pub rule: &'static str,
    pub path: String,
    pub line: usize,
    pub what: String,
}

impl Complaint {
    pub fn new(rule: &'static str, path: &Path, line: usize, what: impl Into<String>) -> Self {
        Self {
            rule,
            path: path.display().to_string(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}", self.path, self.line, self.what)
    }
}

/// All that is wrong with a tree.
pub fn all(tree: &Tree) -> Vec<Complaint> {
    let rules = [
        headers,
        lengths,
        orphans,
        crates,
        reasons,
        drawing::circles,
        drawing::floors,
        drawing::exceptions,
        functions,
        comments,
        unsafe_code,
        words,
    ];
    rules.iter().flat_map(|rule| rule(tree)).collect()
}

pub fn headers(tree: &Tree) -> Vec<Complaint> {
    let bare = tree.files.iter().filter(|file| !file.facts.header);
    bare.map(|file| Complaint::new("header", &file.path, 1, "no `//!` header"))
        .collect()
}

pub fn lengths(tree: &Tree) -> Vec<Complaint> {
    let long = tree
        .files
        .iter()
        .filter(|file| file.facts.lines > MOST_FILE_LINES);
    long.map(|file| {
        let lines = file.facts.lines;
        Complaint::new("length", &file.path, lines, format!("{lines} lines"))
    })
    .collect()
}

/// Files that no crate declares: the compiler does not see them.
pub fn orphans(tree: &Tree) -> Vec<Complaint> {
    let mut known = vec![false; tree.files.len()];
    for module in tree.crates.iter().flat_map(|of| &of.modules) {
        known[module.file] = true;
    }
    let files = tree.files.iter().zip(known);
    files
        .filter(|(_, known)| !known)
        .map(|(file, _)| Complaint::new("orphan", &file.path, 1, "no crate declares it"))
        .collect()
}

pub fn crates(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    for of in &tree.crates {
        let manifest = of.folder.join("Cargo.toml");
        let listed = CRATES
            .iter()
            .find(|(folder, _)| Path::new(folder) == of.folder);
        let Some((_, allowed)) = listed else {
            wrong.push(Complaint::new("crates", &manifest, 1, "not in CRATES"));
            continue;
        };
        for (name, line) in &of.dependencies {
            if !allowed.contains(&name.as_str()) {
                let what = format!("may not depend on {name}");
                wrong.push(Complaint::new("crates", &manifest, *line, what));
            }
        }
    }
    wrong
}

/// Each crate of others' has its reason above the line that gives its version, and one of the
/// workspace's is in use.
pub fn reasons(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    let (mut offered, mut taken) = (Vec::new(), BTreeSet::new());
    let manifests = tree.others.iter();
    for (path, text) in manifests.filter(|(path, _)| path.ends_with("Cargo.toml")) {
        let (mut section, mut before) = ("", "");
        for (line, text) in (1..).zip(text.lines()) {
            if text.starts_with('[') {
                section = text;
            } else if let Some((name, how)) = text.split_once(" = ")
                && section.ends_with("dependencies]")
            {
                let ours = name.starts_with("kata-like-") || how.contains("path = ");
                if how.contains("workspace = true") {
                    taken.insert(name);
                } else if !ours && !before.starts_with("# ") {
                    let what = format!("no reason above {name}");
                    wrong.push(Complaint::new("reason", path, line, what));
                } else if section.starts_with("[workspace.") {
                    offered.push((path, line, name));
                }
            }
            before = text;
        }
    }
    let unused = offered.iter().filter(|(_, _, name)| !taken.contains(name));
    wrong.extend(unused.map(|(path, line, name)| {
        Complaint::new("reason", path, *line, format!("nobody takes {name}"))
    }));
    wrong
}

pub fn functions(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    let mut seen = [false; LONG.len()];
    for file in &tree.files {
        for function in &file.facts.functions {
            if function.size <= MOST_LINES {
                continue;
            }
            let listed = LONG
                .iter()
                .position(|(path, name)| file.path == Path::new(path) && *name == function.name);
            match listed {
                Some(listed) => seen[listed] = true,
                None => {
                    let what = format!("{} has {} lines", function.name, function.size);
                    wrong.push(Complaint::new("function", &file.path, function.line, what));
                }
            }
        }
    }
    let listed = LONG.map(|(path, name)| format!("{path} {name}"));
    wrong.extend(left_over("function", "LONG", &listed, &seen));
    wrong
}

pub fn comments(tree: &Tree) -> Vec<Complaint> {
    let wide = |file: &File| {
        let wide = |comment: &&Place| comment.size > MOST_COLUMNS;
        file.facts.comments.iter().filter(wide).cloned().collect()
    };
    let what = |place: &Place| format!("a comment of {} columns", place.size);
    listed_places(tree, "comment", ("WIDE", &WIDE), |_| true, wide, what)
}

pub fn unsafe_code(tree: &Tree) -> Vec<Complaint> {
    let places = |file: &File| {
        let all = file
            .facts
            .unsafe_blocks
            .iter()
            .chain(&file.facts.unsafe_items);
        all.filter(|place| !place.test).cloned().collect()
    };
    let what = |_: &Place| "`unsafe` is not for this place".to_owned();
    let product = |file: &File| file.product;
    listed_places(tree, "unsafe", ("UNSAFE", &UNSAFE), product, places, what)
}

/// What stands outside of the listed files and folders, and those of the list that have none.
fn listed_places(
    tree: &Tree,
    rule: &'static str,
    (name, list): (&str, &[&str]),
    concerned: impl Fn(&File) -> bool,
    places: impl Fn(&File) -> Vec<Place>,
    what: impl Fn(&Place) -> String,
) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    let mut seen = vec![false; list.len()];
    for file in tree.files.iter().filter(|file| concerned(file)) {
        let found = places(file);
        let listed = list.iter().position(|place| file.path.starts_with(place));
        match listed {
            Some(listed) => seen[listed] |= !found.is_empty(),
            None => wrong.extend(
                found
                    .iter()
                    .map(|place| Complaint::new(rule, &file.path, place.line, what(place))),
            ),
        }
    }
    let list: Vec<String> = list.iter().map(ToString::to_string).collect();
    wrong.extend(left_over(rule, name, &list, &seen));
    wrong
}

fn left_over(rule: &'static str, list: &str, entries: &[String], seen: &[bool]) -> Vec<Complaint> {
    let unseen = entries.iter().zip(seen).filter(|(_, seen)| !**seen);
    unseen
        .map(|(entry, _)| {
            let what = format!("{list}: nothing is there any more: {entry}");
            Complaint::new(rule, Path::new(TABLES), 1, what)
        })
        .collect()
}

/// Names that say nothing, notes to oneself, and hosts that packages come from.
pub fn words(tree: &Tree) -> Vec<Complaint> {
    let notes = ["TODO", "FIXME", "XXX", "HACK", "unimplemented!(", "todo!("];
    let hosts = [
        "://deb.debian",
        "://pypi",
        "://crates.io",
        "://static.crates",
        "://registry.",
    ];
    let nothing = ["common", "util", "utils", "core", "helpers", "misc"];
    let sources = tree.files.iter().map(|file| (&file.path, &file.text));
    let others = tree.others.iter().map(|(path, text)| (path, text));
    let mut wrong = Vec::new();
    for (path, text) in sources.chain(others) {
        let name = path.file_stem().unwrap_or_default();
        if nothing.iter().any(|nothing| name == *nothing) {
            wrong.push(Complaint::new("words", path, 1, "a name that says nothing"));
        }
        if path.starts_with("tests/tests/house") {
            continue;
        }
        for (line, text) in text.lines().enumerate() {
            if notes.iter().chain(&hosts).any(|word| text.contains(word)) {
                wrong.push(Complaint::new("words", path, line + 1, text.trim()));
            }
        }
    }
    wrong
}
