//! What each thread of the machine's process may ask of the kernel: the one table.
//!
//! A system call is permitted where its name stands in a list of the thread's role and its arguments meet the conditions
//! behind the name: `ioctl(1 is KVM_RUN)` means that argument 1 (counted from 0) is KVM_RUN. Everything else ends the process.
//! Files, sockets and devices are opened before the threads enter their roles, so no list but that of shared folders opens
//! anything.

use super::numbers;

/// Reads a list of the table.
macro_rules! calls {
    ($($name:ident $(($argument:literal $($condition:tt)+))?),+ $(,)?) => {
        &[$(Call {
            number: calls!(@number $name),
            conditions: calls!(@conditions $($argument $($condition)+)?),
        }),+]
    };
    (@conditions) => { [None, None] };
    (@conditions $argument:literal is $value:ident, $other:literal without $bits:ident) => {
        [calls!(@condition $argument is $value), calls!(@condition $other without $bits)]
    };
    (@conditions $($condition:tt)+) => { [calls!(@condition $($condition)+), None] };
    (@number $name:ident) => { syscalls::Sysno::$name as i64 };
    (@condition $argument:literal is own process) => { Some(Condition { argument: $argument, values: Values::OwnProcess }) };
    (@condition $argument:literal is null) => {
        Some(Condition { argument: $argument, values: Values::Without(u64::MAX) })
    };
    (@condition $argument:literal is $($value:ident),+) => {
        Some(Condition { argument: $argument, values: Values::OneOf(&[$(calls!(@value $value)),+]) })
    };
    (@condition $argument:literal without $value:ident) => {
        Some(Condition { argument: $argument, values: Values::Without(calls!(@value $value)) })
    };
    (@value $value:ident) => { numbers::$value };
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadRole {
    /// The main thread: the event loop, the control socket, the end of the run.
    Main,
    /// A vCPU: KVM_RUN and the devices on the port and memory bus.
    Vcpu,
    /// A vCPU of a machine with QEMU's test device (`--testdev`).
    TestVcpu,
    /// Takes coalesced writes from KVM's ring.
    Drain,
    /// Reads the tracepoints of VM exits.
    Trace,
    /// Listens to passt, and waits for its end.
    Passt,
    /// A queue of a disk.
    Block,
    /// A queue of a network card, with a tap interface or passt.
    Net,
    /// Queues that the host's kernel works on: vhost-net, vhost-vsock.
    Vhost,
    /// Unix sockets between guest and host.
    Vsock,
    /// A queue of a shared folder.
    Fs,
    /// A direction of the virtio console.
    Console,
    /// The pages of the memory balloon, or its statistics.
    Balloon,
    /// The queue of the entropy device.
    Rng,
    /// The only thread of a process that reads foreign files (confined.rs).
    Parser,
}

impl ThreadRole {
    /// All roles, in the order of their numbers.
    pub const ALL: [Self; 15] = [
        Self::Main,
        Self::Vcpu,
        Self::TestVcpu,
        Self::Drain,
        Self::Trace,
        Self::Passt,
        Self::Block,
        Self::Net,
        Self::Vhost,
        Self::Vsock,
        Self::Fs,
        Self::Console,
        Self::Balloon,
        Self::Rng,
        Self::Parser,
    ];

    /// The lists of system calls that the role permits.
    #[must_use]
    pub(super) fn lists(self) -> &'static [&'static [Call]] {
        match self {
            Self::Main => &[EVERY, EVENTS, SOCKETS, BUS, MAIN],
            Self::Vcpu => &[EVERY, BUS, VCPU],
            Self::TestVcpu => &[EVERY, BUS, VCPU, TESTDEV],
            Self::Drain => &[EVERY, BUS],
            Self::Trace => &[EVERY, EVENTS],
            Self::Passt => &[EVERY, PASST],
            Self::Block => &[EVERY, EVENTS, BLOCK],
            Self::Net => &[EVERY, EVENTS, SOCKETS, NET],
            Self::Vhost => &[EVERY, EVENTS, NET, VHOST],
            Self::Vsock => &[EVERY, EVENTS, SOCKETS, VSOCK],
            Self::Fs => &[EVERY, EVENTS, FS],
            Self::Console | Self::Balloon | Self::Rng => &[EVERY, EVENTS],
            Self::Parser => &[PARSER],
        }
    }
}

/// Memory, locks, waits, messages (on what is connected already), the end of a thread and that of the process. Nothing here opens a file, makes a thread or
/// makes memory executable; signals go to this process only.
const EVERY: &[Call] = calls![
    read, write, writev, close, fcntl(1 is F_GETFD), sendto(4 is null),
    futex, sched_yield, restart_syscall, nanosleep, clock_nanosleep, clock_gettime, poll, ppoll,
    mmap(2 without PROT_EXEC), mprotect(2 without PROT_EXEC), munmap, mremap, madvise, brk, getrandom,
    rt_sigreturn, rt_sigprocmask, sigaltstack, rt_sigaction(0 is SIGABRT, SIGBUS, SIGSEGV),
    getpid, gettid, tgkill(0 is own process), sched_getaffinity, exit, exit_group,
];

/// An event loop that exists already, timers and eventfds.
const EVENTS: &[Call] = calls![epoll_wait, epoll_pwait, epoll_ctl, timerfd_settime, timerfd_gettime];

/// Data on sockets that exist already.
const SOCKETS: &[Call] = calls![
    readv, sendto(4 is null), recvfrom, shutdown, getsockopt, setsockopt, ioctl(1 is FIONBIO),
];

const MAIN: &[Call] = calls![
    accept4, pread64, lseek, fstat, statx, clock_getres, getrusage, kill(0 is own process),
    // The terminal's size, and KVM's figures. The terminal's mode is the parent's to set. Guest memory, ioeventfds and irqfds are set up
    // before the guest runs, and stay.
    ioctl(1 is TIOCGWINSZ, TCGETS, TCGETS2, KVM_GET_STATS_FD),
    // Disks are flushed and unlocked at the end.
    fsync, fdatasync, flock, pwrite64, pwritev, preadv, io_uring_enter,
    // A snapshot: a client of the control socket passes the files that it goes to.
    recvmsg, ftruncate, ioctl(1 is KVM_GET_IRQCHIP, KVM_GET_CLOCK),
    dup, fcntl(1 is F_DUPFD_CLOEXEC, F_SETFD, F_GETFL, F_OFD_SETLK),
];

/// What devices do when the guest accesses the port or memory bus: the I/O APIC and MSI-X tables route interrupts. These accesses
/// are carried out by vCPUs, by the thread that takes coalesced writes, and at the end of a run by the main thread.
const BUS: &[Call] = calls![ioctl(1 is KVM_SET_GSI_ROUTING)];

const VCPU: &[Call] = calls![
    // The filter has a fast path for KVM_RUN (seccomp.rs).
    ioctl(1 is KVM_RUN, KVM_GET_REGS, KVM_GET_MP_STATE, KVM_GET_MSRS, KVM_GET_STATS_FD, KVM_KVMCLOCK_CTRL,
          // A snapshot; debug registers also for an exit cluster.
          KVM_GET_SREGS, KVM_GET_LAPIC, KVM_GET_VCPU_EVENTS, KVM_GET_DEBUGREGS, KVM_GET_TSC_KHZ, KVM_GET_XSAVE, KVM_GET_XCRS),
    // KVM's statistics of the vCPU.
    pread64,
];

/// The test device raises interrupt lines, and has KVM drop its translation of a page by making it executable for a moment.
const TESTDEV: &[Call] = calls![ioctl(1 is KVM_IRQ_LINE, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP), mprotect(1 is PAGE)];

const PASST: &[Call] = calls![wait4, waitid];

const BLOCK: &[Call] = calls![
    io_uring_enter, pread64, pwrite64, preadv, pwritev, preadv2, pwritev2, readv,
    fdatasync, fsync, sync_file_range, fallocate, ftruncate, lseek, fstat, statx, flock, fcntl(1 is F_OFD_SETLK),
    // A block device: its size, discards, zeroes.
    ioctl(1 is BLKGETSIZE64, BLKDISCARD, BLKZEROOUT),
];

const NET: &[Call] = calls![ioctl(1 is TUNSETOFFLOAD, TUNSETQUEUE)];

const VHOST: &[Call] = calls![
    ioctl(1 is VHOST_GET_FEATURES, VHOST_SET_FEATURES, VHOST_SET_MEM_TABLE, VHOST_SET_VRING_NUM, VHOST_SET_VRING_ADDR,
          VHOST_SET_VRING_BASE, VHOST_GET_VRING_BASE, VHOST_SET_VRING_KICK, VHOST_SET_VRING_CALL, VHOST_NET_SET_BACKEND,
          VHOST_VSOCK_SET_RUNNING),
];

/// Host programs connect to the device's socket. Connections of the guest to host programs come from the parent process, by recvmsg.
const VSOCK: &[Call] = calls![accept4, recvmsg];

/// Names are opened beneath a folder that is open, never from the working directory. Landlock confines what can be
/// opened, made and removed to the shared folders; changes of mode, owner and times need a name, and the process' root has none.
const FS: &[Call] = calls![
    openat(0 without WORKING_DIRECTORY),
    mkdirat(0 without WORKING_DIRECTORY), mknodat(0 without WORKING_DIRECTORY), symlinkat(1 without WORKING_DIRECTORY),
    linkat(0 without WORKING_DIRECTORY), unlinkat(0 without WORKING_DIRECTORY), renameat2(0 without WORKING_DIRECTORY),
    newfstatat(0 without WORKING_DIRECTORY), statx(0 without WORKING_DIRECTORY), readlinkat(0 without WORKING_DIRECTORY),
    fchmodat(0 without WORKING_DIRECTORY), fchownat(0 without WORKING_DIRECTORY), utimensat(0 without WORKING_DIRECTORY),
    // The number of a file's mount, which statx(2) tells since Linux 5.8.
    name_to_handle_at(0 without WORKING_DIRECTORY),
    fstat, fstatfs, getdents64, lseek, fchmod,
    pread64, pwrite64, preadv, pwritev, fallocate, ftruncate, fsync, fdatasync,
    fgetxattr, fsetxattr, flistxattr, fremovexattr,
    // With the flags that the guest's programs may choose for an open file. O_ASYNC is none of them: by it the kernel sends signals, on
    // a terminal to all that run in its foreground.
    dup, fcntl(1 is F_SETFL, 2 without OTHER_FILE_FLAGS),
    // The owner of new files is the guest's user.
    setresuid, setresgid,
];

/// Reads and writes files that are open, takes memory, and ends: by itself, by abort(3), or by a stack overflow. clock_gettime is
/// a system call for the clock of CPU time. ftruncate and pwrite64 are for the file that is unpacked into; packed files, symbol files and disk
/// images are open for reading only, and RLIMIT_FSIZE limits what is written (confined.rs).
const PARSER: &[Call] = calls![
    read, pread64, preadv, write, pwrite64, lseek, ftruncate, fstat, statx,
    mmap(2 without PROT_EXEC), mprotect(2 without PROT_EXEC), munmap, mremap, madvise, brk,
    clock_gettime, getrandom, restart_syscall, futex,
    rt_sigreturn, rt_sigprocmask, sigaltstack, rt_sigaction(0 is SIGABRT, SIGBUS, SIGSEGV),
    getpid, gettid, tgkill(0 is own process), exit, exit_group,
];

/// A system call that is permitted under conditions.
pub(super) struct Call {
    /// The number of the system call on x86-64 (`SYS_*`).
    pub(super) number: i64,
    /// What its arguments must be, all of them; none where any will do.
    pub(super) conditions: [Option<Condition>; 2],
}

/// A condition on one argument.
pub(super) struct Condition {
    /// The argument, counted from 0.
    pub(super) argument: u8,
    pub(super) values: Values,
}

/// The permitted values of an argument.
pub(super) enum Values {
    /// One of these. Only the low 32 bits are compared: what the kernel has is an int.
    OneOf(&'static [u64]),
    /// Anything with these bits clear.
    Without(u64),
    /// The id of this process.
    OwnProcess,
}
