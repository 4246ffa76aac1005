//! The subcommand `hwvmm ctl`: sends commands to the control socket of a running machine.

use super::output::{fail, print_json, say};
use crate::control::{Request, Response, request, snapshot};
use std::path::PathBuf;
use std::process::ExitCode;

/// Said after a snapshot whose disks are written on.
const DISKS_GO_ON: &str = "note: the machine goes on and writes to its disks, so that the snapshot cannot be run with them later, nor \
                           with copies that are made now: for that, pause, snapshot, copy the images with cp -p, resume";

#[derive(clap::Args)]
#[command(about = "Control a running machine: show its state and exits, set its balloon, pause, save or end it")]
pub(super) struct Args {
    /// Control socket that the machine was started with (--api)
    socket: PathBuf,

    #[command(subcommand)]
    order: Order,
}

#[derive(clap::Subcommand)]
enum Order {
    #[command(flatten)]
    Request(Request),
    /// Save the machine's memory and state in a new folder, from which `hwvmm run --from DIR` goes on. The guest is paused meanwhile
    Snapshot {
        /// Folder to make; only this user can read it
        dir: PathBuf,
    },
}

/// Prints the response as one line of JSON on stdout, or the error on stderr.
pub(super) fn run(args: &Args) -> ExitCode {
    match &args.order {
        Order::Request(order) => match request(&args.socket, *order) {
            Ok(response) => print_json(&response),
            Err(error) => fail(&error),
        },
        Order::Snapshot { dir } => match snapshot(&args.socket, dir) {
            Ok(response) => {
                if let Response::Snapshot { disks: 1.., stays_paused: false, .. } = response {
                    say(DISKS_GO_ON);
                }
                print_json(&response)
            }
            Err(error) => fail(&error),
        },
    }
}
