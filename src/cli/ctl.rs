//! The subcommand `hwvmm ctl`: sends commands to the control socket of a running machine.

use super::output::{fail, print_json};
use crate::control::{Request, request};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
#[command(about = "Control a running machine: show its state and exits, set its balloon, pause, resume or end it")]
pub(super) struct Args {
    /// Control socket that the machine was started with (--api)
    socket: PathBuf,

    #[command(subcommand)]
    request: Request,
}

/// Prints the response as one line of JSON on stdout, or the error on stderr.
pub(super) fn run(args: &Args) -> ExitCode {
    match request(&args.socket, args.request) {
        Ok(response) => print_json(&response),
        Err(error) => fail(&error),
    }
}
