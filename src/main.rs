//! The `hwvmm` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    hwvmm::cli::main()
}
