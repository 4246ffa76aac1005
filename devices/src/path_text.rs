//! Paths as text for people.

use std::ffi::OsStr;
use std::fmt::{self, Display, Formatter, Write as _};
use std::os::unix::ffi::OsStrExt as _;

/// A path, or a text that need not be UTF-8, in messages. Bytes that are not UTF-8 are shown as `\xNN`, which TOML takes in
/// `{ escaped = '...' }`; active characters ([`is_active`]) as in a string of Rust. All else is shown as it is.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(&'a OsStr);

/// Returns true if `c` could do something to a terminal or to the text around it: C0, DEL and C1 (ECMA-48), the line and
/// paragraph separators, and the characters that change the direction of text (UAX #9).
#[must_use]
pub fn is_active(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What can be shown in a message.
pub trait PathText {
    /// Returns the text without loss.
    fn shown(&self) -> Shown<'_>;
}

impl<T: AsRef<OsStr> + ?Sized> PathText for T {
    fn shown(&self) -> Shown<'_> {
        Shown(self.as_ref())
    }
}

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for chunk in self.0.as_bytes().utf8_chunks() {
            for c in chunk.valid().chars() {
                if is_active(c) { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};

    #[test]
    fn bytes_that_are_not_utf8_are_told_apart() {
        let shown = |bytes: &[u8]| Path::new(OsStr::from_bytes(bytes)).shown().to_string();
        assert_eq!(shown("/tmp/é ,'x=1".as_bytes()), "/tmp/é ,'x=1");
        assert_eq!(
            (shown(b"/a/\xff\xc3.img"), shown(b"/a/\xfe\xc3.img")),
            (r"/a/\xff\xc3.img".into(), r"/a/\xfe\xc3.img".into())
        );
        assert_eq!(shown("a\n\x1b[1m\u{9b}\u{202e}".as_bytes()), r"a\n\u{1b}[1m\u{9b}\u{202e}");
        assert_eq!((PathBuf::from("a").shown().to_string(), "b".shown().to_string()), ("a".into(), "b".into()));
    }
}
