//! The control socket of a running machine: one line asks, one line of JSON answers, and the connection closes.
//!
//! - `status`: what runs, and the balloon.
//! - `balloon SIZE`: asks the guest to give up SIZE in all.
//! - `exits`: what each vCPU has exited for so far (`hwvmm top` asks again and again).
//! - `stop`: ends the run, as Ctrl-A x does.

use super::live::Live;
use crate::config::parse_size;
use crate::exit::EndReason;
use crate::vcpu::Control;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use hwvmm_devices::socket::Listener;
use hwvmm_devices::virtio::balloon::{BalloonControl, STAT_NAMES};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use thiserror::Error;

/// Clients at once; more wait at the door.
const MAX_CLIENTS: usize = 16;
const MAX_LINE: usize = 256;

/// The socket cannot be made.
#[derive(Debug, Error)]
#[error("cannot listen on the control socket {}{}", .path.display(), Listener::remedy(.source))]
pub struct ApiError {
    path: PathBuf,
    source: io::Error,
}

/// Answers on the socket.
pub struct Server {
    listener: Listener,
    clients: HashMap<RawFd, (UnixStream, Vec<u8>)>,
    balloon: Option<Arc<BalloonControl>>,
    control: Arc<Control>,
    live: Arc<OnceLock<Live>>,
}

impl Server {
    /// Listens at `path`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn new(path: &Path, balloon: Option<Arc<BalloonControl>>, control: Arc<Control>) -> Result<Self, ApiError> {
        let listener = Listener::new(path).map_err(|source| ApiError { path: path.to_owned(), source })?;
        Ok(Self { listener, clients: HashMap::new(), balloon, control, live: Arc::default() })
    }

    /// Where to put what looks at the vCPUs, once they run.
    #[must_use]
    pub fn live(&self) -> Arc<OnceLock<Live>> {
        Arc::clone(&self.live)
    }

    fn answer(&self, line: &str) -> Value {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("status"), None, None) => json!({"state": "running", "balloon": self.balloon()}),
            (Some("balloon"), Some(size), None) => match (&self.balloon, parse_size(size)) {
                (None, _) => json!({"error": "this machine has no balloon: start it with --balloon"}),
                (_, Err(error)) => json!({"error": error.to_string()}),
                (Some(balloon), Ok(bytes)) => {
                    balloon.set_target(bytes);
                    json!({"balloon": self.balloon()})
                }
            },
            (Some("exits"), None, None) => match self.live.get() {
                Some(live) => live.exits(),
                None => json!({"error": "the machine does not run yet"}),
            },
            (Some("stop"), None, None) => {
                self.control.end(EndReason::Quit, None);
                json!({"state": "stopping"})
            }
            _ => json!({"error": format!("unknown command '{line}'; known are: status, exits, balloon SIZE, stop")}),
        }
    }

    fn balloon(&self) -> Value {
        let Some(balloon) = &self.balloon else { return Value::Null };
        let stats = balloon.stats();
        let said =
            STAT_NAMES.iter().zip(stats.values).filter_map(|(name, value)| Some(((*name).to_owned(), value?.into())));
        json!({
            "target_bytes": balloon.target(),
            "actual_bytes": balloon.actual(),
            "reported_bytes": balloon.reported(),
            "guest": said.collect::<serde_json::Map<_, _>>(),
        })
    }

    fn accept(&mut self, ops: &mut EventOps<'_>) {
        while self.clients.len() < MAX_CLIENTS
            && let Ok((client, _)) = self.listener.socket().accept()
        {
            if client.set_nonblocking(true).is_ok() && ops.add(Events::new(&client, EventSet::IN)).is_ok() {
                self.clients.insert(client.as_raw_fd(), (client, Vec::new()));
            }
        }
    }

    /// Reads from a client; answers a whole line. The client is then done with, as on any error.
    fn hear(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some((mut client, mut line)) = self.clients.remove(&fd) else { return };
        let mut bytes = [0; MAX_LINE];
        let count = client.read(&mut bytes);
        line.extend(&bytes[..*count.as_ref().unwrap_or(&0)]);
        let whole = line.contains(&b'\n') || matches!(count, Ok(0));
        if !whole && line.len() < MAX_LINE && !count.is_err_and(|error| error.kind() != io::ErrorKind::WouldBlock) {
            self.clients.insert(fd, (client, line));
            return;
        }
        let text = String::from_utf8_lossy(&line);
        let reply = self.answer(text.lines().next().unwrap_or_default().trim());
        // In one piece: many small writes would fill the socket's buffer, and the rest of the answer be lost.
        if let Err(error) = client.write_all(format!("{reply}\n").as_bytes()) {
            log::debug!("control socket: {error}");
        }
        if let Err(error) = ops.remove(Events::new(&client, EventSet::IN)) {
            log::debug!("control socket: {error:?}");
        }
    }
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() != self.listener.socket().as_raw_fd() {
            self.hear(events.fd(), ops);
        }
        self.accept(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::new(self.listener.socket(), EventSet::IN | EventSet::EDGE_TRIGGERED);
        if let Err(error) = ops.add(events) {
            log::error!("control socket: {error:?}");
        }
    }
}
