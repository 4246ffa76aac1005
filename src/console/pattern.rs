//! The pattern of `--expect`, searched in one line.

use super::lines::{Extent, Line};
use regex::bytes::Regex;
use regex_automata::{Input, meta, util::syntax};
use std::borrow::Cow;
use std::sync::OnceLock;

/// One text for each kind of character that `\b`, `\B` and the like tell apart, with and without Unicode: a word character,
/// one that is not, one that is by Unicode only, and bytes that are not UTF-8. What a line has is neither LF nor CR.
const NEXT: [&[u8]; 4] = [b"x", b"-", "é".as_bytes(), b"\xff"];
/// The limits of the crate regex, so that what it compiles can be compiled here.
const NFA_BYTES: usize = 10 << 20;
const CACHE_BYTES: usize = 2 << 20;

/// The regular expression of `--expect`, compiled once for each console.
pub(super) struct Pattern {
    regex: Regex,
    /// The same, for a search in a part of a text, made when the first long line comes; `None` where it cannot be made.
    in_part: OnceLock<Option<meta::Regex>>,
}

impl Pattern {
    pub(super) fn new(regex: Regex) -> Self {
        Self { regex, in_part: OnceLock::new() }
    }

    /// Returns what the pattern matches in `line`. Bytes that are not UTF-8 match as themselves, and as U+FFFD. In the beginning
    /// of a long line, only a match is returned that the line has whatever follows.
    pub(super) fn find<'a>(&self, line: Line<'a>) -> Option<Cow<'a, [u8]>> {
        let text = match line.extent {
            Extent::Whole => line.text,
            Extent::Beginning => without_partial_character(line.text),
        };
        if let Some(found) = self.find_in(text, line.extent) {
            return Some(Cow::Borrowed(found));
        }
        match String::from_utf8_lossy(text) {
            Cow::Borrowed(_) => None,
            Cow::Owned(text) => self.find_in(text.as_bytes(), line.extent).map(|found| Cow::Owned(found.to_vec())),
        }
    }

    fn find_in<'a>(&self, text: &'a [u8], extent: Extent) -> Option<&'a [u8]> {
        match extent {
            Extent::Whole => self.regex.find(text).map(|found| found.as_bytes()),
            Extent::Beginning => self.find_in_beginning(text),
        }
    }

    /// Searches for a match that ends in `text`, behind which the line goes on. A match is decided by its bytes and by the character
    /// behind it. So it must be there for each kind of character that can follow.
    fn find_in_beginning<'a>(&self, text: &'a [u8]) -> Option<&'a [u8]> {
        let regex = self.in_part.get_or_init(|| in_part(&self.regex)).as_ref()?;
        let mut line = Vec::with_capacity(text.len() + 2);
        let mut found = None;
        for next in NEXT {
            line.clear();
            line.extend(text.iter().chain(next));
            found = Some(regex.find(Input::new(&line).range(..text.len()))?);
        }
        text.get(found?.range())
    }
}

/// Compiles a regular expression as the crate regex does for bytes.
fn in_part(regex: &Regex) -> Option<meta::Regex> {
    let config =
        meta::Config::new().utf8_empty(false).nfa_size_limit(Some(NFA_BYTES)).hybrid_cache_capacity(CACHE_BYTES);
    meta::Builder::new().configure(config).syntax(syntax::Config::new().utf8(false)).build(regex.as_str()).ok()
}

/// Removes the first bytes of a character of UTF-8 whose other bytes may follow.
fn without_partial_character(text: &[u8]) -> &[u8] {
    let partial = (1..=3).find(|count| {
        let end = text.len().checked_sub(*count).and_then(|at| text.get(at..)).unwrap_or_default();
        std::str::from_utf8(end).is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
    });
    &text[..text.len() - partial.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::select;

    fn pattern(text: &str) -> Pattern {
        Pattern::new(Regex::new(text).expect("valid"))
    }

    fn found(pattern: &Pattern, text: &[u8], extent: Extent) -> Option<Vec<u8>> {
        pattern.find(Line { text, extent }).map(Cow::into_owned)
    }

    #[test]
    fn a_match_that_only_some_lines_have_is_none_in_a_beginning() {
        for text in
            [r"^[^!]*$", r"^[a-z =.-]*$", r"fail=1$", r"fail=1\b", r"fail=1\B", r"(?-u:fail=1\b)|fail=1x", r"1(-|x|\b)"]
        {
            assert_eq!(found(&pattern(text), b"tests: fail=1", Extent::Beginning), None, "{text}");
        }
        assert_eq!(found(&pattern(r"fail=1\b"), b"fail=1\xc3", Extent::Beginning), None, "half of a letter");
        assert_eq!(found(&pattern("\u{fffd}"), b"fail=1\xc3", Extent::Beginning), None, "half of a letter");
    }

    #[test]
    fn a_match_that_every_line_has_is_one_in_a_beginning() {
        let text = b"tests: \xff fail=1";
        for (pattern_text, expected) in [
            ("fail=1", &b"fail=1"[..]),
            ("=1.*", b"=1"),
            (r"\bfail\b", b"fail"),
            (r"fail=1(\b|\B)", b"fail=1"),
            ("^tests: \u{fffd} f", "tests: \u{fffd} f".as_bytes()),
            ("^", b""),
        ] {
            assert_eq!(
                found(&pattern(pattern_text), text, Extent::Beginning).as_deref(),
                Some(expected),
                "{pattern_text}"
            );
        }
    }

    /// A part of a line: letters of one and two bytes, parts of them, and what is none.
    fn part(bytes: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
        let pieces = select(vec![
            &b"a"[..],
            b"b",
            b"1",
            b"-",
            b"!",
            b" ",
            "é".as_bytes(),
            "–".as_bytes(),
            b"\xc3",
            b"\xa9",
            b"\xff",
        ]);
        proptest::collection::vec(pieces, bytes).prop_map(|pieces| pieces.concat())
    }

    fn patterns() -> impl Strategy<Value = String> {
        let piece = select(vec![
            "a",
            "b",
            "1",
            "-",
            "!",
            ".",
            "é",
            "\u{fffd}",
            r"(?-u:\xff)",
            r"(?-u:\xc3)",
            r"[^!]",
            r"[^a]*",
            ".*",
            r"\b",
            r"\B",
            r"(?-u:\b)",
            r"(?-u:\B)",
            "$",
            "(?m:$)",
            "^",
            r"\z",
            r"\b{end}",
            r"\b{end-half}",
            r"\w",
            r"(?-u:\W)",
            "|",
            "(a|1)?",
        ]);
        proptest::collection::vec(piece, 1..7).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        #[test]
        fn a_match_in_a_beginning_is_one_of_the_whole_line(
            pattern_text in patterns(),
            kept in part(0..12),
            dropped in proptest::collection::vec(part(1..4), 1..8),
        ) {
            let Ok(regex) = Regex::new(&pattern_text) else { return Ok(()) };
            let pattern = Pattern::new(regex);
            if found(&pattern, &kept, Extent::Beginning).is_some() {
                for dropped in dropped {
                    let line = [&kept[..], &dropped].concat();
                    prop_assert!(found(&pattern, &line, Extent::Whole).is_some(), "{pattern_text} {line:?}");
                }
            }
        }
    }
}
