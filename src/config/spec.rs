//! Values with keys: `key=value,...` on the command line, a table in TOML. [`device_spec!`](device_spec) defines the struct
//! and both forms in one place.

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
            const KEYS: &'static [$crate::config::value::Key] = &[$($crate::config::value::Key {
                name: $key,
                form: $form,
                kind: device_spec!(@kind $($how)+),
            }),*];
        }

        impl $crate::config::value::Value for $name {
            fn parse(text: &std::ffi::OsStr) -> Result<Self, $crate::config::ValueError> {
                Self::from_items($crate::config::value::Items::from_text(text, Self::KEYS)?)
            }

            fn from_items(mut items: $crate::config::value::Items) -> Result<Self, $crate::config::ValueError> {
                items.check(Self::KEYS)?;
                let spec = Self {
                    $($field: device_spec!(@take items, $key, $($how)+ $(($($argument),+))?),)*
                };
                device_spec!(@check spec $(, |$spec| $check)?)
            }

            fn usage() -> Option<String> {
                Some($crate::config::value::usage(Self::KEYS))
            }
        }
    };
    (@kind first $($how:ident)+) => { $crate::config::value::KeyKind::First };
    (@kind required) => { $crate::config::value::KeyKind::Required };
    (@kind repeated) => { $crate::config::value::KeyKind::Repeated };
    (@kind switch) => { $crate::config::value::KeyKind::Switch };
    (@kind $other:ident) => { $crate::config::value::KeyKind::Optional };
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
    use crate::config::value::Value;
    use proptest::prelude::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
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
            #[serde(deserialize_with = "crate::config::given::from_toml")]
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
