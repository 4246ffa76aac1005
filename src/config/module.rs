//! Multiboot modules, read from the command line and from TOML.

use super::error::ValueError;
use super::quote::split_once;
use super::spec::device_spec;
use super::value::{Items, Value};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

device_spec! {
    /// A multiboot module as a table.
    #[derive(Clone)]
    struct ModuleSpec {
        path: PathBuf = "path" "FILE", first required ("path=FILE");
        arguments: String = "arguments" "TEXT", or (String::new());
    }
}

/// A multiboot module (`--module`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModuleConfig {
    /// Path of the file.
    pub path: PathBuf,
    /// Arguments of the module, which the kernel finds behind the path.
    pub arguments: String,
}

impl Value for ModuleConfig {
    /// All behind the first comma that is not written twice is arguments, with commas and `=` as they are.
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let (path, arguments) = split_once(text);
        let path = path.as_bytes().strip_prefix(b"path=").unwrap_or(path.as_bytes());
        Ok(Self { path: PathBuf::parse(OsStr::from_bytes(path))?, arguments: String::parse(arguments)? })
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        let ModuleSpec { path, arguments } = ModuleSpec::from_items(items)?;
        Ok(Self { path, arguments })
    }

    fn usage() -> Option<String> {
        Some("[path=]FILE[,ARGUMENTS]".into())
    }
}
