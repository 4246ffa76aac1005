//! Sockets of type SOCK_SEQPACKET (unix(7)), over which the two processes of a run speak.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::BorrowedFd;

/// Returns true if the other end is closed. Where it is not, a read of 0 bytes was an empty packet: recv(2) returns 0 for both.
pub(crate) fn is_closed(socket: BorrowedFd<'_>) -> bool {
    let mut socket = [PollFd::from_borrowed_fd(socket, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut socket, Some(&now)).is_err() || socket[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
}
