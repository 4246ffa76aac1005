//! The variables of a script, and words with their values.

use super::syntax::{Piece, Word};
use std::collections::BTreeMap;

/// The most bytes that all variables have, and the most that one command has after its variables are replaced.
pub(super) const MAX_BYTES: usize = 256 << 10;
/// Variables that begin with this tell what GRUB can do, and are `y`.
const FEATURE: &str = "feature_";

/// Variables and their values.
#[derive(Clone, Debug, Default)]
pub(super) struct Variables {
    values: BTreeMap<String, String>,
    bytes: usize,
}

impl Variables {
    pub(super) fn get(&self, name: &str) -> &str {
        let known = self.values.get(name).map(String::as_str);
        known.unwrap_or(if name.starts_with(FEATURE) { "y" } else { "" })
    }

    /// Sets a variable. One that would make all of them too large is left out.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        let before = self.values.get(name).map_or(0, |before| name.len() + before.len());
        let bytes = self.bytes - before + name.len() + value.len();
        if bytes <= MAX_BYTES {
            self.bytes = bytes;
            self.values.insert(name.to_owned(), value.to_owned());
        }
    }

    /// Sets the variables of a file of grub-editenv.
    pub(super) fn load(&mut self, grubenv: &str) {
        let lines = grubenv.lines().filter(|line| !line.starts_with('#'));
        for (name, value) in lines.filter_map(|line| line.split_once('=')) {
            self.set(name.trim(), &value.replace("\\\\", "\\"));
        }
    }

    /// The words with the values of their variables. Their bytes are taken from `budget`; it is 0 where it, or [`MAX_BYTES`], was not
    /// enough, and the words are not whole then.
    pub(super) fn expand(&self, words: &[Word], budget: &mut usize) -> Vec<String> {
        let mut expanded = Vec::new();
        let mut left = MAX_BYTES;
        for word in words {
            let mut parts: Vec<String> = Vec::new();
            for piece in word {
                let (text, splits) = match piece {
                    Piece::Text(text) => (text.as_str(), false),
                    Piece::Variable { name, quoted } => (self.get(name), !quoted),
                };
                let bytes = text.len() + 1;
                let (Some(rest), Some(rest_of_budget)) = (left.checked_sub(bytes), budget.checked_sub(bytes)) else {
                    *budget = 0;
                    return expanded;
                };
                (left, *budget) = (rest, rest_of_budget);
                add(&mut parts, text, splits);
                // Text or quotes make a word even if they are empty.
                if parts.is_empty() && !splits {
                    parts.push(String::new());
                }
            }
            expanded.append(&mut parts);
        }
        expanded
    }

    /// The text with the values of its variables: `$name` or `${name}`.
    pub(super) fn expand_text(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once('$') {
            out.push_str(before);
            let inner = behind.strip_prefix('{').unwrap_or(behind);
            let end = inner.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(inner.len());
            let (name, behind_name) = inner.split_at(end);
            let value = self.get(name);
            if out.len() + value.len() > MAX_BYTES {
                return out;
            }
            out.push_str(if name.is_empty() { "$" } else { value });
            rest = behind_name.strip_prefix('}').filter(|_| behind.starts_with('{')).unwrap_or(behind_name);
        }
        out.push_str(rest);
        out
    }
}

/// Adds `text` to the last of `parts`; at its spaces new parts begin if it `splits`.
fn add(parts: &mut Vec<String>, text: &str, splits: bool) {
    let glue = |parts: &mut Vec<String>, text: &str| match parts.last_mut() {
        Some(last) => last.push_str(text),
        None => parts.push(text.to_owned()),
    };
    if !splits {
        if !text.is_empty() {
            glue(parts, text);
        }
        return;
    }
    for (index, part) in text.split_whitespace().enumerate() {
        if index == 0 && !text.starts_with(char::is_whitespace) {
            glue(parts, part);
        } else {
            parts.push(part.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::syntax::{Statement, parse};
    use super::*;

    fn expand(variables: &Variables, line: &str) -> Vec<String> {
        match &parse(line).expect("a script")[..] {
            [Statement::Command { words, .. }] => variables.expand(words, &mut usize::MAX.clone()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn values_are_words_or_parts_of_words() {
        let mut variables = Variables::default();
        variables.set("a", "x y");
        variables.set("e", "");
        assert_eq!(expand(&variables, "1$a\"$a\"2 $e \"$e\" '$a' ${feature_x}"), ["1x", "yx y2", "", "$a", "y"]);
        assert_eq!(variables.expand_text("k=$a ${a}b $ $none."), "k=x y x yb $ .");
        variables.load("# GRUB Environment Block\nsaved_entry=1>2\nkernelopts=root=UUID=1 ro\n####");
        assert_eq!((variables.get("saved_entry"), variables.get("kernelopts")), ("1>2", "root=UUID=1 ro"));
    }

    #[test]
    fn growth_has_an_end() {
        let mut variables = Variables::default();
        variables.set("a", "0123456789");
        for _ in 0..64 {
            let twice = expand(&variables, "\"$a$a\"").concat();
            variables.set("a", &twice);
        }
        assert!(variables.get("a").len() <= MAX_BYTES);
        let many = expand(&variables, &"\"$a\" ".repeat(10_000));
        assert!(many.concat().len() <= MAX_BYTES);
    }
}
