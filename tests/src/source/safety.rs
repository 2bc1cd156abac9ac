//! The figures of `docs/security.md`: what each thread may call, how much code is `unsafe`, how
//! much is tested and fuzzed. `house-figures --security` prints them.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use kata_like_jail::lists::PROCESSES;

use super::tree::{File, Tree};

/// Numbers that grow with each change are rounded down to this, so that a page need not.
const ROUND: usize = 100;

/// The table, as Markdown.
pub fn safety(tree: &Tree) -> String {
    let mut table = String::from("| what | how many |\n|---|---|\n");
    let mut row = |what: &str, value: String| {
        // Writing to a string does not fail.
        let _ = writeln!(table, "| {what} | {value} |");
    };
    for process in PROCESSES {
        for thread in process.threads {
            let what = format!("system calls: {}, {}", process.name, thread.name);
            row(&what, thread.calls().len().to_string());
        }
    }
    let of = |file: &File| {
        let blocks = file.facts.unsafe_blocks.iter();
        blocks.filter(|place| !place.test).count()
    };
    let blocks: usize = tree.product().map(of).sum();
    row("unsafe blocks in what is shipped", blocks.to_string());
    let is_test = |line: &&str| matches!(line.trim(), "#[test]" | "#[tokio::test]");
    let tests = |file: &File| file.text.lines().filter(is_test).count();
    row("tests", rounded(tree.files.iter().map(tests).sum()));
    let corpora = folders(&tree.top.join("fuzz/corpus"));
    row("fuzz targets", corpora.len().to_string());
    row("inputs in their corpora", rounded(corpora.iter().sum()));
    table
}

fn rounded(number: usize) -> String {
    match number / ROUND * ROUND {
        0 => format!("fewer than {ROUND}"),
        least => format!("{least} or more"),
    }
}

/// How many files each folder in this one has: a fuzz target's corpus is a folder.
fn folders(top: &Path) -> Vec<usize> {
    let Ok(entries) = fs::read_dir(top) else {
        return Vec::new();
    };
    let count =
        |entry: std::io::Result<fs::DirEntry>| Some(fs::read_dir(entry.ok()?.path()).ok()?.count());
    entries.filter_map(count).collect()
}
