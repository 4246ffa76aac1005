//! The values of arguments that the table of roles permits, under the names that the kernel has for them.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "sizes and constants of C, all positive and small"
)]
#![allow(clippy::unnecessary_cast, reason = "the type of ioctl numbers differs between C libraries")]

use kvm_bindings::{
    KVMIO, kvm_debugregs, kvm_irq_level, kvm_irq_routing, kvm_irqchip, kvm_mp_state, kvm_msrs, kvm_regs,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const fn none(kind: u32, number: u32) -> u64 {
    ioctl_expr(_IOC_NONE, kind, number, 0)
}

/// The ioctl reads an argument of type `T` from the process (`_IOW`).
const fn takes<T>(kind: u32, number: u32) -> u64 {
    ioctl_expr(_IOC_WRITE, kind, number, size_of::<T>() as u32)
}

/// The ioctl writes an argument of type `T` to the process (`_IOR`).
const fn gives<T>(kind: u32, number: u32) -> u64 {
    ioctl_expr(_IOC_READ, kind, number, size_of::<T>() as u32)
}

/// The ioctl reads and writes an argument of type `T` (`_IOWR`).
const fn both<T>(kind: u32, number: u32) -> u64 {
    ioctl_expr(_IOC_READ | _IOC_WRITE, kind, number, size_of::<T>() as u32)
}

// include/uapi/linux/kvm.h
pub(super) const KVM_RUN: u64 = none(KVMIO, 0x80);
pub(super) const KVM_GET_REGS: u64 = gives::<kvm_regs>(KVMIO, 0x81);
pub(super) const KVM_GET_DEBUGREGS: u64 = gives::<kvm_debugregs>(KVMIO, 0xa1);
pub(super) const KVM_GET_MSRS: u64 = both::<kvm_msrs>(KVMIO, 0x88);
pub(super) const KVM_GET_MP_STATE: u64 = gives::<kvm_mp_state>(KVMIO, 0x98);
pub(super) const KVM_GET_STATS_FD: u64 = none(KVMIO, 0xce);
pub(super) const KVM_IRQ_LINE: u64 = takes::<kvm_irq_level>(KVMIO, 0x61);
pub(super) const KVM_GET_IRQCHIP: u64 = both::<kvm_irqchip>(KVMIO, 0x62);
pub(super) const KVM_SET_IRQCHIP: u64 = gives::<kvm_irqchip>(KVMIO, 0x63);
pub(super) const KVM_SET_GSI_ROUTING: u64 = takes::<kvm_irq_routing>(KVMIO, 0x6a);

// include/uapi/linux/vhost.h: vhost_memory has 8 bytes before its regions, vhost_vring_state and vhost_vring_file are two
// 32-bit words, vhost_vring_addr is two of them and four addresses.
const VHOST: u32 = 0xaf;
type Pair = [u32; 2];
pub(super) const VHOST_GET_FEATURES: u64 = gives::<u64>(VHOST, 0x00);
pub(super) const VHOST_SET_FEATURES: u64 = takes::<u64>(VHOST, 0x00);
pub(super) const VHOST_SET_MEM_TABLE: u64 = takes::<[u32; 2]>(VHOST, 0x03);
pub(super) const VHOST_SET_VRING_NUM: u64 = takes::<Pair>(VHOST, 0x10);
pub(super) const VHOST_SET_VRING_ADDR: u64 = takes::<[u64; 5]>(VHOST, 0x11);
pub(super) const VHOST_SET_VRING_BASE: u64 = takes::<Pair>(VHOST, 0x12);
pub(super) const VHOST_GET_VRING_BASE: u64 = both::<Pair>(VHOST, 0x12);
pub(super) const VHOST_SET_VRING_KICK: u64 = takes::<Pair>(VHOST, 0x20);
pub(super) const VHOST_SET_VRING_CALL: u64 = takes::<Pair>(VHOST, 0x21);
pub(super) const VHOST_NET_SET_BACKEND: u64 = takes::<Pair>(VHOST, 0x30);
pub(super) const VHOST_VSOCK_SET_RUNNING: u64 = takes::<i32>(VHOST, 0x61);

// include/uapi/linux/if_tun.h, fs.h, perf_event.h
pub(super) const TUNSETOFFLOAD: u64 = takes::<u32>(b'T' as u32, 208);
pub(super) const TUNSETQUEUE: u64 = takes::<i32>(b'T' as u32, 217);
pub(super) const BLKDISCARD: u64 = none(0x12, 119);
pub(super) const BLKZEROOUT: u64 = none(0x12, 127);
pub(super) const BLKGETSIZE64: u64 = gives::<usize>(0x12, 114);

pub(super) const TIOCGWINSZ: u64 = libc::TIOCGWINSZ as u64;
pub(super) const TCGETS: u64 = libc::TCGETS as u64;
pub(super) const TCGETS2: u64 = libc::TCGETS2 as u64;
pub(super) const FIONBIO: u64 = libc::FIONBIO as u64;

/// The sign bit of an int: of the file descriptors that stand for a folder only AT_FDCWD has it.
pub(super) const WORKING_DIRECTORY: u64 = 1 << 31;
/// Size of a page in bytes.
pub(super) const PAGE: u64 = 4096;
pub(super) const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
pub(super) const SIGABRT: u64 = libc::SIGABRT as u64;
pub(super) const SIGBUS: u64 = libc::SIGBUS as u64;
pub(super) const SIGSEGV: u64 = libc::SIGSEGV as u64;
pub(super) const F_DUPFD_CLOEXEC: u64 = libc::F_DUPFD_CLOEXEC as u64;
pub(super) const F_GETFD: u64 = libc::F_GETFD as u64;
pub(super) const F_SETFD: u64 = libc::F_SETFD as u64;
pub(super) const F_GETFL: u64 = libc::F_GETFL as u64;
pub(super) const F_OFD_SETLK: u64 = libc::F_OFD_SETLK as u64;
pub(super) const F_SETFL: u64 = libc::F_SETFL as u64;
/// All flags of an open file but those that a shared folder passes on (`devices/src/virtio/fs/policy.rs`).
pub(super) const OTHER_FILE_FLAGS: u64 =
    0xffff_ffff & !((hwvmm_devices::virtio::fs::OPEN_FLAGS | libc::O_CLOEXEC) as u32 as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_kernel() {
        // From strace's tables of Linux 6.18.
        assert_eq!((KVM_RUN, KVM_GET_REGS, KVM_GET_MP_STATE), (0xae80, 0x8090_ae81, 0x8004_ae98));
        assert_eq!((KVM_GET_MSRS, KVM_SET_GSI_ROUTING, KVM_IRQ_LINE), (0xc008_ae88, 0x4008_ae6a, 0x4008_ae61));
        assert_eq!(
            (VHOST_SET_VRING_ADDR, VHOST_SET_MEM_TABLE, VHOST_NET_SET_BACKEND),
            (0x4028_af11, 0x4008_af03, 0x4008_af30)
        );
        assert_eq!((TUNSETOFFLOAD, TUNSETQUEUE, BLKDISCARD), (libc::TUNSETOFFLOAD, libc::TUNSETQUEUE, 0x1277));
    }
}
