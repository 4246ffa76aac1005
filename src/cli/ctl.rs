//! `hwvmm ctl`.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// How long a machine has to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Options.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The socket that the machine was started with (--api)
    socket: PathBuf,

    /// status, exits, balloon SIZE, or stop
    #[arg(required = true)]
    command: Vec<String>,
}

pub(super) fn run(args: &Args) -> ExitCode {
    match ask(&args.socket, &args.command.join(" ")) {
        Ok(answer) => {
            let failed = serde_json::from_str::<serde_json::Value>(&answer).map_or(true, |v| v.get("error").is_some());
            print!("{answer}");
            ExitCode::from(u8::from(failed))
        }
        Err(error) => super::fail(error.as_ref()),
    }
}

/// Asks the machine behind a control socket.
pub(super) fn ask(path: &Path, command: &str) -> Result<String, Box<dyn Error>> {
    let mut socket = UnixStream::connect(path)
        .map_err(|error| format!("no machine answers at {}: {error}; is it running, with --api?", path.display()))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    writeln!(socket, "{command}")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer)
}
