//! Whom a file names: from each path in the code to the file that defines what it names.
//!
//! Names are resolved as far as it takes to find a file: `crate`, `self` and `super`, modules in
//! scope, what `use` brought in (groups, renames and globs too), the crate's own library by its
//! name, and names that a module hands on by `pub use`: the arrow goes to the file that defines the
//! item, and not to the one that hands it on. Methods and fields are no names here, for their type
//! is not known; neither is a module that is named alone.

use std::collections::BTreeSet;

use super::facts::{Import, Named};
use super::tree::{Arrow, Crate, Module, Tree};

/// The arrows between the files of a crate's product, one for each pair of files.
pub fn arrows(tree: &Tree, of: &Crate) -> Vec<Arrow> {
    let resolver = Resolver { tree, of };
    let mut found = BTreeSet::new();
    for (index, module) in of.modules.iter().enumerate() {
        if module.test || !tree.files[module.file].product {
            continue;
        }
        let part = resolver.part(module);
        let imports = part
            .imports
            .iter()
            .filter(|import| !import.public && !import.test)
            .map(|import| &import.from);
        for name in part.names.iter().chain(imports) {
            let Some(to) = resolver.file_of(index, &name.segments) else {
                continue;
            };
            if to != module.file && tree.files[to].product {
                found.insert(Arrow {
                    from: module.file,
                    to,
                    line: name.line,
                    path: name.segments.join("::"),
                });
            }
        }
    }
    let mut arrows: Vec<Arrow> = found.into_iter().collect();
    arrows.dedup_by_key(|arrow| (arrow.from, arrow.to));
    arrows
}

struct Resolver<'a> {
    tree: &'a Tree,
    of: &'a Crate,
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Module(usize),
    /// Something that this module defines.
    Item(usize),
}

/// How many `use`s a name is followed through.
const MOST_USES: usize = 16;

impl<'a> Resolver<'a> {
    fn part(&self, module: &Module) -> &'a super::facts::Module {
        &self.tree.files[module.file].facts.modules[module.part]
    }

    fn file_of(&self, from: usize, path: &[String]) -> Option<usize> {
        match self.path(from, path, MOST_USES)? {
            Target::Item(module) => Some(self.of.modules[module].file),
            Target::Module(_) => None,
        }
    }

    fn root(&self, mut module: usize) -> usize {
        while let Some(parent) = self.of.modules[module].parent {
            module = parent;
        }
        module
    }

    fn path(&self, from: usize, path: &[String], left: usize) -> Option<Target> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" | "$crate" => Target::Module(self.root(from)),
            "self" => Target::Module(from),
            "super" => Target::Module(self.of.modules[from].parent?),
            "Self" => return None,
            name => match self.name(from, name, rest.is_empty(), left) {
                Some(found) => found,
                None => Target::Module(self.library(name)?),
            },
        };
        while let (Target::Module(module), Some((name, after))) = (at, rest.split_first()) {
            rest = after;
            at = match name.as_str() {
                "super" => Target::Module(self.of.modules[module].parent?),
                // Something that a macro made: the module is as near as one gets.
                name => self
                    .name(module, name, rest.is_empty(), left)
                    .unwrap_or(Target::Item(module)),
            };
        }
        Some(at)
    }

    /// The crate's own library, if that is its name: its programs and tests call it so.
    fn library(&self, name: &str) -> Option<usize> {
        let own = self.of.name.replace('-', "_") == name;
        self.of.library.filter(|_| own)
    }

    /// A name in the scope of a module. At a path's end items come before modules.
    fn name(&self, module: usize, name: &str, last: bool, left: usize) -> Option<Target> {
        let part = self.part(&self.of.modules[module]);
        let item = || {
            let defined = part.items.iter().any(|item| item == name);
            defined.then_some(Target::Item(module))
        };
        let child = || {
            let child = self.of.modules[module].children.get(name);
            child.map(|child| Target::Module(*child))
        };
        let own = if last {
            item().or_else(child)
        } else {
            child().or_else(item)
        };
        own.or_else(|| self.imported(module, &part.imports, name, left))
    }

    fn imported(&self, at: usize, all: &[Import], name: &str, left: usize) -> Option<Target> {
        let left = left.checked_sub(1)?;
        let named = all.iter().filter(|import| import.name == name);
        for Import { from, .. } in named {
            // `use log;` would lead back here.
            if from.segments != [name] {
                return self.path(at, &from.segments, left);
            }
        }
        let globs = all.iter().filter(|import| import.name == "*");
        globs
            .into_iter()
            .find_map(|glob| self.through(at, &glob.from, name, left))
    }

    fn through(&self, at: usize, glob: &Named, name: &str, left: usize) -> Option<Target> {
        match self.path(at, &glob.segments, left)? {
            Target::Module(module) => self.name(module, name, true, left),
            Target::Item(_) => None,
        }
    }
}
