//! Lines out of pieces of bytes.

/// The longest line that is kept whole, in bytes. A longer one comes in parts.
const MAX_LINE: usize = 64 << 10;

/// The beginning of a line whose end has not come yet.
#[derive(Default)]
pub(super) struct Lines(Vec<u8>);

impl Lines {
    /// Takes the next bytes, and calls `each` for every line that ends in them, with its end.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(&[u8])) {
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in line.chunks(MAX_LINE) {
                self.0.extend_from_slice(piece);
                if self.0.ends_with(b"\n") || self.0.len() >= MAX_LINE {
                    self.finish(&mut each);
                }
            }
        }
    }

    /// Calls `each` for a line without an end.
    pub(super) fn finish(&mut self, mut each: impl FnMut(&[u8])) {
        if !self.0.is_empty() {
            each(&self.0);
            self.0.clear();
        }
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
        assert_eq!(lines(&[b"a\nb", b"c\r", b"\n\nd"]), [&b"a\n"[..], b"bc\r\n", b"\n", b"d"]);
        assert!(lines(&[b""]).is_empty());
    }

    #[test]
    fn a_line_without_an_end_comes_in_parts() {
        let piece = vec![b'x'; MAX_LINE / 4 * 3];
        let found = lines(&[&piece, &piece, &[b'y'; 4 * MAX_LINE]]);
        assert!(
            found.iter().all(|part| part.len() < 2 * MAX_LINE),
            "{:?}",
            found.iter().map(Vec::len).collect::<Vec<_>>()
        );
        assert_eq!(found.concat(), [&piece[..], &piece, &[b'y'; 4 * MAX_LINE]].concat(), "no byte is lost");
    }
}
