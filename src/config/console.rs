//! Consoles: UARTs, the virtio console, and the pattern that is looked for on them.

use super::error::{ConfigError, ValueError};
use super::spec::device_spec;
use super::value::{Items, Value, utf8};
use hwvmm_devices::path_text::PathText as _;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Number of UARTs that a machine can have.
pub(super) const UARTS: usize = 4;

/// What a console is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// The terminal: stdin and stdout.
    Stdio,
    /// A file that its output is written to.
    File(PathBuf),
    /// Output is discarded, and there is no input.
    Null,
    /// hwvmm keeps the last of the output, for failures, and there is no input: stdin and stdout are the command's.
    Log,
}

impl ConsoleTarget {
    fn parse(text: &OsStr) -> Option<Self> {
        match text.as_bytes() {
            b"stdio" => Some(Self::Stdio),
            b"null" => Some(Self::Null),
            bytes => {
                let path = bytes.strip_prefix(b"file:").filter(|path| !path.is_empty())?;
                Some(Self::File(OsStr::from_bytes(path).into()))
            }
        }
    }
}

/// Splits `text` at its first `=`.
fn split_at_equals(text: &OsStr) -> Option<(&OsStr, &OsStr)> {
    let at = text.as_bytes().iter().position(|byte| *byte == b'=')?;
    let (before, behind) = text.as_bytes().split_at(at);
    Some((OsStr::from_bytes(before), OsStr::from_bytes(&behind[1..])))
}

/// The console of the guest as asked for (`--console`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleChoice {
    /// The UART at COM1 (`ttyS0` in Linux).
    Serial,
    /// A virtio console (`hvc0` in Linux), connected to this target.
    Virtio(ConsoleTarget),
}

impl ConsoleChoice {
    /// Returns what the virtio console is connected to; `None` if there is none.
    #[must_use]
    pub fn virtio(&self) -> Option<&ConsoleTarget> {
        match self {
            Self::Serial => None,
            Self::Virtio(target) => Some(target),
        }
    }
}

impl Value for ConsoleChoice {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let error = || ValueError::Console(text.shown().to_string());
        match (text.as_bytes(), split_at_equals(text)) {
            (b"serial", _) => Ok(Self::Serial),
            (b"virtio", _) => Ok(Self::Virtio(ConsoleTarget::Stdio)),
            (_, Some((name, target))) if name == "virtio" => {
                ConsoleTarget::parse(target).map(Self::Virtio).ok_or_else(error)
            }
            _ => Err(error()),
        }
    }
}

device_spec! {
    /// A UART as a table.
    #[derive(Clone)]
    struct UartSpec {
        port: u8 = "port" "N", number (1..=4, 1);
        target: OsString = "target" "stdio|file:PATH|null", or ("stdio".into());
    }
}

/// A UART as asked for (`--serial`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialChoice {
    /// The first UART is left out.
    None,
    /// A UART with its target.
    Port {
        /// Index from 0 (COM1, 0x3f8) to 3 (COM4, 0x2e8).
        index: usize,
        /// What it is connected to.
        target: ConsoleTarget,
    },
}

impl Value for SerialChoice {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        if text == "none" {
            return Ok(Self::None);
        }
        let port = || {
            let (number, target) = split_at_equals(text)?;
            let number: usize = number.to_str()?.parse().ok()?;
            let index = number.checked_sub(1).filter(|index| *index < UARTS)?;
            Some(Self::Port { index, target: ConsoleTarget::parse(target)? })
        };
        port().ok_or_else(|| ValueError::Serial(text.shown().to_string()))
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        let UartSpec { port, target } = UartSpec::from_items(items)?;
        let mut text = OsString::from(format!("{port}="));
        text.push(target);
        Self::parse(&text)
    }

    fn usage() -> Option<String> {
        Some("N=stdio, N=file:PATH or N=null for N from 1 (0x3f8) to 4 (0x2e8); or none".into())
    }
}

/// Returns the UARTs of a machine. Without any choice the first one is connected to `usual`, unless the virtio console
/// is.
pub(super) fn uarts(
    choices: &[SerialChoice],
    console: Option<&ConsoleTarget>,
    usual: ConsoleTarget,
) -> Result<[Option<ConsoleTarget>; UARTS], ConfigError> {
    let taken = console == Some(&usual);
    let is_log = usual == ConsoleTarget::Log;
    let mut uarts = [(!taken).then_some(usual), None, None, None];
    for choice in choices {
        match choice {
            SerialChoice::None => uarts[0] = None,
            SerialChoice::Port { index, target } => {
                if let Some(uart) = uarts.get_mut(*index) {
                    *uart = Some(target.clone());
                }
            }
        }
    }
    let mut on_stdio = (1..).zip(&uarts).filter(|(_, uart)| **uart == Some(ConsoleTarget::Stdio)).map(|(n, _)| n);
    match (on_stdio.next(), on_stdio.next()) {
        (Some(_), _) if is_log => Err(ConfigError::NotWithCommand {
            option: "--serial N=stdio",
            why: "stdin and stdout are the command's; use N=file:PATH",
        }),
        (Some(one), Some(two)) => Err(ConfigError::TwoOnStdio(one, two)),
        (Some(port), None) if taken => Err(ConfigError::ConsoleTaken(port)),
        _ => Ok(uarts),
    }
}

/// A regular expression that is looked for in each line of the consoles (`--expect`).
#[derive(Clone, Debug)]
pub struct Pattern(pub regex::bytes::Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl Value for Pattern {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        regex::bytes::Regex::new(utf8(text)?).map(Self).map_err(ValueError::Pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse<T: Value>(text: &str) -> Result<T, String> {
        T::parse(OsStr::new(text)).map_err(|error| error.to_string())
    }

    fn serial(list: &[&str]) -> Result<[Option<ConsoleTarget>; UARTS], String> {
        let choices: Vec<SerialChoice> = list.iter().map(|text| parse(text)).collect::<Result<_, _>>()?;
        uarts(&choices, None, ConsoleTarget::Stdio).map_err(|error| error.to_string())
    }

    #[test]
    fn serial_ports() {
        assert_eq!(serial(&[]).expect("default")[0], Some(ConsoleTarget::Stdio));
        assert_eq!(serial(&["2=file:a=b.log"]).expect("two")[1], Some(ConsoleTarget::File("a=b.log".into())));
        assert_eq!(serial(&["none"]).expect("none"), [None, None, None, None]);
        for bad in ["0=stdio", "5=stdio", "1=", "1", "1=file:", "x=null"] {
            assert!(serial(&[bad]).expect_err("wrong").contains("not a serial port"), "{bad}");
        }
        assert!(serial(&["3=stdio"]).expect_err("both").contains("ports 1 and 3"));
        assert_eq!(serial(&["1=null", "3=stdio"]).expect("moved")[2], Some(ConsoleTarget::Stdio));
        let second = [SerialChoice::Port { index: 1, target: ConsoleTarget::Stdio }];
        let taken = uarts(&second, Some(&ConsoleTarget::Stdio), ConsoleTarget::Stdio);
        assert!(matches!(taken, Err(ConfigError::ConsoleTaken(2))));
    }

    #[test]
    fn consoles_and_patterns() {
        let virtio = |text: &str| parse::<ConsoleChoice>(text).map(|choice| choice.virtio().cloned());
        assert_eq!(virtio("serial"), Ok(None));
        assert_eq!(virtio("virtio"), Ok(Some(ConsoleTarget::Stdio)));
        assert_eq!(virtio("virtio=file:a=b"), Ok(Some(ConsoleTarget::File("a=b".into()))));
        for bad in ["vga", "virtio=", "serial=stdio", ""] {
            assert!(virtio(bad).expect_err("wrong").contains("not a console"), "{bad}");
        }
        assert!(parse::<Pattern>("log[i]n").is_ok());
        assert!(parse::<Pattern>("(").expect_err("wrong").contains("not a regular expression"));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (parse::<ConsoleChoice>(&text), parse::<SerialChoice>(&text), parse::<Pattern>(&text));
        }
    }
}
