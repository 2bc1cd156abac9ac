//! Prints the figures of the house: of this tree, of another, or of two side by side.
//!
//! `house-figures [TREE]` or `house-figures BEFORE AFTER`, for example with a `git worktree` of an
//! older commit as `BEFORE`. `house-figures --floors FOLDER [TREE]` prints the rooms of a folder
//! (`vmm/src/virtio`) floor by floor, as the table of the house test wants them. `house-figures
//! --security` prints the figures of `docs/security.md`.

use std::env;
use std::path::Path;

use kata_like_tests::source::{Figures, Tree, figures, rooms, safety};
use kata_like_tests::{TestResult, failure};

fn main() -> TestResult {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    match arguments[..] {
        ["--floors", folder] => floors(Path::new(folder), own),
        ["--floors", folder, tree] => floors(Path::new(folder), tree),
        ["--security"] => {
            print!("{}", safety(&Tree::load(Path::new(own))?));
            Ok(())
        }
        [] => print(&[own]),
        [one] => print(&[one]),
        [before, after] => print(&[before, after]),
        _ => Err(failure(
            "usage: house-figures [--security | [--floors FOLDER] [TREE [TREE]]]",
        )),
    }
}

fn print(trees: &[&str]) -> TestResult {
    let mut measured = Vec::new();
    for tree in trees {
        measured.push(figures(&Tree::load(Path::new(tree))?));
    }
    // A crate that only one of the trees has stands where it stands there.
    let mut order: Vec<(&str, &str)> = Vec::new();
    for of in &measured {
        let mut after = 0;
        for key in keys(of) {
            match order.iter().position(|known| *known == key) {
                Some(known) => after = known + 1,
                None => {
                    order.insert(after, key);
                    after += 1;
                }
            }
        }
    }
    for (part, what) in order {
        print!("{what:<50}");
        for of in &measured {
            let value = keys(of).position(|key| key == (part, what));
            let value = value.map_or("-", |row| of.rows[row].value.as_str());
            print!("{value:>14}");
        }
        println!();
    }
    for (tree, of) in trees.iter().zip(&measured) {
        let tree = Path::new(tree).canonicalize()?;
        println!("\n{}:", tree.display());
        for detail in &of.details {
            println!("  {detail}");
        }
    }
    Ok(())
}

/// What tells the rows apart: an indented row belongs to the last one that is not.
fn keys(figures: &Figures) -> impl Iterator<Item = (&str, &str)> {
    figures.rows.iter().scan("", |part, row| {
        if !row.what.starts_with(' ') {
            *part = &row.what;
        }
        Some((*part, row.what.as_str()))
    })
}

fn floors(folder: &Path, tree: &str) -> TestResult {
    let tree = Tree::load(Path::new(tree))?;
    for of in &tree.crates {
        if !folder.starts_with(of.folder.join("src")) {
            continue;
        }
        let drawn = rooms(&tree, of, folder, &of.arrows);
        let floors = drawn.graph.floors();
        for floor in (0..=floors.iter().copied().max().unwrap_or_default()).rev() {
            let rooms = drawn.rooms.iter().zip(&floors);
            let here = rooms
                .filter(|(_, on)| **on == floor)
                .map(|(room, _)| room.as_str());
            println!("\"{}\",", here.collect::<Vec<_>>().join(" "));
        }
        return Ok(());
    }
    Err(failure(format!(
        "no crate has a folder {}",
        folder.display()
    )))
}
