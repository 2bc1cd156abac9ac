//! The figures by which the house is judged: how big, how tangled, how much is written twice.

use super::facts::{Facts, Place};
use super::graph::Graph;
use super::rooms::rooms;
use super::tree::{Crate, File, Tree};

/// No function is longer.
pub const MOST_LINES: usize = 80;

/// No comment is wider.
pub const MOST_COLUMNS: usize = 100;

/// The forms that a request to create a container has on its way from containerd to the program
/// that becomes the container: whose they are, and their names. Those without a folder are messages
/// and count where they are named; the others count where a type of that name is.
const FORMS: [(&str, &str); 11] = [
    ("", "CreateTaskRequest"),
    ("shim-v2", "CreateRequest"),
    ("shim-v2", "SandboxRequest"),
    ("shim-v2/src/pod/bring_up", "Request"),
    ("shim-v2", "ContainerRequest"),
    ("shim-v2/src/pod/host_side", "Request"),
    ("shim-v2", "GuestContainer"),
    ("", "CreateContainerRequest"),
    ("agent", "Creation"),
    ("agent", "GuestSpec"),
    ("agent", "InitRequest"),
];

/// How many of the longest functions are named.
const LONGEST: usize = 10;

/// How many words a doc comment needs to be worth reading.
const FEW_WORDS: usize = 2;

/// One line of the table: what it is, and how much of it.
#[derive(Debug, Clone)]
pub struct Row {
    /// What is counted.
    pub what: String,
    /// As it is printed.
    pub value: String,
}

/// All that is printed of a tree.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// The table.
    pub rows: Vec<Row>,
    /// What stands below it: names and places behind some of the rows.
    pub details: Vec<String>,
}

impl Figures {
    fn row(&mut self, what: impl Into<String>, value: impl ToString) {
        self.rows.push(Row {
            what: what.into(),
            value: value.to_string(),
        });
    }
}

/// Measures a tree.
pub fn figures(tree: &Tree) -> Figures {
    let mut figures = Figures::default();
    let product: Vec<&File> = tree.product().collect();
    let tests: Vec<&File> = tree.files.iter().filter(|file| !file.product).collect();
    let longest = product.iter().map(|file| file.facts.lines).max();
    figures.row("files of the product", product.len());
    figures.row("  lines", sum(&product, |facts| facts.lines));
    figures.row("  lines of the longest", longest.unwrap_or_default());
    figures.row("files of tests", tests.len());
    figures.row("  lines", sum(&tests, |facts| facts.lines));
    for of in &tree.crates {
        drawing(&mut figures, tree, of);
    }
    functions(&mut figures, &product, &tests);
    let blocks = |facts: &Facts| shipped(&facts.unsafe_blocks);
    figures.row("unsafe blocks and impls", sum(&product, blocks));
    let items = |facts: &Facts| shipped(&facts.unsafe_items);
    figures.row("unsafe functions and foreign blocks", sum(&product, items));
    figures.row("error types", sum(&product, |facts| shipped(&facts.errors)));
    forms(&mut figures, &product);
    let few = |facts: &Facts| {
        let few = |doc: &&Place| (1..=FEW_WORDS).contains(&doc.size);
        facts.docs.iter().filter(few).count()
    };
    let words = format!("doc comments of at most {FEW_WORDS} words");
    figures.row(words, sum(&product, few));
    let wide = |facts: &Facts| {
        let wide = |comment: &&Place| comment.size > MOST_COLUMNS;
        facts.comments.iter().filter(wide).count()
    };
    let comments = format!("comment lines above {MOST_COLUMNS} columns: product");
    figures.row(comments, sum(&product, wide));
    figures.row("  tests", sum(&tests, wide));
    figures
}

fn sum(files: &[&File], count: impl Fn(&Facts) -> usize) -> usize {
    files.iter().map(|file| count(&file.facts)).sum()
}

/// Those that are not for tests only.
fn shipped(places: &[Place]) -> usize {
    places.iter().filter(|place| !place.test).count()
}

/// Rooms, arrows and circles of a crate.
fn drawing(figures: &mut Figures, tree: &Tree, of: &Crate) {
    let arrows = &of.arrows;
    if arrows.is_empty() {
        return;
    }
    let name = of.folder.display();
    let drawn = rooms(tree, of, &of.folder.join("src"), arrows);
    let floors = drawn.graph.floors().into_iter().max().unwrap_or_default() + 1;
    figures.row(
        format!("{name}: rooms (floors)"),
        format!("{} ({floors})", drawn.rooms.len()),
    );
    let up = drawn.graph.up();
    figures.row(
        "  arrows between rooms (up)",
        format!("{} ({up})", drawn.graph.arrows()),
    );
    let circles = drawn.graph.circles();
    for circle in &circles {
        let rooms: Vec<&str> = circle
            .iter()
            .map(|room| drawn.rooms[*room].as_str())
            .collect();
        let rooms = rooms.join(", ");
        figures
            .details
            .push(format!("circle of rooms in {name}: {rooms}"));
    }
    figures.row("  circles of rooms (rooms in them)", circled(&circles));
    let files = Graph::new(
        tree.files.len(),
        arrows.iter().map(|arrow| (arrow.from, arrow.to)),
    );
    let up = files.up();
    figures.row(
        "  arrows between files (up)",
        format!("{} ({up})", files.arrows()),
    );
    let circles = files.circles();
    for circle in &circles {
        let paths: Vec<String> = circle
            .iter()
            .map(|file| {
                let path = &tree.files[*file].path;
                let short = path.strip_prefix(&of.folder).unwrap_or(path);
                short.display().to_string()
            })
            .collect();
        let paths = paths.join(", ");
        figures
            .details
            .push(format!("circle of files in {name}: {paths}"));
    }
    figures.row("  circles of files (files in them)", circled(&circles));
}

fn circled(circles: &[Vec<usize>]) -> String {
    let points: usize = circles.iter().map(Vec::len).sum();
    format!("{} ({points})", circles.len())
}

fn functions(figures: &mut Figures, product: &[&File], tests: &[&File]) {
    let mut shipped = Vec::new();
    let mut tried = Vec::new();
    for file in product.iter().chain(tests) {
        for function in &file.facts.functions {
            match function.test || !file.product {
                true => tried.push((function.size, *file, function)),
                false => shipped.push((function.size, *file, function)),
            }
        }
    }
    let long = |functions: &[(usize, &File, &Place)]| {
        functions
            .iter()
            .filter(|(lines, ..)| *lines > MOST_LINES)
            .count()
    };
    shipped.sort_by_key(|(lines, ..)| *lines);
    let median = shipped.get(shipped.len() / 2).map(|(lines, ..)| *lines);
    figures.row("functions of the product", shipped.len());
    figures.row("  lines of the median", median.unwrap_or_default());
    let longest = shipped.last().map(|(lines, ..)| *lines);
    figures.row("  lines of the longest", longest.unwrap_or_default());
    figures.row(format!("  above {MOST_LINES} lines"), long(&shipped));
    figures.row(
        format!("functions of tests above {MOST_LINES} lines"),
        long(&tried),
    );
    for (lines, file, function) in shipped.iter().rev().take(LONGEST) {
        let (path, line, name) = (file.path.display(), function.line, &function.name);
        figures
            .details
            .push(format!("{lines} lines: {path}:{line} {name}"));
    }
}

fn forms(figures: &mut Figures, product: &[&File]) {
    let mut found = Vec::new();
    for (folder, form) in FORMS {
        let is = |file: &&&File| match folder {
            "" => named(&file.facts, form),
            _ => file.path.starts_with(folder) && typed(&file.facts, form),
        };
        if product.iter().find(is).is_some() {
            found.push(form);
        }
    }
    figures.row("forms of a request to create", found.len());
    figures.details.push(format!("forms: {}", found.join(", ")));
}

fn named(facts: &Facts, form: &str) -> bool {
    facts.modules.iter().any(|module| {
        let imports = module.imports.iter().map(|import| &import.from);
        let mut names = module.names.iter().chain(imports);
        names.any(|name| name.segments.last().is_some_and(|last| last == form))
    })
}

fn typed(facts: &Facts, form: &str) -> bool {
    facts
        .types
        .iter()
        .any(|found| found.name == form && !found.test)
}
