//! The subcommand `hwvmm ctl`: sends commands to the control socket of a running machine.

use super::output::{fail, print_all};
use crate::control::{Request, request};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options of `hwvmm ctl`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Control socket that the machine was started with (--api)
    socket: PathBuf,

    #[command(subcommand)]
    request: Request,
}

/// Prints the response as one line of JSON on stdout, or the error on stderr.
pub(super) fn run(args: &Args) -> ExitCode {
    let response = match request(&args.socket, args.request) {
        Ok(response) => response,
        Err(error) => return fail(&error),
    };
    match serde_json::to_string(&response) {
        Ok(json) => print_all(format!("{json}\n").as_bytes()),
        Err(error) => fail(&error),
    }
}
