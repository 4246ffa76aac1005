//! The program `hwvmm`: parses the command line and runs a subcommand.

use std::process::ExitCode;

fn main() -> ExitCode {
    hwvmm::cli::main()
}
