//! The imports between the files of a crate, read from their text.
//!
//! A file imports another if it names an item that is defined there: by a path from `crate`, `self` or `super`, by a `use` with
//! or without braces, by a name that a `use` brought in, or by the name of a submodule. A re-export (`pub use child::Item`) is
//! followed to the file that defines the item. It is no import by the parent, and neither is `mod child;`: a parent depends on
//! a child only where it uses it. Code under `#[cfg(test)]` is left out.

mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The path of a module from the crate's root, without `crate`; empty for the root.
type Module = Vec<String>;

/// Re-exports of re-exports that are followed.
const MAX_REEXPORTS: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Separator,
    Sign(char),
}

/// What a `use` brings in.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Import {
    /// Path from the crate's root; `None` for another crate's item.
    path: Option<Vec<String>>,
    name: String,
    is_public: bool,
}

#[derive(Default)]
struct File {
    path: String,
    imports: Vec<Import>,
    /// Absolute paths that the code names.
    named: Vec<Vec<String>>,
}

/// The files of a crate and who imports whom.
pub(super) struct Graph {
    /// By file, relative to the crate's source folder: the files that it imports.
    pub(super) imports: BTreeMap<String, BTreeSet<String>>,
}

/// Cuts Rust text into words and signs. Comments, strings, characters and lifetimes are left out.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        let c = at(i);
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            while i < chars.len() {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 {
                    break;
                }
            }
        } else if c == '"' {
            i = after_string(&chars, i);
        } else if c == '\'' {
            i = after_quote(&chars, i);
        } else if is_word(c) {
            let start = i;
            while is_word(at(i)) {
                i += 1;
            }
            let word: String = chars[start..i].iter().collect();
            if matches!(word.as_str(), "r" | "br" | "cr") && matches!(at(i), '"' | '#') && is_raw_string(&chars, i) {
                i = after_raw_string(&chars, i);
            } else if !word.starts_with(|c: char| c.is_ascii_digit()) && (word != "b" || !matches!(at(i), '"' | '\'')) {
                found.push(Token::Word(word));
            }
        } else if c == ':' && at(i + 1) == ':' {
            found.push(Token::Separator);
            i += 2;
        } else {
            if !c.is_whitespace() {
                found.push(Token::Sign(c));
            }
            i += 1;
        }
    }
    found
}

fn after_string(chars: &[char], quote: usize) -> usize {
    let mut i = quote + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The place behind a character, or behind the quote of a lifetime.
fn after_quote(chars: &[char], quote: usize) -> usize {
    if chars.get(quote + 1) == Some(&'\\') {
        let end = chars.iter().skip(quote + 3).position(|c| *c == '\'');
        return end.map_or(chars.len(), |end| quote + 3 + end + 1);
    }
    if chars.get(quote + 2) == Some(&'\'') { quote + 3 } else { quote + 1 }
}

fn is_raw_string(chars: &[char], start: usize) -> bool {
    chars.iter().skip(start).find(|c| **c != '#') == Some(&'"')
}

fn after_raw_string(chars: &[char], start: usize) -> usize {
    let hashes = chars.iter().skip(start).take_while(|c| **c == '#').count();
    let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
    let mut i = start + hashes + 1;
    while i < chars.len() && !chars[i..].starts_with(&end) {
        i += 1;
    }
    i + end.len()
}

/// Reads one file.
struct Reader<'a> {
    tokens: &'a [Token],
    at: usize,
    /// The file's module, and the inline modules that are open: their names, and the depth of braces outside of each.
    module: Module,
    inline: Vec<(String, usize)>,
    depth: usize,
    children: BTreeSet<String>,
    /// Paths as they are written, with the module that they are written in. Resolved when all imports are known.
    written: Vec<(Module, Vec<String>)>,
    uses: Vec<(Module, Vec<String>, String, bool)>,
}

impl Reader<'_> {
    fn token(&self, offset: usize) -> Option<&Token> {
        self.tokens.get(self.at + offset)
    }

    fn word(&self, offset: usize) -> Option<&str> {
        match self.token(offset) {
            Some(Token::Word(word)) => Some(word),
            _ => None,
        }
    }

    fn sign(&self, offset: usize, sign: char) -> bool {
        self.token(offset) == Some(&Token::Sign(sign))
    }

    fn here(&self) -> Module {
        self.module.iter().chain(self.inline.iter().map(|(name, _)| name)).cloned().collect()
    }

    fn read(&mut self) {
        let mut is_public = false;
        while self.at < self.tokens.len() {
            if self.skip_test_code() {
                is_public = false;
                continue;
            }
            match self.word(0) {
                Some("pub") => {
                    is_public = true;
                    self.at += 1;
                    if self.sign(0, '(') {
                        self.skip_group('(', ')');
                    }
                    continue;
                }
                Some("mod") if self.word(1).is_some() => self.module_item(),
                Some("use") => self.use_item(is_public),
                Some(_) => self.path(),
                None => self.other(),
            }
            is_public = false;
        }
    }

    fn other(&mut self) {
        if self.sign(0, '{') {
            self.depth += 1;
        } else if self.sign(0, '}') {
            self.depth = self.depth.saturating_sub(1);
            if self.inline.last().is_some_and(|(_, depth)| *depth == self.depth) {
                self.inline.pop();
            }
        }
        self.at += 1;
    }

    fn skip_group(&mut self, open: char, close: char) {
        let mut depth = 0;
        while self.at < self.tokens.len() {
            if self.sign(0, open) {
                depth += 1;
            } else if self.sign(0, close) {
                depth -= 1;
            }
            self.at += 1;
            if depth == 0 {
                return;
            }
        }
    }

    /// Skips an item under `#[cfg(test)]`.
    fn skip_test_code(&mut self) -> bool {
        let is_test = self.sign(0, '#')
            && self.sign(1, '[')
            && self.word(2) == Some("cfg")
            && self.sign(3, '(')
            && self.word(4) == Some("test")
            && self.sign(5, ')')
            && self.sign(6, ']');
        if !is_test {
            return false;
        }
        self.at += 7;
        while self.at < self.tokens.len() {
            if self.sign(0, ';') {
                self.at += 1;
                break;
            }
            if self.sign(0, '{') {
                self.skip_group('{', '}');
                break;
            }
            self.at += 1;
        }
        true
    }

    fn module_item(&mut self) {
        let name = self.word(1).unwrap_or_default().to_owned();
        if self.sign(2, '{') {
            self.inline.push((name, self.depth));
            self.at += 2;
        } else {
            self.children.insert(name);
            self.at += 3;
        }
    }

    fn use_item(&mut self, is_public: bool) {
        self.at += 1;
        // `use<'a>` of a type, and not an item.
        if self.sign(0, '<') {
            return;
        }
        let mut trees = Vec::new();
        self.use_tree(&mut Vec::new(), &mut trees);
        let here = self.here();
        self.uses.extend(trees.into_iter().map(|(path, name)| (here.clone(), path, name, is_public)));
    }

    fn use_tree(&mut self, prefix: &mut Vec<String>, found: &mut Vec<(Vec<String>, String)>) {
        let length = prefix.len();
        loop {
            if self.sign(0, '{') {
                self.at += 1;
                while self.at < self.tokens.len() && !self.sign(0, '}') {
                    self.use_tree(prefix, found);
                    if self.sign(0, ',') {
                        self.at += 1;
                    }
                }
                self.at += 1;
                break;
            }
            if self.sign(0, '*') {
                self.at += 1;
                found.push((prefix.clone(), "*".into()));
                break;
            }
            let Some(word) = self.word(0).map(str::to_owned) else {
                // A leading `::`, or the end of what is understood.
                self.at += 1;
                if self.at >= self.tokens.len() || self.sign(0, ';') {
                    break;
                }
                continue;
            };
            self.at += 1;
            if word != "self" || prefix.is_empty() {
                prefix.push(word);
            }
            if self.token(0) == Some(&Token::Separator) {
                self.at += 1;
                continue;
            }
            let mut name = prefix.last().cloned().unwrap_or_default();
            if self.word(0) == Some("as") {
                name = self.word(1).unwrap_or_default().to_owned();
                self.at += 2;
            }
            found.push((prefix.clone(), name));
            break;
        }
        prefix.truncate(length);
    }

    fn path(&mut self) {
        let is_start = self.at == 0 || !matches!(&self.tokens[self.at - 1], Token::Separator | Token::Sign('.'));
        let mut path = vec![self.word(0).unwrap_or_default().to_owned()];
        self.at += 1;
        while self.token(0) == Some(&Token::Separator) && self.word(1).is_some() {
            path.push(self.word(1).unwrap_or_default().to_owned());
            self.at += 2;
        }
        if is_start && path.len() > 1 {
            self.written.push((self.here(), path));
        }
    }
}

/// Turns a path as it is written in `module` into one from the crate's root; `None` for another crate's.
fn absolute(
    module: &[String],
    path: &[String],
    children: &BTreeSet<String>,
    known: &BTreeMap<&str, Option<Vec<String>>>,
) -> Option<Vec<String>> {
    let (first, rest) = path.split_first()?;
    let mut base = match first.as_str() {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module.split_last()?.1.to_vec(),
        name if children.contains(name) => [module, &[name.to_owned()]].concat(),
        name => known.get(name)?.clone()?,
    };
    for segment in rest {
        if segment == "super" {
            base.pop();
        } else {
            base.push(segment.clone());
        }
    }
    Some(base)
}

fn read_file(path: &str, module: Module, text: &str) -> File {
    let tokens = tokens(text);
    let mut reader = Reader {
        tokens: &tokens,
        at: 0,
        module,
        inline: Vec::new(),
        depth: 0,
        children: BTreeSet::new(),
        written: Vec::new(),
        uses: Vec::new(),
    };
    reader.read();
    let Reader { children, written, uses, .. } = reader;
    let none = BTreeMap::new();
    let import = |(module, path, name, is_public): &(Module, Vec<String>, String, bool)| Import {
        path: absolute(module, path, &children, &none),
        name: name.clone(),
        is_public: *is_public,
    };
    let imports: Vec<Import> = uses.iter().map(import).collect();
    let known = imports.iter().map(|import| (import.name.as_str(), import.path.clone())).collect();
    let named = written.iter().filter_map(|(module, path)| absolute(module, path, &children, &known)).collect();
    File { path: path.to_owned(), imports, named }
}

fn module_of(path: &str) -> Module {
    let path = path.trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

impl Graph {
    /// Reads files, given as their paths below the crate's source folder and their text. `main.rs` is another crate, and is left
    /// out.
    pub(super) fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let files = files.into_iter().filter(|(path, _)| *path != "main.rs");
        let files: BTreeMap<Module, File> =
            files.map(|(path, text)| (module_of(path), read_file(path, module_of(path), text))).collect();
        let mut imports = BTreeMap::new();
        for (module, file) in &files {
            // A re-export of what lies below is no use of it.
            let used = file.imports.iter().filter(|import| {
                !import.is_public || !import.path.as_ref().is_some_and(|path| path.starts_with(module))
            });
            let used = used.filter_map(|import| import.path.as_ref()).chain(&file.named);
            let targets = used.filter_map(|path| resolve(&files, path, 0));
            let others: BTreeSet<String> = targets.filter(|target| *target != file.path).collect();
            imports.insert(file.path.clone(), others);
        }
        Self { imports }
    }

    /// Reads all files below a crate's source folder.
    pub(super) fn of_folder(folder: &Path) -> Self {
        // A folder with a Cargo.toml is a package of its own.
        let is_own = |path: &Path| {
            path.ancestors()
                .skip(1)
                .take_while(|above| *above != folder)
                .all(|above| !above.join("Cargo.toml").exists())
        };
        let texts: Vec<(String, String)> = super::sources(folder)
            .iter()
            .filter(|path| is_own(path))
            .map(|path| {
                let relative = path.strip_prefix(folder).expect("below the folder").to_string_lossy().into_owned();
                (relative, fs::read_to_string(path).expect("readable"))
            })
            .collect();
        Self::new(texts.iter().map(|(path, text)| (path.as_str(), text.as_str())))
    }

    /// Returns the circles: sets of files that import each other, directly or by way of others.
    pub(super) fn circles(&self) -> Vec<Vec<String>> {
        let reach: BTreeMap<&str, BTreeSet<&str>> =
            self.imports.keys().map(|file| (file.as_str(), self.reachable(file))).collect();
        let mut circles: BTreeSet<Vec<String>> = BTreeSet::new();
        for (file, reached) in &reach {
            if reached.contains(file) {
                let members = reached.iter().filter(|other| reach[*other].contains(file));
                circles.insert(members.map(|other| (*other).to_owned()).collect());
            }
        }
        circles.into_iter().collect()
    }

    fn reachable<'a>(&'a self, file: &str) -> BTreeSet<&'a str> {
        let mut found = BTreeSet::new();
        let mut next = vec![file.to_owned()];
        while let Some(file) = next.pop() {
            for other in self.imports.get(&file).into_iter().flatten() {
                if found.insert(other.as_str()) {
                    next.push(other.clone());
                }
            }
        }
        found
    }
}

/// The file that defines what `path` names.
fn resolve(files: &BTreeMap<Module, File>, path: &[String], reexports: usize) -> Option<String> {
    let mut length = 0;
    while length < path.len() && files.contains_key(&path[..=length]) {
        length += 1;
    }
    let file = files.get(&path[..length])?;
    let Some(name) = path.get(length) else { return Some(file.path.clone()) };
    match file.imports.iter().find(|import| import.name == *name) {
        Some(Import { path: Some(target), .. }) if reexports < MAX_REEXPORTS => {
            let rest = &path[length + 1..];
            resolve(files, &[target, rest].concat(), reexports + 1)
        }
        // Another crate's item, passed on.
        Some(Import { path: None, .. }) => None,
        _ => Some(file.path.clone()),
    }
}
