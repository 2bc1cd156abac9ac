//! The tables of `docs/file-systems.md`, as what they claim.

use kata_like_tests::{TestResult, failure};

const PAGE: &str = include_str!("../../../docs/file-systems.md");

/// A line about a type of file system.
pub(super) struct FileSystem {
    /// Its name, as in `/proc/self/mountinfo`.
    pub(super) name: String,
    /// What becomes of a bind mount of one.
    pub(super) what: String,
    /// What helps if it is refused: a part of the error.
    pub(super) helps: String,
    /// Whether the tests try it.
    pub(super) tried: bool,
}

/// A line about a feature.
pub(super) struct Feature {
    /// Its name, as the probe has it.
    pub(super) name: String,
    /// The claim for each place: "as runc", or a result that runc does not have.
    pub(super) claims: Vec<String>,
}

/// The cells of the table whose first column has this name; code without its quotes.
fn table(first: &str, columns: usize) -> TestResult<Vec<Vec<String>>> {
    let cells = |line: &str| -> Vec<String> {
        let inner = line.trim_matches('|').split('|');
        inner.map(|cell| cell.trim().replace('`', "")).collect()
    };
    let lines: Vec<_> = PAGE
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {first} |")))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(cells)
        .collect();
    match lines.iter().find(|line| line.len() != columns) {
        Some(line) => Err(failure(format!("not {columns} cells: {line:?}"))),
        None if lines.is_empty() => Err(failure(format!("the page has no table of {first:?}"))),
        None => Ok(lines),
    }
}

/// The first table.
pub(super) fn file_systems() -> TestResult<Vec<FileSystem>> {
    let lines = table("file system", 4)?;
    let line = |cells: Vec<String>| {
        let [name, what, helps, tried] = <[String; 4]>::try_from(cells).unwrap_or_default();
        let tried = match tried.as_str() {
            "tried" => true,
            "not tried" => false,
            other => return Err(failure(format!("{name}: {other:?} is no answer"))),
        };
        Ok(FileSystem {
            name,
            what,
            helps,
            tried,
        })
    };
    lines.into_iter().map(line).collect()
}

/// The second table: the last column is for people.
pub(super) fn features() -> TestResult<Vec<Feature>> {
    let lines = table("feature", 5)?;
    let line = |cells: Vec<String>| {
        let claims = cells.get(1..4).unwrap_or_default().to_vec();
        let claims = claims.into_iter().filter(|claim| claim != "-").collect();
        let name = cells.into_iter().next().unwrap_or_default();
        Feature { name, claims }
    };
    Ok(lines.into_iter().map(line).collect())
}
