//! Snapshots: a machine's memory and state in a folder, from which runs start. See README.md.

mod description;
mod features;
mod folder;
mod format;
mod memory;
mod recording;
mod working_set;

pub use description::{
    AgentDescription, Description, DiskDescription, ImageFormat, Irqchip, NetDescription, RngDescription, RootKind,
    ShareDescription, SocketsDescription,
};
pub use features::{FeatureError, check_features, vendor_name};
pub use folder::{Draft, Files, FolderError, MAX_DESCRIPTION_BYTES, Opened, check_targets, parse_description};
pub use format::{FormatError, MAX_STATE_BYTES, STATE_VERSION, State, checksum, decode, encode};
pub use memory::{bytes_of_banks, write_memory};
pub use recording::{RecordError, RecordingFolder};
pub use working_set::{MAX_WORKING_SET_BYTES, PageRange, PageUse, WorkingSet, WorkingSetError};
