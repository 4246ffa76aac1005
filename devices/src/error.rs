//! Errors on one line, for log messages.

use std::error::Error;

/// Returns `error` and all its sources on one line, separated by ": ". A source whose text is already part of the line is
/// left out.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let part = cause.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the disk")]
    struct Outer(#[source] io::Error);

    #[test]
    fn each_source_is_named_once() {
        assert_eq!(chain(&Outer(io::Error::other("no such file"))), "cannot open the disk: no such file");
        assert_eq!(chain(&Outer(io::Error::other("the disk"))), "cannot open the disk");
    }
}
