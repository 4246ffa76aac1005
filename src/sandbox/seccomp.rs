//! The filters: a program for each role, made from the table.

use super::numbers::KVM_RUN;
use super::roles::{Call, Condition, ThreadRole, Values};
use super::sys::{self, Listener};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

/// What a filter does at a system call that it does not permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    /// SIGSYS, which ends the process (trap.rs).
    End,
    /// The listener is asked.
    Ask,
}

/// The program of one role.
pub(super) struct Filter {
    program: BpfProgram,
    mismatch: Mismatch,
}

// Offsets in bytes into struct seccomp_data (seccomp(2)), low halves of arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENT_1: u32 = 24;
/// The value of `seccomp_data.arch` for x86-64 system calls (AUDIT_ARCH_X86_64).
const X86_64: u32 = 0xc000_003e;

impl Filter {
    /// Makes the filter of `role`.
    ///
    /// # Errors
    /// Where the table has a condition that seccompiler does not take; it never has (see the tests).
    pub(super) fn new(role: ThreadRole, mismatch: Mismatch) -> Result<Self, BackendError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        let mut unconditional = Vec::new();
        for call in role.lists().iter().copied().flatten() {
            let alternatives = alternatives(call)?;
            if alternatives.is_empty() {
                unconditional.push(call.number);
            }
            rules.entry(call.number).or_default().extend(alternatives);
        }
        for number in unconditional {
            rules.insert(number, Vec::new());
        }
        let action = match mismatch {
            Mismatch::End => SeccompAction::Trap,
            // seccompiler has no SECCOMP_RET_USER_NOTIF; another action holds its place.
            Mismatch::Ask => SeccompAction::Trace(0),
        };
        let place = u32::from(action.clone());
        let mut program: BpfProgram =
            SeccompFilter::new(rules, action, SeccompAction::Allow, TargetArch::x86_64)?.try_into()?;
        if mismatch == Mismatch::Ask {
            let returns =
                |instruction: &&mut sock_filter| u32::from(instruction.code) == libc::BPF_RET && instruction.k == place;
            program.iter_mut().filter(returns).for_each(|instruction| instruction.k = libc::SECCOMP_RET_USER_NOTIF);
        }
        if matches!(role, ThreadRole::Vcpu | ThreadRole::TestVcpu) {
            program.splice(0..0, kvm_run_first());
        }
        Ok(Self { program, mismatch })
    }

    /// Installs the filter for the calling thread. Returns the listener of [`Mismatch::Ask`].
    ///
    /// # Errors
    /// Where the kernel does not take it.
    pub(super) fn install(&self) -> io::Result<Option<OwnedFd>> {
        let listener = if self.mismatch == Mismatch::Ask { Listener::Wanted } else { Listener::None };
        sys::install(&self.program, listener)
    }
}

/// Permits KVM_RUN after seven instructions; everything else goes on to what follows. seccompiler's programs compare with one
/// number after the other, and the kernel's cache of permitted calls leaves out those with conditions.
fn kvm_run_first() -> [sock_filter; 7] {
    let code = |parts: u32| u16::try_from(parts).unwrap_or(0);
    let load = code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
    let equal = code(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K);
    let statement = |code, k| sock_filter { code, jt: 0, jf: 0, k };
    // `beyond` instructions are left out where the values differ.
    let unless = |k, beyond| sock_filter { code: equal, jt: 0, jf: beyond, k };
    let ioctl = u32::try_from(libc::SYS_ioctl).unwrap_or(16);
    let run = u32::try_from(KVM_RUN).unwrap_or(0xae80);
    [
        statement(load, ARGUMENT_1),
        unless(run, 5),
        statement(load, NUMBER),
        unless(ioctl, 3),
        statement(load, ARCHITECTURE),
        unless(X86_64, 1),
        statement(code(libc::BPF_RET | libc::BPF_K), libc::SECCOMP_RET_ALLOW),
    ]
}

/// The rules of a call, of which one must hold; none where the call has no condition.
fn alternatives(call: &Call) -> Result<Vec<SeccompRule>, BackendError> {
    let mut alternatives: Vec<Vec<SeccompCondition>> = Vec::new();
    for condition in call.conditions.iter().flatten() {
        let values = values(condition)?;
        // Each of the new ones with each of those before.
        let before = if alternatives.is_empty() { vec![Vec::new()] } else { alternatives };
        let with = |value: &SeccompCondition| {
            before.iter().map(|all| [all.as_slice(), std::slice::from_ref(value)].concat()).collect()
        };
        alternatives = values.iter().map(with).collect::<Vec<Vec<_>>>().concat();
    }
    alternatives.into_iter().map(SeccompRule::new).collect()
}

/// The conditions on an argument, of which one must hold.
fn values(Condition { argument, values }: &Condition) -> Result<Vec<SeccompCondition>, BackendError> {
    let equal = |value: &u64| SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value);
    match values {
        Values::OneOf(values) => values.iter().map(equal).collect(),
        Values::Without(mask) => {
            let clear = SeccompCmpOp::MaskedEq(*mask);
            Ok(vec![SeccompCondition::new(*argument, SeccompCmpArgLen::Qword, clear, 0)?])
        }
        Values::OwnProcess => Ok(vec![equal(&u64::from(std::process::id()))?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_a_filter() {
        for role in ThreadRole::ALL {
            for mismatch in [Mismatch::End, Mismatch::Ask] {
                let filter = Filter::new(role, mismatch).expect("a filter");
                assert!((50..2000).contains(&filter.program.len()), "{role:?}: {}", filter.program.len());
            }
        }
    }
}
