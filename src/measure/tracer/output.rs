//! Events of several tracepoints in one ring, in their order: perf-event2 has no call for it.

use std::io;
use std::os::fd::AsRawFd;

mod number {
    // PERF_EVENT_IOC_SET_OUTPUT, include/uapi/linux/perf_event.h.
    pub(super) const SET_OUTPUT: u64 = 0x2405;
}

/// Sends the records of `event` to the ring of `ring`.
pub(super) fn redirect<A: AsRawFd, B: AsRawFd>(event: &A, ring: &B) -> io::Result<()> {
    // SAFETY: both are open file descriptors of perf events; the ioctl takes a number and touches no memory of ours.
    let result = unsafe { libc::ioctl(event.as_raw_fd(), number::SET_OUTPUT, ring.as_raw_fd()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
