//! Where a tracepoint's fields lie: its `format` file (Linux Documentation/trace/events.rst §2.2).

use hwvmm_devices::path_text::PathText as _;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A tracepoint cannot be read.
#[derive(Debug, Error)]
pub enum FormatError {
    /// Its format file cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// The file is not the format of a tracepoint.
    #[error("{} is not the format of a tracepoint, as Linux 5.10 and newer have it", .0.shown())]
    Syntax(PathBuf),
    /// The tracepoint of exits has no such field.
    #[error("this kernel's kvm_exit has no field '{0}': it is older than Linux 5.10")]
    NoField(&'static str),
}

impl FormatError {
    /// The kind of the host's error, where it is one.
    pub(super) fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Read(error) => Some(error.kind()),
            Self::Syntax(_) | Self::NoField(_) => None,
        }
    }
}

/// A field's place in a record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Field {
    offset: usize,
    size: usize,
}

impl Field {
    /// Writes the field's value into a record.
    #[cfg(test)]
    pub(super) fn put(self, raw: &mut [u8], value: u64) {
        raw[self.offset..self.offset + self.size].copy_from_slice(&value.to_le_bytes()[..self.size]);
    }

    /// The field's value in a record; `None` where the record is too short.
    pub(super) fn get(self, raw: &[u8]) -> Option<u64> {
        let bytes = raw.get(self.offset..self.offset.checked_add(self.size)?)?;
        let mut value = [0; 8];
        value.get_mut(..self.size)?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(value))
    }
}

/// The format of a tracepoint: its id and its fields.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Format {
    /// Its number, which is also the first field (`common_type`) of its records.
    pub(super) id: u16,
    fields: HashMap<String, Field>,
}

impl Format {
    /// Reads the format of `group/name` below the tracefs at `tracefs`.
    ///
    /// # Errors
    /// [`FormatError`].
    pub(super) fn read(tracefs: &Path, name: &str) -> Result<Self, FormatError> {
        let path = tracefs.join("events").join(name).join("format");
        let text = std::fs::read_to_string(&path)?;
        Self::parse(&text).ok_or(FormatError::Syntax(path))
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut format = Self::default();
        for line in text.lines() {
            let line = line.trim();
            if let Some(id) = line.strip_prefix("ID:") {
                format.id = id.trim().parse().ok()?;
            } else if line.starts_with("field:") {
                let (name, field) = parse_field(line)?;
                format.fields.insert(name, field);
            }
        }
        (format.id != 0 && !format.fields.is_empty()).then_some(format)
    }

    /// A field of at most eight bytes.
    pub(super) fn field(&self, name: &str) -> Option<Field> {
        self.fields.get(name).copied().filter(|field| (1..=8).contains(&field.size))
    }
}

/// `field:unsigned int exit_reason; offset:8; size:4; signed:0;`
fn parse_field(line: &str) -> Option<(String, Field)> {
    let mut parts = line.split(';').map(str::trim);
    let declaration = parts.next()?.strip_prefix("field:")?;
    let name = declaration.rsplit([' ', '*', '\t']).next()?;
    let name = name.split('[').next()?.to_owned();
    let mut field = Field::default();
    for part in parts {
        match part.split_once(':') {
            Some(("offset", value)) => field.offset = value.parse().ok()?,
            Some(("size", value)) => field.size = value.parse().ok()?,
            _ => {}
        }
    }
    Some((name, field))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: &str = "name: kvm_exit\nID: 1627\nformat:\n\
        \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\
        \tfield:unsigned int exit_reason;\toffset:8;\tsize:4;\tsigned:0;\n\
        \tfield:unsigned long guest_rip;\toffset:16;\tsize:8;\tsigned:0;\n\
        \tfield:char name[16];\toffset:24;\tsize:16;\tsigned:0;\n\nprint fmt: \"field: x\"\n";

    #[test]
    fn fields_are_found_by_name() {
        let format = Format::parse(EXIT).expect("a format");
        assert_eq!(format.id, 1627);
        let mut raw = vec![0; 24];
        raw[8..12].copy_from_slice(&0x7b_u32.to_le_bytes());
        raw[16..24].copy_from_slice(&0xffff_ffff_8100_0000_u64.to_le_bytes());
        assert_eq!(format.field("exit_reason").expect("there").get(&raw), Some(0x7b));
        assert_eq!(format.field("guest_rip").expect("there").get(&raw), Some(0xffff_ffff_8100_0000));
        assert_eq!(format.field("guest_rip").expect("there").get(&raw[..20]), None);
        assert_eq!((format.field("name"), format.field("other")), (None, None));
        assert_eq!(Format::parse("nonsense"), None);
    }
}
