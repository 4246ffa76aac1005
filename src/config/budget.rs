//! Exit budgets (`--budget`, `--slack`): how many exits of which kind a run may make.

use super::error::{BudgetError, ValueError};
use super::value::{Digits, Items, Value, utf8};
use crate::bounded_read;
use hwvmm_arch::exit_code::Class;
use std::ffi::OsStr;
use std::fmt;
use std::path::Path;

/// The largest file of limits, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

macro_rules! address_spaces {
    ($($(#[$doc:meta])* $variant:ident $name:literal,)*) => {
        /// What the address of an exit is a number of.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        pub enum AddressSpace {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl AddressSpace {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name in budgets, in tables and in JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

address_spaces! {
    /// I/O port by its number.
    Port "port",
    /// Guest physical address (gpa) of an access to device memory.
    Gpa "gpa",
    /// Index of a model-specific register (ECX).
    Msr "msr",
    /// CPUID leaf: the value of EAX.
    Leaf "leaf",
    /// Number of a hypercall.
    Hypercall "hypercall",
    /// Vector of an exception or interrupt.
    Vector "vector",
    /// Number of a control register.
    ControlRegister "cr",
    /// Number of a debug register.
    DebugRegister "dr",
}

impl fmt::Display for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The count that a limit applies to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Counter {
    /// All VM exits of the run, whether KVM or hwvmm handled them.
    Total,
    /// All userspace exits of the run: exits that KVM passed on to hwvmm.
    Userspace,
    /// VM exits of one class.
    Class(Class),
    /// Userspace exits of one reason, by its name. [`Budget::check_reasons`] finds names that do not exist.
    Reason(String),
    /// Exits for one port, address, MSR or CPUID leaf.
    Address(AddressSpace, u64),
}

impl Counter {
    fn parse(name: &str) -> Option<Self> {
        if let Some((space, number)) = name.split_once('.') {
            if space == "userspace" {
                return (!number.is_empty()).then(|| Self::Reason(number.to_owned()));
            }
            let kind = AddressSpace::ALL.iter().copied().find(|kind| kind.name() == space)?;
            return Some(Self::Address(kind, parse_number(number)?));
        }
        match name {
            "total" => Some(Self::Total),
            "userspace" => Some(Self::Userspace),
            _ => Class::ALL.into_iter().find(|class| class.name() == name).map(Self::Class),
        }
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Total => f.write_str("total"),
            Self::Userspace => f.write_str("userspace"),
            Self::Class(class) => f.write_str(class.name()),
            Self::Reason(reason) => write!(f, "userspace.{reason}"),
            Self::Address(kind, number) => write!(f, "{}.{number:#x}", kind.name()),
        }
    }
}

/// The largest number of exits that one counter may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// The counter that is limited.
    pub counter: Counter,
    /// The largest count allowed.
    pub max_exits: u64,
}

/// The limits of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// The limits, in the order in which they were given.
    pub limits: Vec<Limit>,
}

impl Budget {
    /// Reads `NAME=COUNT,...`; a text without `=`, or with a `/` before it, is the path of a file with such lines, in which `#`
    /// begins a comment.
    ///
    /// # Errors
    /// Returns an error if a name is unknown, a count is no number, there are no limits, or the file cannot be read.
    pub fn parse(text: &str) -> Result<Self, BudgetError> {
        Self::parse_os(OsStr::new(text))
    }

    fn parse_os(text: &OsStr) -> Result<Self, BudgetError> {
        let is_list = |text: &&str| text.split_once('=').is_some_and(|(name, _)| !name.contains('/'));
        if let Some(text) = text.to_str().filter(is_list) {
            return Self::parse_list(text, text.split(','));
        }
        let path = Path::new(text);
        let contents = bounded_read::read_text(path, MAX_FILE_BYTES)
            .map_err(|error| BudgetError::Read { path: path.to_owned(), error })?;
        let lines = contents.lines().map(|line| line.split('#').next().unwrap_or_default());
        Self::parse_list(&text.to_string_lossy(), lines.flat_map(|line| line.split(',')))
    }

    fn parse_list<'a>(whole: &str, items: impl Iterator<Item = &'a str>) -> Result<Self, BudgetError> {
        let mut limits = Vec::new();
        for item in items.map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| BudgetError::Name { name: item.to_owned() })?;
            let (name, value) = (name.trim(), value.trim());
            let counter = Counter::parse(name).ok_or_else(|| BudgetError::Name { name: name.to_owned() })?;
            let max_exits = parse_number(value)
                .ok_or_else(|| BudgetError::Value { name: name.to_owned(), value: value.to_owned() })?;
            limits.push(Limit { counter, max_exits });
        }
        if limits.is_empty() {
            return Err(BudgetError::Empty(whole.to_owned()));
        }
        Ok(Self { limits })
    }

    /// Returns an error that names the first userspace exit reason for which `is_known` returns false. The reasons are
    /// defined in the `exit` module, which this module does not depend on.
    ///
    /// # Errors
    /// [`BudgetError::Name`].
    pub fn check_reasons(&self, is_known: impl Fn(&str) -> bool) -> Result<(), BudgetError> {
        for limit in &self.limits {
            if matches!(&limit.counter, Counter::Reason(reason) if !is_known(reason)) {
                return Err(BudgetError::Name { name: limit.counter.to_string() });
            }
        }
        Ok(())
    }
}

/// In TOML also a table: `[budget] total = 4500`.
impl Value for Budget {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        Self::parse_os(text).map_err(ValueError::Budget)
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        let limits: Vec<(String, Digits)> = items.into_pairs()?;
        let text: Vec<String> = limits.iter().map(|(name, most)| format!("{name}={}", most.0)).collect();
        Self::parse_list(&text.join(","), text.iter().map(String::as_str)).map_err(ValueError::Budget)
    }

    fn usage() -> Option<String> {
        Some("NAME=COUNT,... or a file with such lines".into())
    }
}

impl Value for Slack {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        Self::parse(utf8(text)?).map_err(ValueError::Budget)
    }
}

fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.replace('_', "").parse().ok(),
    }
}

/// By how much the counts of a run may exceed those of the profile given by `--budget-from`; by nothing unless it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slack {
    /// In hundredths of a per cent.
    hundredths: u32,
}

impl Slack {
    /// Reads a percentage: `2%`, `0.5%`, `2`. Digits beyond the second decimal place are rounded.
    ///
    /// # Errors
    /// [`BudgetError::Slack`].
    pub fn parse(text: &str) -> Result<Self, BudgetError> {
        let wrong = || BudgetError::Slack(text.to_owned());
        let per_cent: f64 = text.trim().trim_end_matches('%').trim().parse().map_err(|_| wrong())?;
        if !(0.0..=1000.0).contains(&per_cent) {
            return Err(wrong());
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is from 0 to 100000")]
        let hundredths = (per_cent * 100.0).round() as u32;
        Ok(Self { hundredths })
    }

    /// Returns the largest count allowed where the profile has `count`, rounded up.
    #[must_use]
    pub fn limit(self, count: u64) -> u64 {
        let slack = (u128::from(count) * u128::from(self.hundredths)).div_ceil(10_000);
        u64::try_from(u128::from(count) + slack).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn limits_are_read() {
        let budget = Budget::parse("total=300, userspace.pio_out=0x12c,npf=1,leaf.0x40000000=2").expect("a budget");
        let names: Vec<String> = budget.limits.iter().map(|limit| limit.counter.to_string()).collect();
        assert_eq!(names, ["total", "userspace.pio_out", "npf", "leaf.0x40000000"]);
        assert_eq!(budget.limits[1].max_exits, 300);
        assert_eq!(budget.limits[2].counter, Counter::Class(Class::NestedPageFault));
        assert!(budget.check_reasons(|name| name == "pio_out").is_ok());
        let error = budget.check_reasons(|name| name == "pio_in").expect_err("an unknown reason").to_string();
        assert!(error.contains("'userspace.pio_out'") && error.contains("userspace.REASON"), "{error}");
    }

    #[test]
    fn errors_name_what_is_known() {
        for (text, words) in [
            ("colour=1", "known are: total, userspace, pio"),
            ("userspace.=1", "known are"),
            ("port.x=1", "'port.x'"),
            ("pio=many", "budget pio=many"),
            (",=,", "unknown budget ''"),
            ("/nowhere/file", "/nowhere/file"),
            ("total", "or give NAME=COUNT,..."),
            ("/dev/zero", "more than 1048576 bytes"),
        ] {
            let error = Budget::parse(text).expect_err("wrong").to_string();
            assert!(error.contains(words), "{error}");
        }
        let folder = tempfile::tempdir().expect("a folder");
        for name in [&b"a=b,c"[..], b"\xff=1"] {
            let path = folder.path().join(OsStr::from_bytes(name));
            std::fs::write(&path, "total=1").expect("written");
            assert_eq!(Budget::parse_os(path.as_os_str()).expect("a budget").limits.len(), 1);
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "# limits\ntotal = 10\npio=1, npf=2 # two\n").expect("written");
        assert_eq!(Budget::parse(&file.path().to_string_lossy()).expect("a budget").limits.len(), 3);
        std::fs::write(file.path(), "# none\n").expect("written");
        assert!(Budget::parse(&file.path().to_string_lossy()).expect_err("empty").to_string().contains("no limits"));
    }

    #[test]
    fn slack_is_a_percentage() {
        let limit = |text: &str| Slack::parse(text).expect("a percentage").limit(300);
        assert_eq!((limit("2%"), limit("2"), limit("0.5 %"), limit("0%")), (306, 306, 302, 300));
        assert_eq!(Slack::parse("1000%").expect("the largest").limit(u64::MAX), u64::MAX);
        for bad in ["", "%", "much", "-1%", "1001%", "nan", "inf"] {
            assert!(Slack::parse(bad).expect_err("wrong").to_string().contains(&format!("'{bad}'")));
        }
    }
}
