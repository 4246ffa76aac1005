//! Text from outside (a guest, a file, another program) as part of a line: no control characters, and bounded.

pub use hwvmm_devices::path_text::is_active;
use std::fmt::{self, Write};

/// The most that is shown of a symbol's name, in bytes of UTF-8.
pub const SYMBOL_BYTES: usize = 256;
/// The most that is shown of one text of a guest's, such as the message of its panic, in bytes of UTF-8.
pub const GUEST_BYTES: usize = 512;

/// Text of bounded length that is written piece by piece: what is written to it is escaped as by [`escape`].
#[derive(Debug)]
pub struct Bounded {
    text: String,
    limit: usize,
    cut: bool,
}

impl Bounded {
    /// Room for `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { text: String::new(), limit, cut: false }
    }

    /// Appends `c`, as in a Rust string literal where it is active: `\x1b`, `\u{202e}`.
    fn push(&mut self, c: char) -> fmt::Result {
        let before = self.text.len();
        match c {
            '\t' => self.text.write_str("\\t"),
            '\n' => self.text.write_str("\\n"),
            '\r' => self.text.write_str("\\r"),
            c if c.is_ascii() && is_active(c) => write!(self.text, "\\x{:02x}", u32::from(c)),
            c if is_active(c) => write!(self.text, "\\u{{{:x}}}", u32::from(c)),
            c => self.text.write_char(c),
        }?;
        if self.text.len() > self.limit {
            self.text.truncate(before);
            self.cut = true;
            return Err(fmt::Error);
        }
        Ok(())
    }

    /// The text, and dots where some was left out.
    #[must_use]
    pub fn into_string(mut self) -> String {
        if self.cut {
            self.text.push_str("...");
        }
        self.text
    }
}

impl Write for Bounded {
    /// Appends `text`. Returns an error if not all of it fits.
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.cut {
            return Err(fmt::Error);
        }
        text.chars().try_for_each(|c| self.push(c))
    }
}

/// Returns `text` on one line: control characters and those that change the direction of text are written as in a Rust
/// string literal. At most `limit` bytes are returned, and dots where some of the text is left out.
#[must_use]
pub fn escape(text: &str, limit: usize) -> String {
    let mut out = Bounded::new(limit);
    // An error means that the rest is left out.
    let _ = out.write_str(text);
    out.into_string()
}

/// Returns `text` for HTML, between tags or in a quoted attribute. Characters that are active, or that HTML does not have, are U+FFFD.
#[must_use]
pub fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            c if is_active(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push(char::REPLACEMENT_CHARACTER),
            c => out.push(c),
        }
    }
    out
}

/// Returns `text` with each of its lines as from [`escape`]. All lines but the first are indented: none can pass for the
/// beginning of a message of hwvmm's.
#[must_use]
pub fn escape_lines(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for line in text.lines() {
        let rest = limit.saturating_sub(out.len());
        if !out.is_empty() {
            out.push_str("\n  ");
        }
        out.push_str(&escape(line, rest));
        if out.len() >= limit {
            break;
        }
    }
    out
}

/// Returns `text` with its lines as they are and all else as from [`escape`]: for tables and other text of many lines.
#[must_use]
pub fn escape_text(text: &str) -> String {
    text.split_inclusive('\n').fold(String::with_capacity(text.len()), |mut out, line| {
        let (line, end) = line.strip_suffix('\n').map_or((line, ""), |line| (line, "\n"));
        out.push_str(&escape(line, usize::MAX));
        out.push_str(end);
        out
    })
}

/// Returns `text` with a question mark for each active character ([`is_active`]): for tables, where the width counts.
#[must_use]
pub fn plain(text: &str) -> String {
    text.chars().map(|c| if is_active(c) { '?' } else { c }).collect()
}

/// Returns JSON with the active characters ([`is_active`]) of its strings as `\uXXXX`, which means the same. Line ends
/// stay: serde_json writes them between values only.
#[must_use]
pub fn escape_json(json: &str) -> String {
    json.chars().fold(String::with_capacity(json.len()), |mut out, c| {
        if c != '\n' && is_active(c) {
            // All active characters are below U+10000: one escape each. Writing to a String cannot fail.
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn escape_sequences_are_shown_as_text() {
        assert_eq!(escape("\x1b]0;owned\x07\x1b[2Jx\r\n\t", 100), r"\x1b]0;owned\x07\x1b[2Jx\r\n\t");
        assert_eq!(escape("\u{9b}2J\u{7f}\u{202e}\u{2066}\u{2028}", 100), r"\u{9b}2J\x7f\u{202e}\u{2066}\u{2028}");
        assert_eq!(escape("päivää, 日本 \\n", 100), "päivää, 日本 \\n");
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        assert_eq!(escape("日本日本", 7), "日本...");
        assert_eq!(escape("a\x1bb", 4), "a...");
        assert_eq!(escape("abcd", 4), "abcd");
    }

    #[test]
    fn lines_behind_the_first_are_indented() {
        assert_eq!(escape_lines("a\nhwvmm: b\x1b\r\n\nc", 100), "a\n  hwvmm: b\\x1b\n  \n  c");
        assert_eq!(escape_lines("日本", 4), "日...");
    }

    #[test]
    fn escaped_json_means_the_same() {
        let value = serde_json::json!({"a\u{9b}": ["\u{7f}\x1b\n\u{202e}", 1], "日本": null});
        let json = escape_json(&format!("{value}\n"));
        assert!(!json.trim_end().chars().any(is_active) && json.ends_with('\n'), "{json:?}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).expect("JSON"), value);
    }

    proptest! {
        #[test]
        fn nothing_active_is_left(text in "\\PC*|[\\x00-\\x{2070}]*|.*", limit in 0_usize..200) {
            let out = escape(&text, limit);
            prop_assert!(!out.chars().any(is_active), "{out:?}");
            prop_assert!(out.len() <= limit + 3);
            let table = escape_text(&text);
            prop_assert!(!table.chars().any(|c| c != '\n' && is_active(c)), "{table:?}");
            prop_assert_eq!(table.matches('\n').count(), text.matches('\n').count());
            let lines = escape_lines(&text, limit);
            prop_assert!(!lines.chars().any(|c| c != '\n' && is_active(c)), "{lines:?}");
            prop_assert!(lines.len() <= limit + 6);
            prop_assert!(lines.lines().skip(1).all(|line| line.starts_with("  ") || line.is_empty()));
        }
    }
}
