//! VM exits one by one: KVM's tracepoints on the vCPU threads, read through perf (perf_event_open(2), Linux
//! Documentation/trace/events.rst).

mod collect;
mod format;
mod output;
mod reader;

pub(super) use collect::MAX_RECORDED_CAUSES;
#[cfg(test)]
pub(crate) use collect::recorded;
pub use collect::{VmCause, VmCauseRecord, VmDetail, VmRecord};
pub use format::FormatError;
pub use reader::{Handle, TraceRecord, Tracer, Unavailable};
