//! The rules about who names whom inside a crate: no circles, and floors.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kata_like_tests::source::{Arrow, Crate, Graph, Tree, rooms};

use crate::rules::{Complaint, TABLES};
use crate::tables::{FLOORS, KNOTS};

/// No file and no room is reached from itself.
pub fn circles(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    for of in &tree.crates {
        wrong.extend(circles_among(tree, of, &without_knots(tree, of)));
    }
    wrong
}

/// Each listed room has a floor, and its arrows go down.
pub fn floors(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    for of in &tree.crates {
        wrong.extend(floors_among(tree, of, &without_knots(tree, of)));
    }
    for (folder, _) in FLOORS {
        let folder = Path::new(folder);
        if !tree.product().any(|file| file.path.starts_with(folder)) {
            let what = format!("FLOORS: no folder {}", folder.display());
            wrong.push(Complaint::new("floor", Path::new(TABLES), 1, what));
        }
    }
    wrong
}

/// Each exception is one: with it alone there is a circle, or an arrow up.
pub fn exceptions(tree: &Tree) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    let mut known = [false; KNOTS.len()];
    for of in &tree.crates {
        let rest = without_knots(tree, of);
        for arrow in &of.arrows {
            let Some(knot) = knot(tree, arrow) else {
                continue;
            };
            let mut with = rest.clone();
            with.push(arrow.clone());
            known[knot] = !circles_among(tree, of, &with).is_empty()
                || !floors_among(tree, of, &with).is_empty();
        }
    }
    for ((from, to), known) in KNOTS.iter().zip(known) {
        if !known {
            let what = format!("KNOTS: not needed any more: {from} names {to}");
            wrong.push(Complaint::new("knot", Path::new(TABLES), 1, what));
        }
    }
    wrong
}

/// Which exception an arrow is.
fn knot(tree: &Tree, arrow: &Arrow) -> Option<usize> {
    let (from, to) = (&tree.files[arrow.from].path, &tree.files[arrow.to].path);
    KNOTS
        .iter()
        .position(|(knot, other)| from == Path::new(knot) && to == Path::new(other))
}

fn without_knots(tree: &Tree, of: &Crate) -> Vec<Arrow> {
    let mut all = of.arrows.clone();
    all.retain(|arrow| knot(tree, arrow).is_none());
    all
}

fn complaint(tree: &Tree, rule: &'static str, arrow: &Arrow, why: &str) -> Complaint {
    let to = tree.files[arrow.to].path.display();
    let what = format!("{} is in {to}: {why}", arrow.path);
    Complaint::new(rule, &tree.files[arrow.from].path, arrow.line, what)
}

fn circles_among(tree: &Tree, of: &Crate, arrows: &[Arrow]) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    let pairs = arrows.iter().map(|arrow| (arrow.from, arrow.to));
    for circle in Graph::new(tree.files.len(), pairs).circles() {
        let inside = |file| circle.contains(file);
        let of_it = arrows
            .iter()
            .filter(|arrow| inside(&arrow.from) && inside(&arrow.to));
        wrong.extend(of_it.map(|arrow| complaint(tree, "circle", arrow, "a circle of files")));
    }
    for folder in folders(tree, of) {
        let drawn = rooms(tree, of, &folder, arrows);
        for circle in drawn.graph.circles() {
            let inside = |room| circle.contains(room);
            let of_it = drawn
                .arrows
                .iter()
                .filter(|(from, to, _)| inside(from) && inside(to));
            let why = format!("a circle of rooms in {}", folder.display());
            wrong.extend(of_it.map(|(_, _, arrow)| complaint(tree, "circle", arrow, &why)));
        }
    }
    wrong
}

/// The folders that have files of the crate's product.
fn folders(tree: &Tree, of: &Crate) -> BTreeSet<PathBuf> {
    let files = of.modules.iter().map(|module| &tree.files[module.file]);
    files
        .filter(|file| file.product)
        .filter_map(|file| Some(file.path.parent()?.to_owned()))
        .collect()
}

fn floors_among(tree: &Tree, of: &Crate, arrows: &[Arrow]) -> Vec<Complaint> {
    let mut wrong = Vec::new();
    for (folder, floors) in FLOORS {
        let folder = Path::new(folder);
        if !folder.starts_with(of.folder.join("src")) {
            continue;
        }
        let drawn = rooms(tree, of, folder, arrows);
        if drawn.rooms.is_empty() {
            continue;
        }
        let floor = |room: &str| {
            let here = |floor: &&str| floor.split(' ').any(|on| on == room);
            floors.iter().position(here)
        };
        for room in &drawn.rooms {
            if floor(room).is_none() {
                let what = format!("FLOORS: the room {room} has no floor");
                wrong.push(Complaint::new("floor", folder, 1, what));
            }
        }
        for listed in floors.iter().flat_map(|floor| floor.split(' ')) {
            if !drawn.rooms.iter().any(|room| room == listed) {
                let what = format!("FLOORS: there is no room {listed}");
                wrong.push(Complaint::new("floor", folder, 1, what));
            }
        }
        for (from, to, arrow) in &drawn.arrows {
            let (from, to) = (&drawn.rooms[*from], &drawn.rooms[*to]);
            // Floors are listed from the top.
            if floor(from) >= floor(to) {
                let why = format!("{to} is not below {from}");
                wrong.push(complaint(tree, "floor", arrow, &why));
            }
        }
    }
    wrong
}
