//! Lines out of pieces of bytes.

/// The longest line that is kept whole: the statistics of a run with many devices fit. A longer one comes in parts.
const MAX_LINE: usize = 1 << 20;

/// The beginning of a line whose end has not come yet.
#[derive(Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Takes the next bytes, and calls `each` for every line that ends in them, without LF and CR.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.0.extend_from_slice(piece);
            if self.0.ends_with(b"\n") || self.0.len() >= MAX_LINE {
                self.finish(&mut each);
            }
        }
    }

    /// Calls `each` for a line without an end.
    pub(super) fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        let mut line = &self.0[..];
        if line.is_empty() {
            return;
        }
        line = line.strip_suffix(b"\n").unwrap_or(line);
        line = line.strip_suffix(b"\r").unwrap_or(line);
        each(line);
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        pieces.iter().for_each(|piece| lines.feed(piece, |line| found.push(line.to_vec())));
        lines.finish(|line| found.push(line.to_vec()));
        found
    }

    #[test]
    fn lines_are_put_together() {
        assert_eq!(lines(&[b"a\nb", b"c\r", b"\n\nd"]), [&b"a"[..], b"bc", b"", b"d"]);
        assert!(lines(&[b""]).is_empty());
    }

    #[test]
    fn a_line_without_an_end_comes_in_parts() {
        let piece = vec![b'x'; MAX_LINE / 2];
        let found = lines(&[&piece, &piece, &piece]);
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_LINE, MAX_LINE / 2]);
    }
}
