//! Holds a profile to a budget ([`Budget`]).

use super::data::{Cause, Exits, Profile};
use crate::config::{AddressSpace, Budget, Counter, Limit, Slack};
use hwvmm_arch::exit_code::Class;
use std::fmt;

/// Causes shown for a limit that was exceeded.
const SHOWN: usize = 3;

/// A limit compared with the count of a profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Name of the limit.
    pub name: String,
    /// The largest count allowed.
    pub most: u64,
    /// The count of the profile; `None` if the profile does not have it.
    pub count: Option<u64>,
    /// The most frequent causes, one line each, where the limit was exceeded.
    pub causes: Vec<String>,
}

impl Check {
    /// Returns true if the count is known and within the limit.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.count.is_some_and(|count| count <= self.most)
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, most, .. } = self;
        match self.count {
            None => write!(
                f,
                "budget {name}: not known: VM exits were counted in total only, so they cannot be compared with {most}"
            ),
            Some(count) if count <= *most => write!(f, "budget {name}: {count} of {most}"),
            Some(count) => {
                write!(f, "budget {name}: {count} of {most}, {} too many", count - most)?;
                for cause in &self.causes {
                    write!(f, "\n    {cause}")?;
                }
                Ok(())
            }
        }
    }
}

/// Returns true if the exits of `cause` are counted by `counter`.
fn counts(counter: &Counter, cause: &Cause) -> bool {
    match counter {
        Counter::Total | Counter::Userspace => true,
        Counter::Class(class) => cause.class == (*class).into(),
        Counter::Reason(reason) => cause.reason == *reason,
        Counter::Address(kind, number) => cause.space == Some(*kind) && cause.address == Some(*number),
    }
}

/// Returns the exits among which `counter` counts: VM exits where the profile has them and the counter allows both.
fn exits<'a>(counter: &Counter, profile: &'a Profile) -> Option<&'a Exits> {
    match counter {
        Counter::Total
        | Counter::Class(_)
        | Counter::Address(
            AddressSpace::Leaf | AddressSpace::Vector | AddressSpace::ControlRegister | AddressSpace::DebugRegister,
            _,
        ) => profile.vm_exits.as_ref(),
        Counter::Userspace | Counter::Reason(_) => Some(&profile.userspace_exits),
        Counter::Address(..) => Some(profile.vm_exits.as_ref().unwrap_or(&profile.userspace_exits)),
    }
}

/// Classes of which a guest has more where it runs longer: the host's interrupts, the ticks of its own timer, and the windows that
/// both of them open.
const OF_TIME: [Class; 3] = [Class::Interrupt, Class::Timer, Class::Window];

/// Returns the counts of `profile`, each with `slack`, as limits. What comes with the time that the guest runs is left out, and
/// with it the total: a slow host has more of it.
#[must_use]
pub fn from_profile(profile: &Profile, slack: Slack) -> Budget {
    let limit = |counter, count| Limit { counter, max_exits: slack.limit(count) };
    let mut limits = vec![limit(Counter::Userspace, profile.userspace_exits.total)];
    if let Some(exits) = &profile.vm_exits {
        for class in Class::ALL.into_iter().filter(|class| !OF_TIME.contains(class)) {
            let of_class = exits.causes.iter().filter(|cause| cause.class == class.into());
            let count = of_class.fold(0_u64, |sum, cause| sum.saturating_add(cause.count));
            limits.push(limit(Counter::Class(class), count));
        }
    }
    Budget { limits }
}

/// Compares `profile` with each limit of `budget`.
#[must_use]
pub fn check(budget: &Budget, profile: &Profile) -> Vec<Check> {
    budget.limits.iter().map(|limit| check_limit(limit, profile)).collect()
}

fn check_limit(limit: &Limit, profile: &Profile) -> Check {
    let mut check = Check { name: limit.counter.to_string(), most: limit.max_exits, count: None, causes: Vec::new() };
    let Some(exits) = exits(&limit.counter, profile) else {
        // KVM counts all VM exits, without a trace too.
        if limit.counter == Counter::Total {
            check.count = profile.kvm.get("exits").copied();
        }
        return check;
    };
    let mut causes: Vec<&Cause> = exits.causes.iter().filter(|cause| counts(&limit.counter, cause)).collect();
    check.count = Some(causes.iter().fold(0, |sum, cause| sum.saturating_add(cause.count)));
    if !check.is_held() {
        causes.sort_by_key(|cause| std::cmp::Reverse(cause.count));
        let line =
            |cause: &&Cause| format!("{} × {} {} from {}", cause.count, cause.reason, cause.what(), cause.place());
        check.causes = causes.iter().take(SHOWN).map(line).collect();
    }
    check
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    fn checks(text: &str, profile: &Profile) -> Vec<Check> {
        check(&Budget::parse(text).expect("a budget"), profile)
    }

    fn held(text: &str) -> Vec<bool> {
        checks(text, &sample()).iter().map(Check::is_held).collect()
    }

    #[test]
    fn limits_are_held_or_not() {
        assert_eq!(held("total=300, userspace=0x12c,cpuid=299,pio=0"), [true, true, false, true]);
        assert_eq!(held("leaf.0x40000000=300,userspace.pio_out=299,msr.0x10=0"), [true, false, true]);
        let check = checks("cpuid=1", &sample()).remove(0).to_string();
        assert!(check.contains("cpuid: 300 of 1, 299 too many") && check.contains("io_serial_out+0x16"), "{check}");
    }

    #[test]
    fn what_was_not_measured_is_not_held() {
        let mut profile = sample();
        profile.vm_exits = None;
        profile.kvm.insert("exits".into(), 400);
        let check = |text: &str| checks(text, &profile).remove(0);
        assert!(!check("cpuid=1000").is_held() && check("cpuid=1000").to_string().contains("not known"));
        assert!(check("total=400").is_held() && !check("total=399").is_held());
        assert!(check("port.0x3f8=300").is_held() && !check("port.0x3f8=299").is_held(), "by userspace exits");
    }

    #[test]
    fn a_slow_host_does_not_exceed_yesterdays_budget() {
        let mut today = sample();
        let budget = from_profile(&sample(), Slack::parse("0%").expect("a percentage"));
        for class in OF_TIME {
            let cause = Cause { class: class.into(), count: 1000, ..Cause::default() };
            today.vm_exits.as_mut().expect("there").causes.push(cause);
        }
        assert!(check(&budget, &today).iter().all(Check::is_held), "{:?}", check(&budget, &today));
        let timer = Check { causes: Vec::new(), ..checks("timer=999", &today).remove(0) };
        assert_eq!((timer.count, timer.is_held()), (Some(1000), false), "a budget of its own holds it");
    }

    #[test]
    fn yesterdays_run_is_a_budget() {
        let mut today = sample();
        let budget = from_profile(&sample(), Slack::parse("2%").expect("a percentage"));
        assert!(check(&budget, &today).iter().all(Check::is_held));
        today.userspace_exits.causes[0].count = 306;
        assert!(check(&budget, &today).iter().all(Check::is_held));
        today.userspace_exits.causes[0].count = 307;
        assert_eq!(check(&budget, &today).iter().filter(|check| !check.is_held()).count(), 1);
    }
}
