//! Lists of `key=value` with commas between, as in `-m 512M,prefault=on`.

use thiserror::Error;

/// A list that cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KeyValueError {
    /// A key that does not exist.
    #[error("unknown key '{key}'; the keys are {}", .known.join(", "))]
    Unknown {
        /// The key.
        key: String,
        /// All keys there are.
        known: Vec<&'static str>,
    },
    /// No `=`.
    #[error("'{0}' is not key=value")]
    NoValue(String),
    /// Twice the same key.
    #[error("'{0}' is given twice")]
    Twice(String),
}

/// Splits `text` at its commas. The first item may be a bare value, which is `first`'s.
///
/// # Errors
/// Where a key is unknown, repeated, or has no value.
pub fn parse<'a>(
    text: &'a str,
    first: Option<&'static str>,
    known: &[&'static str],
) -> Result<Vec<(&'static str, &'a str)>, KeyValueError> {
    let mut found: Vec<(&'static str, &str)> = Vec::new();
    for (index, item) in text.split(',').enumerate() {
        let (key, value) = match (item.split_once('='), first) {
            (Some((key, value)), _) => {
                let Some(key) = known.iter().chain(first.iter()).find(|name| **name == key) else {
                    return Err(KeyValueError::Unknown { key: key.to_owned(), known: known.to_vec() });
                };
                (*key, value)
            }
            (None, Some(first)) if index == 0 => (first, item),
            (None, _) => return Err(KeyValueError::NoValue(item.to_owned())),
        };
        if found.iter().any(|(other, _)| *other == key) {
            return Err(KeyValueError::Twice(key.to_owned()));
        }
        found.push((key, value));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_item_may_be_bare() {
        assert_eq!(
            parse("512M,prefault=on", Some("size"), &["prefault"]),
            Ok(vec![("size", "512M"), ("prefault", "on")])
        );
        assert_eq!(parse("a=1", None, &["a"]), Ok(vec![("a", "1")]));
    }

    #[test]
    fn errors_name_what_is_known() {
        let text = parse("1G,huge=1", Some("size"), &["hugepages", "prefault"]).expect_err("unknown").to_string();
        assert!(text.contains("'huge'") && text.contains("hugepages, prefault"), "{text}");
        assert_eq!(parse("1G,x", Some("size"), &["x"]), Err(KeyValueError::NoValue("x".into())));
        assert_eq!(parse("x=1,x=2", None, &["x"]), Err(KeyValueError::Twice("x".into())));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            let _ = parse(&text, Some("size"), &["a", "b"]);
        }
    }
}
