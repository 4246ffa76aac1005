//! What reading symbols may take. A hostile kernel can have tables that are searched for hours, and symbols without number.

use crate::sandbox::ConfinedError;
use std::cell::Cell;
use std::io;
use thiserror::Error;

/// Steps of the search for kallsyms: an offset, a name or a byte of a name looked at, [`STEP_BYTES`] bytes read. The largest kernels
/// take a fifth of it; all of it is used up in less than half a second.
pub(super) const STEPS: u64 = 16 << 20;
const STEP_BYTES: u64 = 32;
/// No kernel has as many symbols.
pub(super) const MAX_SYMBOLS: usize = 4_000_000;
/// The most segments that are looked at: far more than any kernel has.
pub(super) const MAX_SEGMENTS: usize = 256;
/// What is read of an ELF file's headers, symbol table and names, in bytes. A kernel with debug information has some 20 MiB.
pub(super) const ELF_BYTES: u64 = 256 << 20;

/// The names of all symbols together, in bytes: ten times those of a large kernel.
pub(super) const MAX_NAMES_BYTES: usize = 128 << 20;

/// Why the symbols in a file cannot be read.
#[derive(Debug, Error)]
pub enum SearchError {
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Read(#[from] io::Error),
    /// The search for kallsyms takes too long.
    #[error(
        "the search for its kallsyms takes more than {0} steps; give symbols with --symbols vmlinux or --symbols System.map"
    )]
    Steps(u64),
    /// There are too many symbols.
    #[error("it has more than {0} symbols, which no kernel has")]
    Symbols(usize),
    /// The names are too long.
    #[error("the names of its symbols take more than {0} bytes, which those of no kernel do")]
    Names(usize),
    /// Headers, symbol table and names of an ELF file are too large.
    #[error("its ELF headers and symbol table take more than {0} bytes, which those of no kernel do")]
    ElfBytes(u64),
    /// The process that reads them did not end as it should.
    #[error("the process that reads them failed")]
    Process(#[from] ConfinedError),
}

/// Something that is used up.
pub(super) struct Allowance {
    left: Cell<u64>,
    exhausted: Cell<bool>,
}

impl Allowance {
    pub(super) fn new(units: u64) -> Self {
        Self { left: Cell::new(units), exhausted: Cell::new(false) }
    }

    /// Takes `units`, or returns `None` where fewer are left. From then on none are left.
    pub(super) fn take(&self, units: u64) -> Option<()> {
        match self.left.get().checked_sub(units) {
            Some(left) => self.left.set(left),
            None => {
                self.left.set(0);
                self.exhausted.set(true);
            }
        }
        (!self.exhausted.get()).then_some(())
    }

    /// Takes the steps for reading `bytes`.
    pub(super) fn take_bytes(&self, bytes: usize) -> Option<()> {
        self.take(bytes as u64 / STEP_BYTES + 1)
    }

    /// Returns true if more was asked for than there was.
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted.get()
    }
}
