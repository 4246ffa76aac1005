//! Reads the values of options. A type implements [`Value`] once, and is then read from the command line, from the
//! `key=value` lists of other options, and from TOML.

use super::error::ValueError;
use super::spec::Items;
use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::Duration;

/// A value of an option, or of a key of an option.
pub trait Value: Clone + Send + Sync + 'static {
    /// True if TOML may have it as a number.
    const NUMBER: bool = false;
    /// True if TOML may have it as a boolean.
    const BOOLEAN: bool = false;

    /// Reads the text of the command line, which is a string of TOML as well.
    ///
    /// # Errors
    /// Returns an error that names the value if the type does not have it.
    fn parse(text: &OsStr) -> Result<Self, ValueError>;

    /// Reads a table of TOML.
    ///
    /// # Errors
    /// Returns an error if the type has no keys, or not those of the table.
    fn from_items(_items: Items) -> Result<Self, ValueError> {
        Err(ValueError::Table)
    }

    /// Returns the keys that the value takes, for help texts; `None` if it has none.
    #[must_use]
    fn usage() -> Option<String> {
        None
    }

    /// Returns clap's parser for the type.
    #[must_use]
    fn parser() -> ValueParser {
        OsStringValueParser::new().try_map(|text| Self::parse(&text)).into()
    }
}

/// Returns `text` if it is UTF-8.
pub(super) fn utf8(text: &OsStr) -> Result<&str, ValueError> {
    text.to_str().ok_or_else(|| ValueError::NotUtf8(text.to_string_lossy().into_owned()))
}

/// A value of TOML that is neither a table nor a list.
#[derive(serde::Deserialize)]
#[serde(untagged)]
pub(super) enum Scalar {
    Boolean(bool),
    Integer(i64),
    Float(f64),
    #[serde(skip)]
    Text(OsString),
    String(String),
}

impl Scalar {
    /// Reads a value of type `T`.
    pub(super) fn read<T: Value>(self) -> Result<T, ValueError> {
        let number = |text: String| {
            if T::NUMBER { T::parse(OsStr::new(&text)) } else { Err(ValueError::NotText(text)) }
        };
        match self {
            Self::Text(text) => T::parse(&text),
            Self::String(text) => T::parse(OsStr::new(&text)),
            Self::Integer(value) => number(value.to_string()),
            Self::Float(value) => number(value.to_string()),
            Self::Boolean(value) if T::BOOLEAN => T::parse(OsStr::new(if value { "true" } else { "false" })),
            Self::Boolean(value) => Err(ValueError::NotText(value.to_string())),
        }
    }
}

/// The value of a key in a table of TOML.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Entry {
    One(Scalar),
    Many(Vec<Scalar>),
}

/// Reads a [`Value`] from TOML.
struct FromToml<T>(T);

impl<'de, T: Value> Deserialize<'de> for FromToml<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor(PhantomData)).map(Self)
    }
}

struct OneVisitor<T>(PhantomData<T>);

impl<'de, T: Value> Visitor<'de> for OneVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")?;
        if T::NUMBER {
            f.write_str(", a number")?;
        }
        if T::BOOLEAN {
            f.write_str(", true or false")?;
        }
        if T::usage().is_some() {
            f.write_str(", a table")?;
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        T::parse(OsStr::new(text)).map_err(E::custom)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<T, E> {
        Scalar::Boolean(value).read().map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        Scalar::Integer(value).read().map_err(E::custom)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<T, E> {
        Scalar::Float(value).read().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let mut items = Items::default();
        while let Some((key, entry)) = map.next_entry::<String, Entry>()? {
            match entry {
                Entry::One(value) => items.push(key, value),
                Entry::Many(values) => values.into_iter().for_each(|value| items.push(key.clone(), value)),
            }
        }
        T::from_items(items).map_err(A::Error::custom)
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Value> Visitor<'de> for ListVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list, or ")?;
        OneVisitor::<T>(PhantomData).expecting(f)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        OneVisitor(PhantomData).visit_str(text).map(|value| vec![value])
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        OneVisitor(PhantomData).visit_map(map).map(|value| vec![value])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while let Some(FromToml(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values)
    }
}

/// An option as given: `Option<T>` if it is given once at most, `Vec<T>` if it may be given again.
pub(super) trait Given: Sized {
    /// True if it may be given again.
    const REPEATS: bool;

    /// Joins what the command line has with what the file has. One value of the command line replaces that of the file;
    /// a list of the command line comes behind that of the file.
    fn merge(command_line: Self, file: Self) -> Self;

    /// Reads TOML.
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

impl<T: Value> Given for Option<T> {
    const REPEATS: bool = false;

    fn merge(command_line: Self, file: Self) -> Self {
        command_line.or(file)
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor(PhantomData)).map(Some)
    }
}

impl<T: Value> Given for Vec<T> {
    const REPEATS: bool = true;

    fn merge(command_line: Self, file: Self) -> Self {
        file.into_iter().chain(command_line).collect()
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

/// For serde's `deserialize_with`.
pub(super) fn from_toml<'de, D: Deserializer<'de>, G: Given>(deserializer: D) -> Result<G, D::Error> {
    G::read(deserializer)
}

impl Value for String {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        utf8(text).map(str::to_owned)
    }

    fn parser() -> ValueParser {
        ValueParser::string()
    }
}

impl Value for PathBuf {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        if text.is_empty() { Err(ValueError::EmptyPath) } else { Ok(text.into()) }
    }

    fn parser() -> ValueParser {
        ValueParser::path_buf()
    }
}

impl Value for bool {
    const BOOLEAN: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        match utf8(text)? {
            "on" | "true" => Ok(true),
            "off" | "false" => Ok(false),
            other => Err(ValueError::Switch(other.to_owned())),
        }
    }
}

impl Value for Duration {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        parse_duration(utf8(text)?)
    }
}

/// Implements [`Value`] for enums whose words clap knows.
macro_rules! choices {
    ($($name:ty),*) => {
        $(impl $crate::config::value::Value for $name {
            fn parse(text: &std::ffi::OsStr) -> Result<Self, $crate::config::ValueError> {
                $crate::config::value::choice(text)
            }

            fn parser() -> clap::builder::ValueParser {
                clap::builder::EnumValueParser::<Self>::new().into()
            }
        })*
    };
}
pub(super) use choices;

/// Reads a word of an enum.
pub(super) fn choice<T: clap::ValueEnum>(text: &OsStr) -> Result<T, ValueError> {
    let text = utf8(text)?;
    T::from_str(text, false).map_err(|_| {
        let words = T::value_variants().iter().filter_map(clap::ValueEnum::to_possible_value);
        let choices: Vec<String> = words.map(|word| word.get_name().to_owned()).collect();
        ValueError::Choice { value: text.to_owned(), choices: choices.join(", ") }
    })
}

/// Size in bytes, written as `1G`, `512M`, `512MiB` or `65536`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bytes(pub(super) u64);

impl Value for Bytes {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        parse_size(utf8(text)?).map(Self)
    }
}

/// Text that is to be read as a number: TOML may have it as a number or as a string.
#[derive(Clone, Debug)]
pub(super) struct Digits(pub(super) String);

impl Value for Digits {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        String::parse(text).map(Self)
    }
}

/// Reads a size in bytes: `1G`, `512M`, `512MiB`, `65536`.
///
/// # Errors
/// Returns [`ValueError::Size`] if it is not a size or does not fit into 64 bits.
pub fn parse_size(text: &str) -> Result<u64, ValueError> {
    let error = || ValueError::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// Reads a time: `30s`, `500ms`, `2m`, `1h`; a number without a unit is seconds.
///
/// # Errors
/// Returns [`ValueError::Time`] if it is not a time, or zero.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    let error = || ValueError::Time(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(error()),
    };
    let number: f64 = number.parse().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * seconds).ok().filter(|time| !time.is_zero()).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        let size = |text: &str| parse_size(text).ok();
        assert_eq!(size("512M"), Some(512 << 20));
        assert_eq!(size("5g"), Some(5 << 30));
        assert_eq!(size("64KiB"), Some(65536));
        for bad in ["", "M", "1.5G", "-1", "1X", "99999999999T", " 1"] {
            assert!(matches!(parse_size(bad), Err(ValueError::Size(text)) if text == bad));
        }
    }

    #[test]
    fn times() {
        let time = |text: &str| parse_duration(text).ok();
        assert_eq!(time("30s"), Some(Duration::from_secs(30)));
        assert_eq!(time("1.5"), Some(Duration::from_millis(1500)));
        assert_eq!(time("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(time("2m"), Some(Duration::from_secs(120)));
        for bad in ["", "0", "s", "-1s", "1d", "1e9999", "inf"] {
            assert!(matches!(parse_duration(bad), Err(ValueError::Time(text)) if text == bad));
        }
    }

    #[test]
    fn switches() {
        let switch = |text: &str| bool::parse(OsStr::new(text)).ok();
        assert_eq!(
            ["on", "true", "off", "false", "1", ""].map(switch),
            [Some(true), Some(true), Some(false), Some(false), None, None]
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (parse_size(&text), parse_duration(&text));
        }
    }
}
