//! Reads the sources of this repository, or of another state of it, as data: for the house test and
//! for the program `house-figures`.

use std::path::Path;

use crate::TestResult;

mod comments;
mod facts;
mod graph;
mod measure;
mod reader;
mod resolve;
mod rooms;
mod safety;
mod tree;

pub use facts::{Child, Facts, Import, Module, Named, Place};
pub use graph::Graph;
pub use measure::{Figures, MOST_COLUMNS, MOST_LINES, figures};
pub use rooms::{Drawing, rooms};
pub use safety::safety;
pub use tree::{Arrow, Crate, File, Module as CrateModule, Tree};

impl Tree {
    /// Reads what is below `top`, without `target` folders, and draws who names whom.
    ///
    /// # Errors
    /// If a file can't be read, or is not Rust, or there is none.
    pub fn load(top: &Path) -> TestResult<Self> {
        let mut tree = Self::read(top)?;
        let all: Vec<_> = tree
            .crates
            .iter()
            .map(|of| resolve::arrows(&tree, of))
            .collect();
        for (of, arrows) in tree.crates.iter_mut().zip(all) {
            of.arrows = arrows;
        }
        Ok(tree)
    }
}
