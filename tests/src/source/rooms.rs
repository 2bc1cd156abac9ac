//! The drawing of a folder: its rooms, and which of them name which.
//!
//! A room is a file or a folder of the folder that is drawn; `x.rs` and `x/` are one room, `x`.

use std::collections::BTreeSet;
use std::path::Path;

use super::graph::Graph;
use super::tree::{Arrow, Crate, Tree};

/// Rooms and the arrows between them.
#[derive(Debug, Clone, Default)]
pub struct Drawing {
    /// In the order of the alphabet.
    pub rooms: Vec<String>,
    /// Of rooms, by their index.
    pub graph: Graph,
    /// The arrows between files of different rooms, each with its rooms.
    pub arrows: Vec<(usize, usize, Arrow)>,
}

/// Draws a folder of a crate, of what is in the product.
pub fn rooms(tree: &Tree, of: &Crate, folder: &Path, arrows: &[Arrow]) -> Drawing {
    let room = |file: usize| room(&tree.files[file].path, folder);
    let files = of.modules.iter().map(|module| module.file);
    let rooms: BTreeSet<String> = files
        .filter(|file| tree.files[*file].product)
        .filter_map(room)
        .collect();
    let rooms: Vec<String> = rooms.into_iter().collect();
    let index = |file: usize| {
        let room = room(file)?;
        rooms.binary_search(&room).ok()
    };
    let arrows: Vec<(usize, usize, Arrow)> = arrows
        .iter()
        .filter_map(|arrow| Some((index(arrow.from)?, index(arrow.to)?, arrow.clone())))
        .filter(|(from, to, _)| from != to)
        .collect();
    let graph = Graph::new(rooms.len(), arrows.iter().map(|(from, to, _)| (*from, *to)));
    Drawing {
        rooms,
        graph,
        arrows,
    }
}

/// The room of a file; none if it is not in the folder.
fn room(path: &Path, folder: &Path) -> Option<String> {
    let inside = path.strip_prefix(folder).ok()?;
    let first = Path::new(inside.components().next()?.as_os_str());
    Some(first.file_stem()?.to_string_lossy().into_owned())
}
