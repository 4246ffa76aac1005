//! The /init of a guest that runs one command. hwvmm puts it into the initramfs that it makes, with the kernel modules that the
//! guest needs and `/hwvmm/instructions`. It mounts the root, connects the command's streams to the host by vsock or a console's ports, runs the
//! command, and reports its status by a write to an I/O port, which needs no driver.
//!
//! The command may come later, on the control stream: a guest that waits for it is saved, and each run from the snapshot has one of its own.
//! The agent waits in poll(2) and wait4(2) only: an idle command causes no VM exits.

mod command;
mod control;
mod instructions;
mod message;
mod modules;
mod ports;
mod report;
mod root;
mod session;
mod streams;
mod transport;
mod wait;

use control::End;
use instructions::{INSTRUCTIONS, Instructions, Task};
use report::{Failure, Reporter, Stage, kernel_log};
use std::ffi::OsString;
use std::process::ExitCode;
use transport::{Connection, Connections};
use wait::{Called, Link};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if !rustix::process::getpid().is_init() {
        if arguments.next().is_some_and(|first| first == command::EXEC) {
            return command::replace(&arguments.collect::<Vec<OsString>>());
        }
        return ExitCode::FAILURE;
    }
    let mut reporter = Reporter::default();
    let end = run(&mut reporter).unwrap_or_else(|failure| {
        kernel_log(&failure.to_string());
        reporter.failed(&failure);
        End::Failed
    });
    reporter.end(end);
    ExitCode::FAILURE
}

fn run(reporter: &mut Reporter) -> Result<End, Failure> {
    root::early_mounts()?;
    let bytes = std::fs::read(INSTRUCTIONS).map_err(|error| Stage::Instructions.failed(INSTRUCTIONS, error))?;
    let instructions = Instructions::parse(&bytes).map_err(|error| Stage::Instructions.failed(INSTRUCTIONS, error))?;
    reporter.open(instructions.ports.as_deref());
    modules::load(&instructions.modules, instructions.signatures)?;
    let Connections { control: Connection { file, kind }, streams } = transport::connect(&instructions)?;
    let control = reporter.control(file)?;
    root::enter(&instructions)?;
    match &instructions.task {
        Task::Run(spec) => session::run(spec, streams, control, reporter),
        Task::Wait => {
            let link = Link { control, kind, streams };
            let Called { spec, streams, control } = wait::for_command(&instructions, link, reporter)?;
            root::settle_late(&spec)?;
            session::run(&spec, streams, control, reporter)
        }
    }
}
