//! Walks through a file's syntax and writes down what [`Facts`] asks for.
//!
//! `syn` parses the file. Bodies of macros are not Rust to it: there the tokens are searched for
//! paths and for `unsafe`. Strings in attributes are searched too (`#[serde(with =
//! "super::hex")]`).

use proc_macro2::{Delimiter, Literal, TokenStream, TokenTree};
use syn::visit::{self, Visit};

use super::facts::{Child, Facts, Import, Module, Named, Place};

/// Adds to `facts` what the syntax says.
pub fn read(file: &syn::File, facts: Facts) -> Facts {
    let mut reader = Reader {
        facts,
        current: 0,
        tests: 0,
        bodies: 0,
    };
    reader.visit_file(file);
    reader.facts
}

struct Reader {
    facts: Facts,
    /// The module that is being read.
    current: usize,
    /// How many enclosing items are for tests only.
    tests: usize,
    /// How many enclosing blocks there are: an item inside of one is not the module's.
    bodies: usize,
}

impl Reader {
    fn module(&mut self) -> &mut Module {
        &mut self.facts.modules[self.current]
    }

    fn place(&self, name: &syn::Ident, size: usize) -> Place {
        Place {
            name: name.to_string(),
            line: name.span().start().line,
            size,
            test: self.tests > 0,
        }
    }

    fn names(&mut self, segments: Vec<String>, line: usize) {
        if self.tests == 0 {
            self.module().names.push(Named { segments, line });
        }
    }

    fn a_type(&mut self, name: &syn::Ident, attributes: &[syn::Attribute]) {
        let place = self.place(name, 1);
        if derives_error(attributes) {
            self.facts.errors.push(place.clone());
        }
        self.facts.types.push(place);
    }

    fn defines(&mut self, name: &syn::Ident) {
        if self.bodies == 0 {
            let name = name.to_string();
            self.module().items.push(name);
        }
    }

    fn function(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let first = signature.fn_token.span.start().line;
        let last = block.brace_token.span.close().end().line;
        let place = self.place(&signature.ident, last + 1 - first);
        self.facts.functions.push(place);
    }

    fn is_unsafe(&mut self, block: bool, line: usize) {
        let place = Place {
            name: "unsafe".into(),
            line,
            size: 1,
            test: self.tests > 0,
        };
        match block {
            true => self.facts.unsafe_blocks.push(place),
            false => self.facts.unsafe_items.push(place),
        }
    }

    /// The doc comment among attributes: all its lines are one.
    fn documented(&mut self, attributes: &[syn::Attribute]) {
        let mut words = 0;
        let mut line = None;
        for attribute in attributes {
            let syn::Meta::NameValue(pair) = &attribute.meta else {
                continue;
            };
            let syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(text),
                ..
            }) = &pair.value
            else {
                continue;
            };
            if pair.path.is_ident("doc") {
                line.get_or_insert(text.span().start().line);
                words += text.value().split_whitespace().count();
            }
        }
        if let Some(line) = line {
            self.facts.docs.push(Place {
                name: "doc".into(),
                line,
                size: words,
                test: self.tests > 0,
            });
        }
    }

    /// Reads what has attributes: its doc comment, and whether it is for tests only.
    fn with(&mut self, attributes: &[syn::Attribute], inner: impl FnOnce(&mut Self)) {
        let test = attributes.iter().any(for_tests);
        self.tests += usize::from(test);
        self.documented(attributes);
        inner(self);
        self.tests -= usize::from(test);
    }

    fn imports(&mut self, tree: &syn::UseTree, before: &[String], public: bool) {
        let mut path = before.to_vec();
        let (name, line) = match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                return self.imports(&part.tree, &path, public);
            }
            syn::UseTree::Group(group) => {
                for part in &group.items {
                    self.imports(part, before, public);
                }
                return;
            }
            syn::UseTree::Name(part) => {
                if part.ident != "self" {
                    path.push(part.ident.to_string());
                }
                (path.last().cloned(), part.ident.span())
            }
            syn::UseTree::Rename(part) => {
                if part.ident != "self" {
                    path.push(part.ident.to_string());
                }
                (Some(part.rename.to_string()), part.rename.span())
            }
            syn::UseTree::Glob(part) => (Some("*".into()), part.star_token.spans[0]),
        };
        let import = Import {
            name: name.unwrap_or_default(),
            from: Named {
                segments: path,
                line: line.start().line,
            },
            public,
            test: self.tests > 0,
        };
        self.module().imports.push(import);
    }

    /// Searches tokens for paths and for `unsafe`.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut line = 0;
        let mut colons = 0;
        let mut field = false;
        for token in tokens {
            match &token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.path_ends(&mut path, line);
                        line = ident.span().start().line;
                    }
                    if !field {
                        path.push(ident.to_string());
                    }
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    if path == ["unsafe"] && group.delimiter() == Delimiter::Brace {
                        self.is_unsafe(true, line);
                    }
                    self.path_ends(&mut path, line);
                    self.tokens(group.stream());
                }
                _ => self.path_ends(&mut path, line),
            }
            colons = 0;
            field = matches!(&token, TokenTree::Punct(punct) if punct.as_char() == '.');
        }
        self.path_ends(&mut path, line);
    }

    fn path_ends(&mut self, path: &mut Vec<String>, line: usize) {
        if !path.is_empty() {
            self.names(std::mem::take(path), line);
        }
    }

    /// Strings in attributes may be paths.
    fn strings(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.strings(group.stream()),
                TokenTree::Literal(literal) => self.string(&literal),
                TokenTree::Ident(_) | TokenTree::Punct(_) => {}
            }
        }
    }

    fn string(&mut self, literal: &Literal) {
        let text = literal.to_string();
        let path = text.trim_matches('"');
        let whole = |part: &str| !part.is_empty() && part.chars().all(is_name);
        if text.len() > path.len() && path.split("::").all(whole) {
            let segments = path.split("::").map(str::to_owned).collect();
            self.names(segments, literal.span().start().line);
        }
    }
}

fn is_name(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether the attribute keeps an item out of the product.
fn for_tests(attribute: &syn::Attribute) -> bool {
    match &attribute.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) if list.path.is_ident("cfg") => {
            let words = list.tokens.to_string();
            let mut words = words.split(|character| !is_name(character));
            words.clone().any(|word| word == "test")
                && !words.any(|word| word == "not" || word == "any")
        }
        _ => false,
    }
}

fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Enum(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::ForeignMod(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Macro(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Static(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Trait(item) => &item.attrs,
        syn::Item::Type(item) => &item.attrs,
        syn::Item::Union(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether a type gets `Error` from a derive.
fn derives_error(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("derive") => list
            .tokens
            .clone()
            .into_iter()
            .any(|token| matches!(&token, TokenTree::Ident(ident) if ident == "Error")),
        _ => false,
    })
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        self.with(attributes(item), |reader| visit::visit_item(reader, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.with(&item.attrs, |reader| {
            reader.function(&item.sig, &item.block);
            visit::visit_impl_item_fn(reader, item);
        });
    }

    fn visit_impl_item_const(&mut self, item: &'ast syn::ImplItemConst) {
        self.with(&item.attrs, |reader| {
            visit::visit_impl_item_const(reader, item);
        });
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.with(&item.attrs, |reader| {
            if let Some(block) = &item.default {
                reader.function(&item.sig, block);
            }
            visit::visit_trait_item_fn(reader, item);
        });
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        self.with(&field.attrs, |reader| visit::visit_field(reader, field));
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        self.with(&variant.attrs, |reader| {
            visit::visit_variant(reader, variant);
        });
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        let path = item.attrs.iter().find_map(|attribute| {
            let syn::Meta::NameValue(pair) = &attribute.meta else {
                return None;
            };
            match &pair.value {
                syn::Expr::Lit(syn::ExprLit {
                    lit: syn::Lit::Str(text),
                    ..
                }) if pair.path.is_ident("path") => Some(text.value()),
                _ => None,
            }
        });
        let test = self.tests > 0;
        let inline = item.content.is_some().then_some(self.facts.modules.len());
        self.module().children.push(Child {
            name: item.ident.to_string(),
            line: item.ident.span().start().line,
            path,
            inline,
            test,
        });
        if let Some(inside) = inline {
            self.facts.modules.push(Module {
                test,
                ..Module::default()
            });
            let outside = std::mem::replace(&mut self.current, inside);
            visit::visit_item_mod(self, item);
            self.current = outside;
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if item.leading_colon.is_none() {
            let public = !matches!(item.vis, syn::Visibility::Inherited);
            self.imports(&item.tree, &[], public);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.defines(&item.sig.ident);
        self.function(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        if let syn::Safety::Unsafe(token) = &signature.safety {
            self.is_unsafe(false, token.span.start().line);
        }
        visit::visit_signature(self, signature);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.defines(&item.ident);
        self.a_type(&item.ident, &item.attrs);
        visit::visit_item_struct(self, item);
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.defines(&item.ident);
        self.a_type(&item.ident, &item.attrs);
        visit::visit_item_enum(self, item);
    }

    fn visit_item_union(&mut self, item: &'ast syn::ItemUnion) {
        self.defines(&item.ident);
        visit::visit_item_union(self, item);
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.defines(&item.ident);
        visit::visit_item_trait(self, item);
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.defines(&item.ident);
        visit::visit_item_type(self, item);
    }

    fn visit_item_const(&mut self, item: &'ast syn::ItemConst) {
        self.defines(&item.ident);
        visit::visit_item_const(self, item);
    }

    fn visit_item_static(&mut self, item: &'ast syn::ItemStatic) {
        self.defines(&item.ident);
        visit::visit_item_static(self, item);
    }

    fn visit_item_macro(&mut self, item: &'ast syn::ItemMacro) {
        if let Some(name) = &item.ident {
            self.defines(name);
        }
        visit::visit_item_macro(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if let Some(token) = &item.unsafety {
            self.is_unsafe(true, token.span.start().line);
        }
        if let (Some((of, _)), syn::Type::Path(whom)) = (&item.trait_, &*item.self_ty)
            && let (Some(of), Some(whom)) = (of.segments.last(), whom.path.segments.last())
            && of.ident == "Error"
        {
            let place = self.place(&whom.ident, 1);
            self.facts.errors.push(place);
        }
        visit::visit_item_impl(self, item);
    }

    fn visit_item_foreign_mod(&mut self, item: &'ast syn::ItemForeignMod) {
        if let Some(token) = &item.unsafety {
            self.is_unsafe(false, token.span.start().line);
        }
        visit::visit_item_foreign_mod(self, item);
    }

    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.is_unsafe(true, block.unsafe_token.span.start().line);
        visit::visit_expr_unsafe(self, block);
    }

    fn visit_block(&mut self, block: &'ast syn::Block) {
        self.bodies += 1;
        visit::visit_block(self, block);
        self.bodies -= 1;
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            let segments: Vec<String> = path
                .segments
                .iter()
                .map(|segment| segment.ident.to_string())
                .collect();
            let line = path
                .segments
                .first()
                .map(|first| first.ident.span().start().line);
            self.names(segments, line.unwrap_or_default());
        }
        visit::visit_path(self, path);
    }

    /// `pub(in crate::x)` names a module and no item.
    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {}

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        match &attribute.meta {
            syn::Meta::List(list) => {
                self.strings(list.tokens.clone());
                self.tokens(list.tokens.clone());
            }
            syn::Meta::Path(_) | syn::Meta::NameValue(_) => {}
        }
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        self.visit_path(&call.path);
        self.tokens(call.tokens.clone());
    }
}
