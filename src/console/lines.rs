//! Cuts the output of a console into lines, as a terminal shows them: without escape sequences and without NUL and BEL.
//!
//! A line ends at LF, at CR LF, or at CR; more than one CR in a row, with or without an LF behind them, is one end. A CR at the
//! beginning of a line ends nothing. What the pieces are in which the bytes come makes no difference.

/// Bytes of a line that are kept. The rest of a longer line is dropped.
pub(super) const LINE_BYTES: usize = 64 << 10;

const BEL: u8 = 0x07;
const CAN: u8 = 0x18;
const SUB: u8 = 0x1a;
const ESC: u8 = 0x1b;

/// A line without its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// The text, at most `LINE_BYTES`.
    pub text: &'a [u8],
    /// How much of the line it is.
    pub extent: Extent,
}

/// How much of a line there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// The line from its beginning to its end.
    Whole,
    /// The beginning of a line that is longer than `LINE_BYTES`.
    Beginning,
}

/// Where the parser is in an escape sequence (ECMA-48).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// In text, outside of any sequence.
    #[default]
    Text,
    /// Behind ESC, and behind intermediate bytes that followed it.
    Escape,
    /// In a control sequence: behind ESC `[`.
    Control,
    /// In a control string, such as a window title: behind ESC and one of `]PX^_`. It ends with BEL, CAN, SUB or ESC `\`.
    String,
}

/// The line of a console that has not ended.
#[derive(Default)]
pub struct Lines {
    text: Vec<u8>,
    extent: Option<Extent>,
    state: State,
    /// The last line was ended by CR, and nothing but CR has come since.
    after_cr: bool,
}

impl Lines {
    /// Takes output, and calls `each` with every line that ends in it.
    pub fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(Line<'_>)) {
        for &byte in bytes {
            match byte {
                b'\r' => {
                    self.state = State::Text;
                    if !self.text.is_empty() {
                        self.end(&mut each);
                        self.after_cr = true;
                    }
                }
                b'\n' => {
                    self.state = State::Text;
                    if !std::mem::take(&mut self.after_cr) {
                        self.end(&mut each);
                    }
                }
                byte => self.take(byte),
            }
        }
    }

    fn end(&mut self, each: &mut impl FnMut(Line<'_>)) {
        each(Line { text: &self.text, extent: self.extent.take().unwrap_or(Extent::Whole) });
        self.text.clear();
    }

    /// Takes a byte that ends no line. An escape sequence that is wrong ends with the byte that is; what follows is text.
    fn take(&mut self, byte: u8) {
        self.state = match (self.state, byte) {
            (State::String, BEL) => State::Text,
            // It ends every sequence, and begins one. The second byte of ESC `\` is a sequence of its own.
            (_, ESC) => State::Escape,
            (State::Escape | State::Control | State::String, CAN | SUB) => State::Text,
            (State::String, _) => State::String,
            (State::Escape, b'[') => State::Control,
            (State::Escape, b']' | b'P' | b'X' | b'^' | b'_') => State::String,
            (State::Escape, 0x20..=0x2f) => State::Escape,
            (State::Escape, 0x30..=0x7e) => State::Text,
            (State::Control, 0x20..=0x3f) => State::Control,
            (State::Control, 0x40..=0x7e) => State::Text,
            (state, 0 | BEL) => state,
            (_, byte) => {
                self.push(byte);
                State::Text
            }
        };
    }

    fn push(&mut self, byte: u8) {
        self.after_cr = false;
        if self.text.len() < LINE_BYTES {
            self.text.push(byte);
        } else {
            self.extent = Some(Extent::Beginning);
        }
    }

    /// Returns the line that has not ended, where there is something of it.
    #[must_use]
    pub fn unfinished(&self) -> Option<Line<'_>> {
        let extent = self.extent.unwrap_or(Extent::Whole);
        (!self.text.is_empty()).then_some(Line { text: &self.text, extent })
    }
}

/// Removes the prefixes of printk: `<3>`, `[    1.234567]`, `[    T1]`.
#[must_use]
pub fn without_prefix(mut line: &[u8]) -> &[u8] {
    loop {
        line = line.trim_ascii_start();
        let close = match line.first() {
            Some(b'[') => b']',
            Some(b'<') => b'>',
            _ => return line,
        };
        // What lockdep prints in brackets is the message itself.
        if line.starts_with(b"[ BUG: ") || line.starts_with(b"[ INFO: ") {
            return line;
        }
        let Some(at) = line.iter().take(40).position(|byte| *byte == close) else { return line };
        line = &line[at + 1..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The lines of these pieces, and what is left.
    fn lines<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<(Vec<u8>, Extent)> {
        let (mut lines, mut seen) = (Lines::default(), Vec::new());
        for piece in pieces {
            lines.feed(piece, |line| seen.push((line.text.to_vec(), line.extent)));
        }
        seen.extend(lines.unfinished().map(|line| (line.text.to_vec(), line.extent)));
        seen
    }

    fn texts(output: &[u8]) -> Vec<String> {
        lines([output]).into_iter().map(|(text, _)| text.escape_ascii().to_string()).collect()
    }

    #[test]
    fn a_line_ends_at_lf_cr_lf_and_cr() {
        assert_eq!(texts(b"a\nb\r\nc\rd\r\r\ne"), ["a", "b", "c", "d", "e"]);
        assert_eq!(texts(b"a\n\nb\r\n\r\n\rc"), ["a", "", "b", "", "c"]);
        assert_eq!(texts(b"10%\r20%\r\n"), ["10%", "20%"]);
    }

    #[test]
    fn escape_sequences_are_no_text() {
        assert_eq!(texts(b"\x1b[1;32mlogin:\x1b[0m\x1b(B\x1b7\x1bc"), ["login:"]);
        assert_eq!(texts(b"\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\x1bP1$r\x1b\\"), ["ab"]);
        assert_eq!(texts(b"\0a\0b\x07\0"), ["ab"]);
        assert_eq!(texts(b"a\x1b[3\xffb\x1b[1\x18c"), ["a\\xffbc"], "wrong sequences");
        assert_eq!(texts(b"a\x1b]0;without an end\nb\x1b[1"), ["a", "b"], "no sequence goes beyond its line");
        assert_eq!(texts(b"\xff\xc3\xa4\x9b1m"), ["\\xff\\xc3\\xa4\\x9b1m"], "bytes that are not ASCII stay");
    }

    #[test]
    fn the_rest_of_a_long_line_is_dropped() {
        let mut output = vec![b'x'; LINE_BYTES];
        assert_eq!(lines([&output[..]]), [(output.clone(), Extent::Whole)]);
        output.extend(b"yz\nw");
        assert_eq!(
            lines([&output[..]]),
            [(output[..LINE_BYTES].to_vec(), Extent::Beginning), (b"w".to_vec(), Extent::Whole)]
        );
        let mut endless = Lines::default();
        (0..1000).for_each(|_| endless.feed(&[b'x'; 1000], |line| panic!("{line:?}")));
        assert!(endless.text.capacity() <= 2 * LINE_BYTES);
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            output in proptest::collection::vec(
                prop_oneof![Just(b'\r'), Just(b'\n'), Just(ESC), Just(b'['), Just(b']'), Just(b'm'), Just(BEL), any::<u8>()],
                0..200,
            ),
            cuts in proptest::collection::vec(0_usize..200, 0..20),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(output.len())).collect();
            cuts.extend([0, output.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|pair| &output[pair[0]..pair[1]]);
            prop_assert_eq!(lines(pieces), lines([&output[..]]));
        }
    }
}
