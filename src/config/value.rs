//! Reads the values of options. A type implements [`Value`] once, and is then read from the command line, from the
//! `key=value` lists of other options, and from TOML.

use super::error::ValueError;
use super::quote::{list_item, split, unescape};
use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use hwvmm_devices::path_text::PathText as _;
use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
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
    /// Returns an error if the type has no keys, or not those of the table. A type without keys takes `{ escaped = "..." }`.
    fn from_items(items: Items) -> Result<Self, ValueError> {
        Self::parse(&items.escaped()?)
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
    text.to_str().ok_or_else(|| ValueError::NotUtf8(text.shown().to_string()))
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
    Escaped(Escaped),
}

/// Text with escapes for bytes that are not UTF-8 (see [`unescape`]).
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Escaped {
    escaped: String,
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
            Self::Escaped(Escaped { escaped }) => T::parse(&unescape(&escaped)?),
            Self::Integer(value) => number(value.to_string()),
            Self::Float(value) => number(value.to_string()),
            Self::Boolean(value) if T::BOOLEAN => T::parse(OsStr::new(if value { "true" } else { "false" })),
            Self::Boolean(value) => Err(ValueError::NotText(value.to_string())),
        }
    }
}

/// How a key is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyKind {
    /// The first value of a list may be given without the key.
    First,
    /// The key must be given.
    Required,
    /// The key may be given once.
    Optional,
    /// The key may be given more than once; in TOML it has a list of values.
    Repeated,
    /// The key may be given without a value, which means `on`.
    Switch,
}

/// A key of a value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Key {
    /// Name, the same on the command line and in TOML.
    pub(super) name: &'static str,
    /// Form of its values, for help texts and messages.
    pub(super) form: &'static str,
    /// How it is given.
    pub(super) kind: KeyKind,
}

impl Key {
    /// Returns true if its values are paths.
    fn is_path(&self) -> bool {
        matches!(self.form, "PATH" | "DIR" | "FILE")
    }
}

/// Returns true if `name`, which is no key of the option, is no key that was mistyped either: no key has a slash.
fn is_of_path(name: &OsStr) -> bool {
    name.as_bytes().contains(&b'/')
}

/// Returns true if `path` is a file, a disk or a folder. A socket is not: an earlier run can have made it by the same mistake.
fn exists(path: &OsStr) -> bool {
    let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
    kind.is_ok_and(|kind| kind.is_file() || kind.is_dir() || kind.is_block_device())
}

/// Returns the form of a whole list, such as `PATH[,readonly=on|off]`.
pub(super) fn usage(keys: &[Key]) -> String {
    let mut text = String::new();
    for Key { name, form, kind } in keys {
        let comma = if text.is_empty() { "" } else { "," };
        text += &match kind {
            KeyKind::First => (*form).to_owned(),
            KeyKind::Required => format!("{comma}{name}={form}"),
            KeyKind::Optional | KeyKind::Switch => format!("[{comma}{name}={form}]"),
            KeyKind::Repeated => format!("[{comma}{name}={form}]..."),
        };
    }
    text
}

/// Keys and values as given, in order.
#[derive(Default)]
pub struct Items(Vec<(String, Scalar)>);

impl Items {
    /// Splits the text of the command line. Every comma that is not written twice ends a value, and a key follows. An item whose
    /// key is not known belongs to the path before it in two cases: if there is a slash where the key should be, and if the path
    /// exists with it. All other unknown keys are refused.
    ///
    /// # Errors
    /// Returns [`ValueError::UnknownKey`], [`ValueError::KeyOrPath`] or [`ValueError::NoValue`].
    pub(super) fn from_text(text: &OsStr, keys: &[Key]) -> Result<Self, ValueError> {
        let mut items = Self::default();
        for (index, item) in split(text).into_iter().enumerate() {
            let first = keys.iter().find(|key| index == 0 && key.kind == KeyKind::First);
            let (name, value) = match item.as_bytes().iter().position(|byte| *byte == b'=') {
                Some(at) => {
                    let (name, value) = item.as_bytes().split_at(at);
                    (OsStr::from_bytes(name), Some(OsStr::from_bytes(&value[1..])))
                }
                None => (&*item, None),
            };
            let key = keys.iter().find(|key| name == key.name);
            match (key, value, first) {
                (Some(key), Some(value), _) => items.push(key.name.to_owned(), Scalar::Text(value.to_owned())),
                (_, None, Some(first)) => items.push(first.name.to_owned(), Scalar::Text(item)),
                (Some(Key { name, kind: KeyKind::Switch, .. }), None, None) => {
                    items.push((*name).to_owned(), Scalar::Text("on".into()));
                }
                (Some(key), None, None) => return Err(ValueError::NoValue(key.name.to_owned())),
                (None, Some(_), Some(first)) if first.is_path() => {
                    if !is_of_path(name) {
                        return Err(key_or_path(name, first, &item, keys));
                    }
                    items.push(first.name.to_owned(), Scalar::Text(item));
                }
                (None, ..) => {
                    let whole = |path: &OsString| [path, &item].map(OsString::as_os_str).join(OsStr::new(","));
                    let path = items.last_path(keys).ok_or_else(|| unknown(name, keys))?;
                    let joined = whole(path);
                    if !(is_of_path(name) || exists(&joined)) {
                        return Err(unknown(name, keys));
                    }
                    *path = joined;
                }
            }
        }
        Ok(items)
    }

    /// Returns the last value where it is a path: what follows a comma behind it can be a part of it.
    fn last_path(&mut self, keys: &[Key]) -> Option<&mut OsString> {
        let (name, Scalar::Text(value)) = self.0.last_mut()? else { return None };
        keys.iter().any(|key| key.name == name && key.is_path()).then_some(value)
    }

    /// Adds a key with its value.
    pub(super) fn push(&mut self, key: String, value: Scalar) {
        self.0.push((key, value));
    }

    /// Returns an error if there is a key that is not in `keys`, or one more often than it may be.
    pub(super) fn check(&self, keys: &[Key]) -> Result<(), ValueError> {
        for (index, (name, _)) in self.0.iter().enumerate() {
            let key = keys.iter().find(|key| key.name == name).ok_or_else(|| unknown(OsStr::new(name), keys))?;
            let again = self.0.iter().take(index).any(|(earlier, _)| earlier == name);
            if again && key.kind != KeyKind::Repeated {
                return Err(ValueError::Twice(key.name));
            }
        }
        Ok(())
    }

    /// Takes the text of `{ escaped = "..." }`.
    fn escaped(self) -> Result<OsString, ValueError> {
        match <[_; 1]>::try_from(self.0) {
            Ok([(key, Scalar::String(text))]) if key == "escaped" => unescape(&text),
            _ => Err(ValueError::Table),
        }
    }

    /// Takes all keys and values, each value read as `T`.
    pub(super) fn into_pairs<T: Value>(self) -> Result<Vec<(String, T)>, ValueError> {
        self.0.into_iter().map(|(key, value)| Ok((key, value.read()?))).collect()
    }

    /// Takes all values of `key`.
    pub(super) fn repeated<T: Value>(&mut self, key: &'static str) -> Result<Vec<T>, ValueError> {
        let of_key = self.0.extract_if(.., |(name, _)| name == key);
        of_key.map(|(_, value)| value.read()).collect::<Result<_, _>>().map_err(in_key(key))
    }

    /// Takes the value of `key`, if it is given.
    pub(super) fn optional<T: Value>(&mut self, key: &'static str) -> Result<Option<T>, ValueError> {
        self.repeated(key).map(|mut values| values.pop())
    }

    /// Takes the value of `key`, a size in bytes, if it is given.
    pub(super) fn bytes(&mut self, key: &'static str) -> Result<Option<u64>, ValueError> {
        self.optional::<Bytes>(key).map(|size| size.map(|Bytes(bytes)| bytes))
    }

    /// Takes the value of `key`, a number in `range`, if it is given.
    pub(super) fn number<N>(&mut self, key: &'static str, range: RangeInclusive<N>) -> Result<Option<N>, ValueError>
    where
        N: Copy + PartialOrd + std::str::FromStr + Into<u64>,
    {
        let Some(Digits(text)) = self.optional(key)? else { return Ok(None) };
        let (min, max) = ((*range.start()).into(), (*range.end()).into());
        match text.parse().ok().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(in_key(key)(ValueError::Number { value: text, min, max })),
        }
    }
}

fn in_key(key: &'static str) -> impl Fn(ValueError) -> ValueError {
    move |reason| ValueError::Key { key, reason: Box::new(reason) }
}

fn known(keys: &[Key]) -> String {
    let known: Vec<String> = keys.iter().map(|key| format!("{}={}", key.name, key.form)).collect();
    known.join(", ")
}

fn unknown(key: &OsStr, keys: &[Key]) -> ValueError {
    ValueError::UnknownKey { key: key.shown().to_string(), known: known(keys) }
}

/// The first item of a list, which may be a path without its key, has an unknown key, or is a path with an `=`.
fn key_or_path(key: &OsStr, first: &Key, item: &OsStr, keys: &[Key]) -> ValueError {
    ValueError::KeyOrPath {
        key: key.shown().to_string(),
        known: known(keys),
        remedy: list_item(first.name, item).shown().to_string(),
    }
}

impl Value for String {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        utf8(text).map(str::to_owned)
    }

    fn parser() -> ValueParser {
        ValueParser::string()
    }
}

impl Value for OsString {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        Ok(text.to_owned())
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
