//! Errors as text.

use std::error::Error;

/// Returns an error and its sources as one line, separated by colons. A source whose text the line already has is left out.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Failed {
        text: &'static str,
        source: std::io::Error,
    }

    #[test]
    fn each_source_occurs_once() {
        let failed = |text| Failed { text, source: std::io::Error::other("why") };
        assert_eq!(chain(&failed("it failed")), "it failed: why");
        assert_eq!(chain(&failed("it failed (why)")), "it failed (why)");
    }
}
