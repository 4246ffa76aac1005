//! Values with keys: `key=value,...` on the command line, a table in TOML. [`device_spec!`](device_spec) defines the struct
//! and both forms in one place.

use super::error::ValueError;
use super::value::{Bytes, Digits, Scalar, Value, utf8};
use std::ffi::{OsStr, OsString};
use std::ops::RangeInclusive;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

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

/// Splits a list at its commas; two commas in a row are one comma of a value.
fn split(text: &OsStr) -> Vec<OsString> {
    let mut items = vec![Vec::new()];
    let mut bytes = text.as_bytes().iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            items.push(Vec::new());
        } else if let Some(item) = items.last_mut() {
            item.push(byte);
        }
    }
    items.into_iter().map(OsString::from_vec).collect()
}

/// Keys and values as given, in order.
#[derive(Default)]
pub struct Items(Vec<(String, Scalar)>);

impl Items {
    /// Splits the text of the command line.
    pub(super) fn from_text(text: &OsStr, keys: &[Key]) -> Result<Self, ValueError> {
        let first = keys.iter().find(|key| key.kind == KeyKind::First);
        let mut items = Self::default();
        for (index, item) in split(text).into_iter().enumerate() {
            let (key, value) = match (item.as_bytes().iter().position(|byte| *byte == b'='), first) {
                (Some(at), _) => {
                    let (key, value) = item.as_bytes().split_at(at);
                    (utf8(OsStr::from_bytes(key))?.to_owned(), OsStr::from_bytes(&value[1..]).to_owned())
                }
                (None, Some(first)) if index == 0 => (first.name.to_owned(), item),
                (None, _) => {
                    let name = utf8(&item)?;
                    match keys.iter().find(|key| key.name == name) {
                        Some(Key { kind: KeyKind::Switch, .. }) => (name.to_owned(), "on".into()),
                        Some(_) => return Err(ValueError::NoValue(name.to_owned())),
                        None => return Err(unknown(name, keys)),
                    }
                }
            };
            items.push(key, Scalar::Text(value));
        }
        Ok(items)
    }

    /// Adds a key with its value.
    pub(super) fn push(&mut self, key: String, value: Scalar) {
        self.0.push((key, value));
    }

    /// Returns an error if there is a key that is not in `keys`, or one more often than it may be.
    pub(super) fn check(&self, keys: &[Key]) -> Result<(), ValueError> {
        for (index, (name, _)) in self.0.iter().enumerate() {
            let key = keys.iter().find(|key| key.name == name).ok_or_else(|| unknown(name, keys))?;
            let again = self.0.iter().take(index).any(|(earlier, _)| earlier == name);
            if again && key.kind != KeyKind::Repeated {
                return Err(ValueError::Twice(key.name));
            }
        }
        Ok(())
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

fn unknown(key: &str, keys: &[Key]) -> ValueError {
    let known: Vec<String> = keys.iter().map(|key| format!("{}={}", key.name, key.form)).collect();
    ValueError::UnknownKey { key: key.to_owned(), known: known.join(", ") }
}

/// Defines a struct that is read from `key=value,...` and from a TOML table. A row is
/// `field: type = "key" "form of the value", how;` where `how` is one of:
///
/// - `required "what it needs"`: there must be a value;
/// - `optional`: the field is an `Option`;
/// - `repeated`: the field is a `Vec`;
/// - `switch`: the field is a bool, false where the key is missing;
/// - `or DEFAULT`: the default where the key is missing;
/// - `number RANGE, or DEFAULT`, `number RANGE`: a whole number of the range; without a default, an `Option`;
/// - `bytes or DEFAULT`, `bytes`: a size; without a default, an `Option`;
/// - `first` before one of these: the first value of a list may be given without its key.
///
/// `check |spec| RESULT` after the struct checks the whole.
macro_rules! device_spec {
    ($(#[$attribute:meta])* $visibility:vis struct $name:ident {
        $($(#[$about:meta])* $field:ident: $type:ty = $key:literal $form:literal, $($how:ident)+ $(($($argument:expr),+))?;)*
    } $(check |$spec:ident| $check:expr)?) => {
        $(#[$attribute])*
        $visibility struct $name {
            $($(#[$about])* $visibility $field: $type,)*
        }

        impl $name {
            const KEYS: &'static [$crate::config::spec::Key] = &[$($crate::config::spec::Key {
                name: $key,
                form: $form,
                kind: device_spec!(@kind $($how)+),
            }),*];
        }

        impl $crate::config::value::Value for $name {
            fn parse(text: &std::ffi::OsStr) -> Result<Self, $crate::config::ValueError> {
                Self::from_items($crate::config::spec::Items::from_text(text, Self::KEYS)?)
            }

            fn from_items(mut items: $crate::config::spec::Items) -> Result<Self, $crate::config::ValueError> {
                items.check(Self::KEYS)?;
                let spec = Self {
                    $($field: device_spec!(@take items, $key, $($how)+ $(($($argument),+))?),)*
                };
                device_spec!(@check spec $(, |$spec| $check)?)
            }

            fn usage() -> Option<String> {
                Some($crate::config::spec::usage(Self::KEYS))
            }
        }
    };
    (@kind first $($how:ident)+) => { $crate::config::spec::KeyKind::First };
    (@kind required) => { $crate::config::spec::KeyKind::Required };
    (@kind repeated) => { $crate::config::spec::KeyKind::Repeated };
    (@kind switch) => { $crate::config::spec::KeyKind::Switch };
    (@kind $other:ident) => { $crate::config::spec::KeyKind::Optional };
    (@take $items:ident, $key:literal, first $($how:tt)+) => { device_spec!(@take $items, $key, $($how)+) };
    (@take $items:ident, $key:literal, required ($what:expr)) => {
        $items.optional($key)?.ok_or($crate::config::ValueError::Needs($what))?
    };
    (@take $items:ident, $key:literal, optional) => { $items.optional($key)? };
    (@take $items:ident, $key:literal, repeated) => { $items.repeated($key)? };
    (@take $items:ident, $key:literal, switch) => { $items.optional::<bool>($key)?.unwrap_or(false) };
    (@take $items:ident, $key:literal, or ($default:expr)) => { $items.optional($key)?.unwrap_or($default) };
    (@take $items:ident, $key:literal, number ($range:expr)) => { $items.number($key, $range)? };
    (@take $items:ident, $key:literal, number ($range:expr, $default:expr)) => {
        $items.number($key, $range)?.unwrap_or($default)
    };
    (@take $items:ident, $key:literal, bytes) => { $items.bytes($key)? };
    (@take $items:ident, $key:literal, bytes ($default:expr)) => { $items.bytes($key)?.unwrap_or($default) };
    (@check $value:ident) => { Ok($value) };
    (@check $value:ident, |$spec:ident| $check:expr) => {{ let $spec = $value; $check }};
}
pub(super) use device_spec;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::PathBuf;

    device_spec! {
        /// A value with one key of each kind.
        #[derive(Clone, Debug, PartialEq, Eq)]
        struct Sample {
            path: PathBuf = "path" "PATH", first required ("path=PATH");
            word: String = "word" "WORD", or ("none".into());
            queues: u16 = "queues" "N", number (1..=16, 1);
            bytes: u64 = "size" "SIZE", bytes (7);
            readonly: bool = "readonly" "on|off", switch;
            port: Vec<String> = "port" "PORT", repeated;
        }
    }

    fn sample(text: &str) -> Result<Sample, String> {
        Sample::parse(OsStr::new(text)).map_err(|error| error.to_string())
    }

    #[test]
    fn lists_and_tables_are_the_same() {
        #[derive(serde::Deserialize)]
        struct File {
            #[serde(deserialize_with = "crate::config::value::from_toml")]
            sample: Vec<Sample>,
        }
        let list = sample("a,word=b,queues=2,size=1K,readonly,port=1,port=2").expect("all keys");
        let whole = Sample {
            path: "a".into(),
            word: "b".into(),
            queues: 2,
            bytes: 1024,
            readonly: true,
            port: vec!["1".into(), "2".into()],
        };
        assert_eq!(list, whole);
        let table = "[[sample]]\npath = 'a'\nword = 'b'\nqueues = 2\nsize = 1024\nreadonly = true\nport = ['1', '2']\n[[sample]]\npath = 'c'";
        let File { sample: tables } = toml::from_str(table).expect("two tables");
        assert_eq!(tables[0], whole);
        assert_eq!(Ok(&tables[1]), sample("c").as_ref());
        let error = |text: &str| toml::from_str::<File>(text).map(|_| ()).expect_err("wrong").to_string();
        let unknown = error("[[sample]]\npath = 'a'\ncolour = 1");
        assert!(unknown.contains("'colour'") && unknown.contains("readonly=on|off"), "{unknown}");
        assert!(error("[[sample]]\npath = 1").contains("path: 1 is not a string"));
        assert!(error("sample = 1").contains("a list, or a string, a table"), "{}", error("sample = 1"));
    }

    #[test]
    fn commas_and_equals_signs_can_be_part_of_a_value() {
        assert_eq!(sample("a,,b.img").map(|sample| sample.path), Ok("a,b.img".into()));
        assert_eq!(
            sample("path=a=b,,,word=c").map(|sample| (sample.path, sample.word)),
            Ok(("a=b,".into(), "c".into()))
        );
        let bytes = OsStr::from_bytes(b"\xff.img,readonly=on");
        assert_eq!(Sample::parse(bytes).expect("a path").path.as_os_str(), OsStr::from_bytes(b"\xff.img"));
        assert!(Sample::parse(OsStr::from_bytes(b"a,word=\xff")).is_err());
    }

    #[test]
    fn errors_name_key_and_value() {
        for (text, words) in [
            ("", "path: the path is empty"),
            ("readonly=on", "it needs path=PATH"),
            ("a,colour=1", "unknown key 'colour'; the keys are path=PATH, word=WORD"),
            ("a,colour", "unknown key 'colour'"),
            ("a,queues", "'queues' is not key=value"),
            ("a,queues=17", "queues: '17' is not a whole number from 1 to 16"),
            ("a,size=x", "size: 'x' is not a size"),
            ("a,readonly=1", "readonly: '1' is not on, off, true or false"),
            ("a,word=b,word=c", "'word' is given twice"),
        ] {
            let error = sample(text).expect_err("wrong");
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn the_usage_has_all_keys() {
        assert_eq!(
            Sample::usage().as_deref(),
            Some("PATH[,word=WORD][,queues=N][,size=SIZE][,readonly=on|off][,port=PORT]...")
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = sample(&text);
        }
    }
}
