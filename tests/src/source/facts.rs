//! What one source file says about itself: its modules, the names that they define, import and use,
//! its functions, its `unsafe`, its error types and its comments.
//!
//! [`reader`] finds the rest, `comments` the comments.

use std::path::Path;

use super::comments;
use super::reader;

/// A path as it is written in the code, without generic arguments.
#[derive(Debug, Clone)]
pub struct Named {
    /// What stands between the `::`.
    pub segments: Vec<String>,
    /// Counted from one, as everywhere here.
    pub line: usize,
}

/// A name that a `use` brings into a module. A glob's name is `*`.
#[derive(Debug, Clone)]
pub struct Import {
    /// What the module calls it.
    pub name: String,
    /// Where it comes from.
    pub from: Named,
    /// `pub use`, also with a restriction: the name is handed on.
    pub public: bool,
    /// Whether only tests have it.
    pub test: bool,
}

/// A `mod` declaration.
#[derive(Debug, Clone)]
pub struct Child {
    /// What follows `mod`.
    pub name: String,
    /// Where the declaration stands.
    pub line: usize,
    /// What `#[path = "…"]` says.
    pub path: Option<String>,
    /// The index in [`Facts::modules`] if the module's body stands in the same file.
    pub inline: Option<usize>,
    /// Whether only tests have it.
    pub test: bool,
}

/// A module: the file's own (the first), or one whose body stands in the file.
#[derive(Debug, Clone, Default)]
pub struct Module {
    /// The modules that it declares.
    pub children: Vec<Child>,
    /// What it defines besides.
    pub items: Vec<String>,
    /// What it brings into scope, in function bodies too.
    pub imports: Vec<Import>,
    /// The paths in code that is not only compiled for tests.
    pub names: Vec<Named>,
    /// Whether only tests have it.
    pub test: bool,
}

/// A stretch of the file that a rule looks at.
#[derive(Debug, Clone)]
pub struct Place {
    /// The function, the type, or what else it is.
    pub name: String,
    /// The first line of it.
    pub line: usize,
    /// Lines, columns or words, by what the place is.
    pub size: usize,
    /// Whether only tests have it.
    pub test: bool,
}

/// All that the rules need to know of one file.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// How long the file is.
    pub lines: usize,
    /// Whether it begins by saying what it is.
    pub header: bool,
    /// The file's own module, and those whose bodies stand in it.
    pub modules: Vec<Module>,
    /// Functions and methods with a body, by their lines: from `fn` to the last brace.
    pub functions: Vec<Place>,
    /// Blocks and impls: what needs a `SAFETY` comment.
    pub unsafe_blocks: Vec<Place>,
    /// Functions and foreign blocks: what passes the duty on.
    pub unsafe_items: Vec<Place>,
    /// Types that are `Error`s, by a derive or an impl.
    pub errors: Vec<Place>,
    /// Doc comments, by their words.
    pub docs: Vec<Place>,
    /// Structs and enums.
    pub types: Vec<Place>,
    /// Lines with a comment, by their columns.
    pub comments: Vec<Place>,
}

impl Facts {
    /// Reads a file's text. The path only stands in the error.
    ///
    /// # Errors
    /// If the text is not Rust.
    pub fn read(path: &Path, text: &str) -> Result<Self, String> {
        let file = syn::parse_file(text).map_err(|error| {
            let line = error.span().start().line;
            format!("{}:{line}: parse: {error}", path.display())
        })?;
        let facts = Self {
            lines: text.lines().count(),
            header: text.starts_with("//! "),
            modules: vec![Module::default()],
            comments: comments::lines(text),
            ..Self::default()
        };
        Ok(reader::read(&file, facts))
    }
}
