//! A tree of sources: its crates, the modules of each, and the file that each module stands in.
//!
//! Modules are found as the compiler finds them: from a crate's roots through `mod`, `#[path]` and
//! `#[cfg(test)]` included. A file that is not found so is in no crate.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::facts::{Child, Facts};
use crate::{TestResult, failure};

/// A source file.
#[derive(Debug)]
pub struct File {
    /// From the top of the tree.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
    /// What the text says.
    pub facts: Arc<Facts>,
    /// Whether it is compiled into what is installed, and not only into tests.
    pub product: bool,
}

/// A module of a crate: a file, or a part of one.
#[derive(Debug)]
pub struct Module {
    /// The index in [`Tree::files`].
    pub file: usize,
    /// The index in the file's [`Facts::modules`].
    pub part: usize,
    /// The module that declares it; none for a root.
    pub parent: Option<usize>,
    /// The modules that it declares.
    pub children: BTreeMap<String, usize>,
    /// Whether only tests have it.
    pub test: bool,
}

/// Code in a file names an item of another file of the same crate. Both are indices of files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrow {
    /// Whose code it is.
    pub from: usize,
    /// Whom it names.
    pub to: usize,
    /// The first line that does.
    pub line: usize,
    /// As it is written there.
    pub path: String,
}

/// A crate's folder with what its manifest and its roots say.
#[derive(Debug)]
pub struct Crate {
    /// From the top of the tree.
    pub folder: PathBuf,
    /// The package's.
    pub name: String,
    /// The packages of ours in its `[dependencies]`, each with the manifest's line.
    pub dependencies: Vec<(String, usize)>,
    /// Those of all roots; a parent stands before its children.
    pub modules: Vec<Module>,
    /// The root of the library, if there is one.
    pub library: Option<usize>,
    /// Who names whom: one arrow for each pair of the product's files.
    pub arrows: Vec<Arrow>,
}

/// All sources below a folder.
#[derive(Debug)]
pub struct Tree {
    /// The folder that was read.
    pub top: PathBuf,
    /// All Rust files, by their path.
    pub files: Vec<File>,
    /// Documents and manifests: their paths and texts.
    pub others: Vec<(PathBuf, String)>,
    /// By their folders' paths.
    pub crates: Vec<Crate>,
}

impl Tree {
    /// Reads what is below `top`, without `target` folders. The arrows are still to be drawn.
    pub(super) fn read(top: &Path) -> TestResult<Self> {
        let mut tree = Self {
            top: top.to_owned(),
            files: Vec::new(),
            others: Vec::new(),
            crates: Vec::new(),
        };
        let (sources, others) = found(top)?;
        for path in sources {
            let text = fs::read_to_string(top.join(&path))?;
            let facts = facts(&path, &text)?;
            tree.files.push(File {
                path,
                text,
                facts,
                product: false,
            });
        }
        if tree.files.is_empty() {
            return Err(failure(format!("no Rust file below {}", top.display())));
        }
        for path in others {
            let text = fs::read_to_string(top.join(&path))?;
            let folder = path.parent().unwrap_or(Path::new("")).to_owned();
            if path.ends_with("Cargo.toml") && text.contains("[package]") {
                tree.a_crate(folder, &text)?;
            }
            tree.others.push((path, text));
        }
        for of in &tree.crates {
            let tests = of.folder.starts_with("tests");
            for module in &of.modules {
                let file = &mut tree.files[module.file];
                file.product |= module.part == 0 && !module.test && !tests;
            }
        }
        Ok(tree)
    }

    /// The index of a file.
    pub fn file(&self, path: &Path) -> Option<usize> {
        self.files
            .binary_search_by(|file| file.path.as_path().cmp(path))
            .ok()
    }

    /// The files of the product.
    pub fn product(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.product)
    }

    fn a_crate(&mut self, folder: PathBuf, manifest: &str) -> TestResult {
        let mut roots: Vec<PathBuf> = ["src/lib.rs", "src/main.rs", "build.rs"]
            .iter()
            .map(|root| folder.join(root))
            .collect();
        for place in ["src/bin", "tests", "benches", "examples"] {
            let place = folder.join(place);
            let one = self.files.iter().map(|file| &file.path).filter(|path| {
                path.parent() == Some(&place)
                    || path.ends_with("main.rs")
                        && path.parent().and_then(Path::parent) == Some(&place)
            });
            roots.extend(one.cloned());
        }
        let mut of = Crate {
            name: value(manifest, "name"),
            dependencies: dependencies(manifest),
            folder,
            modules: Vec::new(),
            library: None,
            arrows: Vec::new(),
        };
        for root in roots {
            let Some(file) = self.file(&root) else {
                continue;
            };
            let test = !root.starts_with(of.folder.join("src")) && !root.ends_with("build.rs");
            let module = self.module(&mut of, file, 0, None, test, &place_of(&root))?;
            if root.ends_with("lib.rs") {
                of.library = Some(module);
            }
        }
        self.crates.push(of);
        Ok(())
    }

    /// Adds a module and those below it. `place` is the folder of its children's files.
    fn module(
        &self,
        of: &mut Crate,
        file: usize,
        part: usize,
        parent: Option<usize>,
        test: bool,
        place: &Path,
    ) -> TestResult<usize> {
        let own = of.modules.len();
        of.modules.push(Module {
            file,
            part,
            parent,
            children: BTreeMap::new(),
            test,
        });
        let facts = Arc::clone(&self.files[file].facts);
        for child in &facts.modules[part].children {
            let test = test || child.test;
            let below = if let Some(part) = child.inline {
                self.module(of, file, part, Some(own), test, &place.join(&child.name))?
            } else {
                let (inside, place) = self.child(file, part, child, place)?;
                self.module(of, inside, 0, Some(own), test, &place)?
            };
            of.modules[own].children.insert(child.name.clone(), below);
        }
        Ok(own)
    }

    /// The file of a `mod x;`, and the folder of its own children's files.
    fn child(
        &self,
        file: usize,
        part: usize,
        child: &Child,
        place: &Path,
    ) -> TestResult<(usize, PathBuf)> {
        let parent = &self.files[file].path;
        let given = child.path.as_ref().map(|path| {
            let from = if part == 0 { parent.parent() } else { None };
            flat(&from.unwrap_or(place).join(path))
        });
        let possible = match given {
            Some(path) => vec![path],
            None => vec![
                place.join(format!("{}.rs", child.name)),
                place.join(&child.name).join("mod.rs"),
            ],
        };
        for path in possible {
            if let Some(found) = self.file(&path) {
                let below = match child.path {
                    Some(_) => path.parent().unwrap_or(place).to_owned(),
                    None => place.join(&child.name),
                };
                return Ok((found, below));
            }
        }
        let (parent, line, name) = (parent.display(), child.line, &child.name);
        Err(failure(format!("{parent}:{line}: no file for mod {name}")))
    }
}

/// The folder of a root's children: that of the root itself.
fn place_of(root: &Path) -> PathBuf {
    root.parent().unwrap_or(Path::new("")).to_owned()
}

/// A path without `..`.
fn flat(path: &Path) -> PathBuf {
    let mut flat = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                flat.pop();
            }
            other => flat.push(other),
        }
    }
    flat
}

/// The paths of all sources, and of documents and manifests, in order.
fn found(top: &Path) -> TestResult<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut sources, mut others) = (Vec::new(), Vec::new());
    let mut open = vec![top.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            if entry.file_type()?.is_dir() {
                if name != "target" && name != ".git" {
                    open.push(path);
                }
                continue;
            }
            let inside = path.strip_prefix(top)?.to_owned();
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("rs") => sources.push(inside),
                Some("md" | "toml") => others.push(inside),
                _ => {}
            }
        }
    }
    sources.sort();
    others.sort();
    Ok((sources, others))
}

/// What a text says. Each text is parsed only once, also if it stands in several trees.
fn facts(path: &Path, text: &str) -> TestResult<Arc<Facts>> {
    static KNOWN: Mutex<BTreeMap<String, Arc<Facts>>> = Mutex::new(BTreeMap::new());
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(facts) = known().get(text) {
        return Ok(Arc::clone(facts));
    }
    let facts = Arc::new(Facts::read(path, text).map_err(failure)?);
    known().insert(text.to_owned(), Arc::clone(&facts));
    Ok(facts)
}

/// The value of a key of the manifest that stands at a line's beginning.
fn value(manifest: &str, key: &str) -> String {
    manifest
        .lines()
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim().trim_matches('"').to_owned())
        .unwrap_or_default()
}

/// The packages of ours in a manifest's `[dependencies]`.
fn dependencies(manifest: &str) -> Vec<(String, usize)> {
    let mut inside = false;
    let mut found = Vec::new();
    for (number, line) in manifest.lines().enumerate() {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if inside && line.starts_with("kata-like-") {
            let name = line.split([' ', '=', '.']).next().unwrap_or_default();
            found.push((name.to_owned(), number + 1));
        }
    }
    found
}
