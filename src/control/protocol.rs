//! The protocol of the control socket: [`Request`], [`Response`], and the limits that both ends keep.
//!
//! A client connects, sends one request and reads one response; then the machine closes the connection. Each is one line of
//! JSON, ended by a newline:
//!
//! ```text
//! {"request":"balloon","target_bytes":104857600}
//! {"response":"balloon","target_bytes":104857600,"actual_bytes":0,"reported_bytes":0,"guest":{}}
//! ```
//!
//! For people with a program such as socat, a request may also be typed as the words that `hwvmm ctl` takes: `status`,
//! `exits`, `balloon 100M`, `pause`, `resume`, `stop` (the [`FromStr`] of [`Request`]). The response is JSON all the same.

use crate::config::{ValueError, parse_size};
use crate::exit::ExitReason;
pub use crate::measure::counters::{AccessSpace, DeviceCount};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;
use thiserror::Error;

/// Longest request line in bytes, its newline included.
pub const MAX_REQUEST_BYTES: usize = 256;

/// Longest response line that a client reads, in bytes. 254 vCPUs with a hundred devices and [`MAX_ADDRESSES`] of both
/// sorts take less than 6 MiB.
pub const MAX_RESPONSE_BYTES: usize = 8 << 20;

/// The largest number of files that come with a request: those of a snapshot.
pub const MAX_FILES: usize = 3;

/// The largest number of vCPUs in a response.
pub const MAX_VCPUS: usize = 254;

/// Unmapped addresses of a vCPU, and MSRs, that a response tells apart: those with the most exits.
pub const MAX_ADDRESSES: usize = 32;

/// A question or an order to a running machine; also the subcommands of `hwvmm ctl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Show the state of the machine and of its balloon
    Status,
    /// Show how often each vCPU has exited so far, by reason and by device
    Exits,
    /// Ask the guest to give up SIZE of its memory (in all, not in addition)
    Balloon {
        /// Size of the balloon, such as 100M; 0 returns all memory to the guest
        #[arg(value_name = "SIZE", value_parser = parse_size)]
        target_bytes: u64,
    },
    /// Stop the vCPUs until `resume`: a paused machine makes no exits and uses no processor time
    Pause,
    /// Let the vCPUs of a paused machine go on
    Resume,
    /// Write memory and state to the three files that come with the request ([`super::snapshot`]).
    #[command(skip)]
    Snapshot,
    /// End the run: `hwvmm run` ends with status 0 (38 where it waits for --expect)
    Stop,
}

impl Request {
    /// Reads a request line, as JSON or as words.
    ///
    /// # Errors
    /// [`RequestError::Unknown`] or [`RequestError::Value`], with the line.
    pub fn parse(line: &str) -> Result<Self, RequestError> {
        if line.trim_start().starts_with('{') {
            return serde_json::from_str(line).map_err(|_| RequestError::Unknown { line: line.to_owned() });
        }
        line.parse()
    }
}

impl FromStr for Request {
    type Err = RequestError;

    fn from_str(line: &str) -> Result<Self, RequestError> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["status"] => Ok(Self::Status),
            ["exits"] => Ok(Self::Exits),
            ["balloon", size] => parse_size(size)
                .map(|target_bytes| Self::Balloon { target_bytes })
                .map_err(|error: ValueError| RequestError::Value { message: error.to_string() }),
            ["pause"] => Ok(Self::Pause),
            ["resume"] => Ok(Self::Resume),
            ["snapshot"] => Ok(Self::Snapshot),
            ["stop"] => Ok(Self::Stop),
            _ => Err(RequestError::Unknown { line: line.to_owned() }),
        }
    }
}

/// What a machine answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// To [`Request::Status`]: the state of the machine.
    Status(Status),
    /// To [`Request::Exits`]: the exits so far.
    Exits(LiveExits),
    /// To [`Request::Balloon`]: the balloon with its new target. The guest needs time to reach it.
    Balloon(BalloonStatus),
    /// To [`Request::Pause`]: no vCPU runs the guest.
    Paused,
    /// To [`Request::Resume`]: the vCPUs go on.
    Running,
    /// To [`Request::Snapshot`]: memory and state are written, and the machine goes on as before.
    Snapshot {
        /// The size of guest memory.
        memory_bytes: u64,
        /// What of it is not zero, in pages of 4 KiB.
        written_bytes: u64,
        /// How long the guest did not run.
        paused_ms: u64,
        /// The number of disks. Their images are not in the snapshot.
        disks: usize,
        /// The machine was paused before, and is still: its disks are as they have to be for the snapshot.
        stays_paused: bool,
    },
    /// To [`Request::Stop`]: the run is about to end.
    Stopping,
    /// The request was refused.
    Error(RequestError),
}

/// Why a machine refuses a request.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(tag = "error", rename_all = "kebab-case")]
pub enum RequestError {
    /// A balloon request to a machine without one.
    #[error("this machine has no balloon: start it with --balloon")]
    NoBalloon,
    /// A balloon that would leave the guest too little memory.
    #[error("a balloon of {target_bytes} bytes is larger than {max_bytes}, the most for this guest")]
    BalloonTooLarge {
        /// The size that was asked for, in bytes.
        target_bytes: u64,
        /// The largest size, in bytes.
        max_bytes: u64,
    },
    /// There are no vCPUs to look at before the guest runs.
    #[error("the guest does not run yet: try again")]
    NotRunning,
    /// A vCPU is held up in a device: the machine is not paused.
    #[error("a virtual processor does not stop, since it waits for a device: the machine is not paused; try again")]
    Busy,
    /// A machine with devices whose state cannot be saved.
    #[error("this machine cannot be saved: snapshots do not have the state of {options} yet")]
    Unsaved {
        /// The options that the devices are from.
        options: String,
    },
    /// A request for a snapshot without the files that it goes to.
    #[error("a snapshot goes to three empty files that come with the request: use `hwvmm ctl SOCKET snapshot DIR`")]
    NoFiles,
    /// The snapshot cannot be made; the guest goes on.
    #[error("no snapshot was made, and the guest goes on: {message}")]
    Save {
        /// What is wrong, in English.
        message: String,
    },
    /// No request of this protocol.
    #[error(
        "unknown request '{line}'; the requests are: status, exits, balloon SIZE, pause, resume, snapshot DIR, stop"
    )]
    Unknown {
        /// The line as it was received.
        line: String,
    },
    /// A value of a request cannot be read.
    #[error("{message}")]
    Value {
        /// What is wrong with it, in English.
        message: String,
    },
    /// A request of more than [`MAX_REQUEST_BYTES`].
    #[error("a request has at most {max_bytes} bytes")]
    TooLong {
        /// The limit in bytes.
        max_bytes: usize,
    },
}

/// The state of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where the run is.
    pub state: RunState,
    /// The balloon; `None` for a machine without one.
    pub balloon: Option<BalloonStatus>,
}

/// Where a run is between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The machine is made, and its vCPUs do not run yet.
    Starting,
    /// The vCPUs run the guest.
    Running,
    /// The vCPUs wait for [`Request::Resume`].
    Paused,
    /// The run has ended, and the machine is being taken down.
    Stopping,
}

/// The balloon of a machine (virtio 1.3, section 5.5).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonStatus {
    /// Size that the guest was asked for, in bytes.
    pub target_bytes: u64,
    /// Size that the guest says it has reached, in bytes.
    pub actual_bytes: u64,
    /// Free memory that the guest has reported and the host has taken back, in bytes in all.
    pub reported_bytes: u64,
    /// The guest's memory statistics by name, with the unit in the name; empty until its driver has sent them.
    pub guest: BTreeMap<String, u64>,
}

/// Exits of a running machine since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LiveExits {
    /// Time since the vCPUs were started, in nanoseconds.
    pub at_ns: u64,
    /// The exits of each vCPU, by its index.
    pub vcpus: Vec<VcpuExits>,
}

/// Exits of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuExits {
    /// What came back to user space; `None` until the vCPU has been asked once.
    pub userspace_exits: Option<UserspaceExits>,
    /// KVM's cumulative counters of the vCPU by the kernel's name; empty where KVM has no statistics (before Linux 5.14).
    pub kvm: BTreeMap<String, u64>,
}

/// Userspace exits of one vCPU: how often KVM_RUN has returned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserspaceExits {
    /// The number of all userspace exits.
    pub total: u64,
    /// By reason; reasons that have not occurred are left out.
    pub by_reason: BTreeMap<ExitReason, u64>,
    /// By address; addresses that have not been accessed are left out. At most [`MAX_ADDRESSES`] unmapped addresses and as
    /// many MSRs.
    pub by_device: Vec<DeviceCount>,
    /// The number of exits for other unmapped addresses and MSRs.
    #[serde(default)]
    pub beyond: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_json_and_as_words() {
        let balloon = Request::Balloon { target_bytes: 100 << 20 };
        for request in [Request::Status, Request::Exits, balloon, Request::Stop] {
            let line = serde_json::to_string(&request).expect("JSON");
            assert!(line.len() < MAX_REQUEST_BYTES);
            assert_eq!(Request::parse(&line), Ok(request));
        }
        assert_eq!(Request::parse("balloon 100M"), Ok(balloon));
        assert_eq!(Request::parse(" stop "), Ok(Request::Stop));
        assert!(matches!(Request::parse("balloon much"), Err(RequestError::Value { .. })));
        for line in ["", "stop now", "balloon", "{}", "{\"request\":\"balloon\"}", "\"status\"", "{"] {
            assert_eq!(Request::parse(line), Err(RequestError::Unknown { line: line.to_owned() }));
        }
    }

    #[test]
    fn responses_keep_their_fields_on_the_wire() {
        let exits = UserspaceExits {
            total: 3,
            by_reason: BTreeMap::from([(ExitReason::PioOut, 2), (ExitReason::Interrupted, 1)]),
            by_device: vec![DeviceCount {
                bus: AccessSpace::Pio,
                address: 0x3f8,
                device: Some("UART 1".into()),
                reads: 0,
                writes: 2,
            }],
            beyond: 7,
        };
        let kvm = BTreeMap::from([("exits".to_owned(), 9)]);
        let vcpus = vec![VcpuExits { userspace_exits: Some(exits), kvm }, VcpuExits::default()];
        let balloon = BalloonStatus { actual_bytes: 4096, ..BalloonStatus::default() };
        for (response, expected) in [
            (Response::Exits(LiveExits { at_ns: 5, vcpus }), r#""by_reason":{"pio_out":2,"interrupted":1}"#),
            (Response::Status(Status { state: RunState::Running, balloon: None }), r#""state":"running""#),
            (Response::Balloon(balloon), r#""actual_bytes":4096,"#),
            (Response::Stopping, r#"{"response":"stopping"}"#),
            (Response::Error(RequestError::NoBalloon), r#"{"response":"error","error":"no-balloon"}"#),
            (Response::Error(RequestError::TooLong { max_bytes: 256 }), r#""max_bytes":256"#),
        ] {
            let line = serde_json::to_string(&response).expect("JSON");
            assert!(line.contains(expected), "{line}");
            assert_eq!(serde_json::from_str::<Response>(&line).expect("the same type"), response);
        }
    }
}
