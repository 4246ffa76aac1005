//! Lists of `key=value`, split at their commas, and the two ways to write a value that has commas, or bytes that are not UTF-8.
//!
//! A comma of a value is written twice, as in QEMU: a shell leaves commas alone, where it would take away a backslash or quotes.

use super::error::ValueError;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Splits a list at its commas; two commas in a row are one comma of a value.
pub(super) fn split(text: &OsStr) -> Vec<OsString> {
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

/// Splits off the first item of a list. What follows its comma is returned as it is.
pub(super) fn split_once(text: &OsStr) -> (OsString, &OsStr) {
    let mut item = Vec::new();
    let mut rest = text.as_bytes();
    loop {
        rest = match rest {
            [] => break,
            [b',', b',', behind @ ..] => {
                item.push(b',');
                behind
            }
            [b',', behind @ ..] => {
                rest = behind;
                break;
            }
            [byte, behind @ ..] => {
                item.push(*byte);
                behind
            }
        };
    }
    (OsString::from_vec(item), OsStr::from_bytes(rest))
}

/// Returns `key=value` as an item of a list: with the commas of `value` written twice.
#[must_use]
pub fn list_item(key: &str, value: &OsStr) -> OsString {
    let mut item = format!("{key}=").into_bytes();
    for &byte in value.as_bytes() {
        item.push(byte);
        if byte == b',' {
            item.push(b',');
        }
    }
    OsString::from_vec(item)
}

/// Reads the text of `{ escaped = "..." }` in TOML, which has only UTF-8: `\xNN` is a byte, `\\` a backslash.
///
/// # Errors
/// Returns an error if a backslash is followed by anything else.
pub(super) fn unescape(text: &str) -> Result<OsString, ValueError> {
    let error = || ValueError::Escape(text.to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, behind @ ..] = rest {
        rest = behind;
        if *byte != b'\\' {
            bytes.push(*byte);
            continue;
        }
        match rest {
            [b'\\', behind @ ..] => {
                bytes.push(b'\\');
                rest = behind;
            }
            [b'x', high, low, behind @ ..] => {
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                let (high, low) = digit(*high).zip(digit(*low)).ok_or_else(error)?;
                bytes.push(high << 4 | low);
                rest = behind;
            }
            _ => return Err(error()),
        }
    }
    Ok(OsString::from_vec(bytes))
}

/// Returns the text that stands for `value` in `{ escaped = "..." }` of TOML.
#[must_use]
pub fn toml_escaped(value: &OsStr) -> String {
    let mut text = String::with_capacity(value.len());
    for chunk in value.as_bytes().utf8_chunks() {
        text += &chunk.valid().replace('\\', r"\\");
        text.extend(chunk.invalid().iter().map(|byte| format!(r"\x{byte:02x}")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConsoleChoice, ConsoleTarget, DiskConfig, ModuleConfig, SerialChoice, ShareConfig};
    use crate::config::{RunOptions, Value, VsockBackend, VsockConfig};
    use proptest::prelude::*;
    use std::path::{Path, PathBuf};

    fn list(items: &[OsString]) -> OsString {
        items.join(OsStr::new(","))
    }

    fn parse<T: Value>(text: &OsStr) -> T {
        T::parse(text).unwrap_or_else(|error| panic!("{}: {error}", text.display()))
    }

    /// Bytes of a path: mostly those that could be taken for something else.
    fn path() -> impl Strategy<Value = OsString> {
        let byte = prop_oneof![
            Just(b','),
            Just(b'='),
            Just(b'/'),
            Just(b'\\'),
            Just(b'\''),
            Just(b'"'),
            Just(b' '),
            Just(0xff),
            1_u8..,
        ];
        proptest::collection::vec(byte, 1..40).prop_map(OsString::from_vec)
    }

    proptest! {
        #[test]
        fn every_path_can_be_given_in_a_list(path in path()) {
            let item = |key| list_item(key, &path);
            let disk: DiskConfig = parse(&list(&[item("path"), "format=qcow2".into(), item("data-file")]));
            prop_assert_eq!((disk.path.as_os_str(), disk.data_file.as_deref()), (&*path, Some(Path::new(&path))));
            let share: ShareConfig = parse(&list(&[item("path"), "tag=t".into(), "readonly".into()]));
            prop_assert_eq!((share.path.as_os_str(), share.read_only), (&*path, true));
            let vsock: VsockConfig = parse(&list(&["cid=3".into(), item("uds")]));
            prop_assert_eq!(vsock.backend, VsockBackend::Unix(PathBuf::from(&path)));
            let module: ModuleConfig = parse(&list(&[item("path"), "a,,b=c".into()]));
            prop_assert_eq!((module.path.as_os_str(), &*module.arguments), (&*path, "a,,b=c"));
        }

        #[test]
        fn a_path_that_is_all_of_a_value_is_taken_as_it_is(path in path()) {
            let with = |start: &str| [OsStr::new(start), &*path].join(OsStr::new(""));
            prop_assert_eq!(parse::<PathBuf>(&path).into_os_string(), path.clone());
            let target = ConsoleTarget::File(PathBuf::from(&path));
            let serial: SerialChoice = parse(&with("2=file:"));
            prop_assert_eq!(serial, SerialChoice::Port { index: 1, target: target.clone() });
            prop_assert_eq!(parse::<ConsoleChoice>(&with("virtio=file:")), ConsoleChoice::Virtio(target));
        }

        #[test]
        fn every_path_can_be_given_in_toml(path in path()) {
            let escaped = |start: &str| toml::Value::String(start.to_owned() + &toml_escaped(&path)).to_string();
            let text = format!(
                "kernel = {{ escaped = {0} }}\ninitrd = {{ escaped = {0} }}\nconsole = {{ escaped = {1} }}\n\
                 [[disk]]\npath = {{ escaped = {0} }}\n[[serial]]\nport = 2\ntarget = {{ escaped = {2} }}\n\
                 [vsock]\ncid = 3\nuds = {{ escaped = {0} }}\n[[module]]\npath = {{ escaped = {0} }}\n\
                 [[share]]\ntag = 't'\npath.escaped = {0}\n",
                escaped(""), escaped("virtio=file:"), escaped("file:")
            );
            let config = toml::from_str::<RunOptions>(&text).expect(&text).into_config().expect("valid");
            let path = PathBuf::from(path);
            let file = Some(ConsoleTarget::File(path.clone()));
            prop_assert_eq!((&config.kernel, config.initrd.as_ref()), (&path, Some(&path)));
            prop_assert_eq!((&config.console, &config.serial[1]), (&file, &file));
            prop_assert_eq!((&config.disk[0].path, &config.share[0].path), (&path, &path));
            prop_assert_eq!(&config.module[0].path, &path);
            prop_assert_eq!(config.vsock.map(|vsock| vsock.backend), Some(VsockBackend::Unix(path)));
        }
    }

    #[test]
    fn a_slash_before_the_equals_sign_is_one_of_a_path() {
        let disk = |text: &str| parse::<DiskConfig>(OsStr::new(text)).path;
        for path in ["/tmp/a,b/disk", "/tmp/k=v/disk", "x/a,b/c=d/e", "/a,/b", "/a/B,C/d=e"] {
            assert_eq!(disk(path), Path::new(path), "{path}");
            assert_eq!(disk(&format!("path={path}")), Path::new(path), "{path}");
            assert_eq!(disk(&format!("{path},readonly")), Path::new(path), "{path}");
        }
    }

    #[test]
    fn a_path_that_exists_needs_no_quoting() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
        std::fs::create_dir(at("a,b")).expect("made");
        std::fs::write(at("c,D.img"), "").expect("written");
        let share: ShareConfig = parse(OsStr::new(&format!("tag=t,path={},readonly", at("a,b"))));
        assert_eq!((share.path, share.read_only), (at("a,b").into(), true));
        assert_eq!(parse::<DiskConfig>(OsStr::new(&at("c,D.img"))).path, PathBuf::from(at("c,D.img")));
        // What a run with a mistyped key left behind does not make it a path.
        let _socket = std::os::unix::net::UnixListener::bind(at("v,vhots")).expect("bound");
        let error = VsockConfig::parse(OsStr::new(&format!("cid=3,uds={}", at("v,vhots")))).expect_err("wrong");
        assert!(matches!(error, ValueError::UnknownKey { .. }), "{error}");
    }

    /// Texts with one key that is wrong.
    fn wrong<T: Value>(texts: &[&str], key: &str) {
        for text in texts {
            let Err(error) = T::parse(OsStr::new(text)) else { panic!("{text}: taken") };
            let ValueError::UnknownKey { key: refused, known } = &error else { panic!("{text}: {error}") };
            assert_eq!((&**refused, known.contains("path=") || known.contains("uds=")), (key, true), "{text}: {error}");
            assert!(error.to_string().contains("written twice"), "{text}: {error}");
        }
    }

    #[test]
    fn a_wrong_key_is_no_part_of_a_path() {
        wrong::<DiskConfig>(
            &["a,colour=1", "/tmp/a,colour=1", "a,colour", "/tmp/a,colour", "/a/b,colour=/c/d"],
            "colour",
        );
        wrong::<DiskConfig>(
            &["/a/b.img,read-only", "path=/a/b.img,read-only,queues=2", "/a/b,c/d,read-only"],
            "read-only",
        );
        wrong::<DiskConfig>(&["/a/b.img,ReadOnly=on", "b.img,ReadOnly", "/a/b.img,format=raw,ReadOnly=on"], "ReadOnly");
        wrong::<DiskConfig>(&["/a/b.img,read only", "path=/a/b.img,read only=on"], "read only");
        wrong::<DiskConfig>(&["a.qcow2,data-file=/b,data_file=/c"], "data_file");
        wrong::<DiskConfig>(&["path=a,queues=2,b", "a,readonly,b"], "b");
        wrong::<DiskConfig>(&["a,readonly,b/c"], "b/c");
        wrong::<DiskConfig>(&["/a/b.img,"], "");
        wrong::<ShareConfig>(&["tag=t,path=/d,read-only", "path=/d,read-only,tag=t"], "read-only");
        wrong::<ShareConfig>(&["tag=a,b/c,path=d"], "b/c");
        wrong::<VsockConfig>(
            &["cid=3,uds=/tmp/v,vhots", "uds=/tmp/v,vhots,cid=3", "cid=3,uds=/tmp/v,vhots=on"],
            "vhots",
        );
        let config = "[[share]]\ntag = 't'\npath = '/d'\nRead-Only = true";
        let error = toml::from_str::<RunOptions>(config).expect_err("wrong").to_string();
        assert!(error.contains("unknown key 'Read-Only'"), "{error}");
    }

    #[test]
    fn a_path_with_an_equals_sign_is_given_with_its_key() {
        for (text, remedy) in
            [("root=1.img", "path=root=1.img"), ("K=v,,w", "path=K=v,,w"), ("colour=a,queues=2", "path=colour=a")]
        {
            let error = DiskConfig::parse(OsStr::new(text)).expect_err(text);
            assert!(matches!(error, ValueError::KeyOrPath { .. }), "{text}: {error}");
            let message = error.to_string();
            assert!(message.ends_with(remedy) && message.contains("readonly="), "{text}: {message}");
            assert!(DiskConfig::parse(OsStr::new(remedy)).is_ok(), "{remedy}");
        }
    }

    #[test]
    fn a_wrong_escape_is_refused() {
        for text in [r"\", r"\x", r"\x1", r"\xg0", r"\n"] {
            assert!(unescape(text).is_err(), "{text}");
        }
        assert_eq!(unescape(r"a\\x\xfFé").expect("right"), OsStr::from_bytes(b"a\\x\xff\xc3\xa9"));
        let error = toml::from_str::<RunOptions>(r#"kernel = { escaped = '\n' }"#).expect_err("wrong").to_string();
        assert!(error.contains(r"\xNN"), "{error}");
    }
}
