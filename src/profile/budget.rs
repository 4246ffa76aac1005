//! Budgets: how many exits of which kind there may be.

use super::data::{Cause, Exits, Profile};
use hwvmm_arch::exit_code::Class;
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Causes shown for an overrun.
const SHOWN: usize = 3;

/// A budget that cannot be read.
#[derive(Debug, Error)]
pub enum BudgetError {
    /// A limit's name.
    #[error(
        "unknown budget '{name}'; known are: total, userspace, {}, userspace.REASON (as in userspace.pio_out), and port.N, \
         gpa.N, msr.N, leaf.N for one port, address, MSR or CPUID leaf",
        classes()
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// A limit's value.
    #[error("budget {name}={value}: not a whole number")]
    Value {
        /// The limit's name.
        name: String,
        /// What was given.
        value: String,
    },
    /// No limits.
    #[error("the budget '{0}' has no limits: it wants NAME=COUNT,..., or a file with such lines")]
    Empty(String),
    /// A file.
    #[error("cannot read the budget {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// The slack.
    #[error("--slack {0}: not a percentage, as in 2% or 0.5%")]
    Slack(String),
}

fn classes() -> String {
    Class::ALL.map(Class::name).join(", ")
}

/// What a limit is about.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    /// All VM exits.
    Total,
    /// All userspace exits.
    Userspace,
    /// VM exits of a kind.
    Class(String),
    /// Userspace exits of a reason.
    Reason(String),
    /// One number of a space: VM exits where they are known, else userspace exits.
    Address(&'static str, u64),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Limit {
    name: String,
    item: Item,
    most: u64,
}

/// Limits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    limits: Vec<Limit>,
}

/// What became of one limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// The limit's name.
    pub name: String,
    /// How many there might have been.
    pub most: u64,
    /// How many there were; `None` where this run could not tell.
    pub count: Option<u64>,
    /// For an overrun: the causes that count most.
    pub causes: Vec<String>,
}

impl Check {
    /// Whether the limit was held.
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
                "budget {name}: not known: VM exits were not told apart in this run, so {most} is not shown to hold"
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

fn parse_number(text: &str) -> Option<u64> {
    let text = text.trim();
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.replace('_', "").parse().ok(),
    }
}

impl Item {
    fn parse(name: &str) -> Option<Self> {
        if let Some((space, number)) = name.split_once('.') {
            let space = match space {
                "userspace" => {
                    let known = crate::exit::ExitReason::ALL.iter().any(|reason| reason.name() == number);
                    return known.then(|| Self::Reason(number.to_owned()));
                }
                "port" => "port",
                "gpa" => "gpa",
                "msr" => "msr",
                "leaf" => "leaf",
                _ => return None,
            };
            return parse_number(number).map(|number| Self::Address(space, number));
        }
        match name {
            "total" => Some(Self::Total),
            "userspace" => Some(Self::Userspace),
            _ => Class::ALL.iter().any(|class| class.name() == name).then(|| Self::Class(name.to_owned())),
        }
    }

    fn matches(&self, cause: &Cause) -> bool {
        match self {
            Self::Total | Self::Userspace => true,
            Self::Class(class) => cause.class == *class,
            Self::Reason(reason) => cause.reason == *reason,
            Self::Address(space, number) => cause.space.as_deref() == Some(*space) && cause.address == Some(*number),
        }
    }

    /// The exits that the item is counted in.
    fn exits<'a>(&self, profile: &'a Profile) -> Option<&'a Exits> {
        match self {
            Self::Total | Self::Class(_) => profile.vm_exits.as_ref(),
            Self::Userspace | Self::Reason(_) => Some(&profile.userspace_exits),
            Self::Address("leaf", _) => profile.vm_exits.as_ref(),
            Self::Address(..) => Some(profile.vm_exits.as_ref().unwrap_or(&profile.userspace_exits)),
        }
    }
}

impl Budget {
    /// Reads `NAME=COUNT,...`; or, where there is no `=`, a file with such lines (`#` begins a comment).
    ///
    /// # Errors
    /// [`BudgetError`].
    pub fn parse(text: &str) -> Result<Self, BudgetError> {
        if text.contains('=') {
            return Self::parse_list(text, text.split(','));
        }
        let path = Path::new(text);
        let contents = std::fs::read_to_string(path).map_err(|source| BudgetError::Read(path.to_owned(), source))?;
        let lines = contents.lines().map(|line| line.split('#').next().unwrap_or_default());
        Self::parse_list(text, lines.flat_map(|line| line.split(',')))
    }

    fn parse_list<'a>(whole: &str, items: impl Iterator<Item = &'a str>) -> Result<Self, BudgetError> {
        let mut budget = Self::default();
        for item in items.map(str::trim).filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| BudgetError::Name { name: item.to_owned() })?;
            let (name, value) = (name.trim(), value.trim());
            let parsed = Item::parse(name).ok_or_else(|| BudgetError::Name { name: name.to_owned() })?;
            let most = parse_number(value)
                .ok_or_else(|| BudgetError::Value { name: name.to_owned(), value: value.to_owned() })?;
            budget.limits.push(Limit { name: name.to_owned(), item: parsed, most });
        }
        if budget.limits.is_empty() {
            return Err(BudgetError::Empty(whole.to_owned()));
        }
        Ok(budget)
    }

    /// The counts of a profile, and `slack` (as in "2%") more, as limits. The host's interrupts are left out, and with
    /// them the total: they are not the guest's doing.
    ///
    /// # Errors
    /// Where the slack is no percentage.
    pub fn from_profile(profile: &Profile, slack: &str) -> Result<Self, BudgetError> {
        let wrong = || BudgetError::Slack(slack.to_owned());
        let per_cent: f64 = slack.trim().trim_end_matches('%').trim().parse().map_err(|_| wrong())?;
        if !(0.0..=1000.0).contains(&per_cent) {
            return Err(wrong());
        }
        // In hundredths of a per cent, as a whole number.
        let hundredths = std::time::Duration::from_secs_f64(per_cent * 100.0 / 1e9).as_nanos();
        let more = |count: u64| {
            let slack = (u128::from(count) * hundredths).div_ceil(10_000);
            u64::try_from(u128::from(count) + slack).unwrap_or(u64::MAX)
        };
        let mut budget = Self::default();
        let mut add = |name: String, item: Item, count: u64| {
            budget.limits.push(Limit { name, item, most: more(count) });
        };
        add("userspace".into(), Item::Userspace, profile.userspace_exits.total);
        if let Some(exits) = &profile.vm_exits {
            for class in Class::ALL.iter().filter(|class| **class != Class::Interrupt) {
                let of_class = exits.causes.iter().filter(|cause| cause.class == class.name());
                let count = of_class.fold(0_u64, |sum, cause| sum.saturating_add(cause.count));
                add(class.name().into(), Item::Class(class.name().into()), count);
            }
        }
        Ok(budget)
    }

    /// Adds the limits of another budget.
    pub fn extend(&mut self, other: Self) {
        self.limits.extend(other.limits);
    }

    /// Whether there are no limits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.limits.is_empty()
    }

    /// Compares a profile with the limits.
    #[must_use]
    pub fn check(&self, profile: &Profile) -> Vec<Check> {
        self.limits.iter().map(|limit| limit.check(profile)).collect()
    }
}

impl Limit {
    fn check(&self, profile: &Profile) -> Check {
        let mut check = Check { name: self.name.clone(), most: self.most, count: None, causes: Vec::new() };
        let Some(exits) = self.item.exits(profile) else {
            // The total is known without a trace.
            if self.item == Item::Total {
                check.count = profile.kvm.get("exits").copied();
            }
            return check;
        };
        let mut causes: Vec<&Cause> = exits.causes.iter().filter(|cause| self.item.matches(cause)).collect();
        check.count = Some(causes.iter().fold(0, |sum, cause| sum.saturating_add(cause.count)));
        if !check.is_held() {
            causes.sort_by_key(|cause| std::cmp::Reverse(cause.count));
            let line =
                |cause: &&Cause| format!("{} × {} {} from {}", cause.count, cause.reason, cause.what(), cause.place());
            check.causes = causes.iter().take(SHOWN).map(line).collect();
        }
        check
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    fn held(text: &str) -> Vec<bool> {
        Budget::parse(text).expect("a budget").check(&sample()).iter().map(Check::is_held).collect()
    }

    #[test]
    fn limits_are_held_or_not() {
        assert_eq!(held("total=300, userspace=0x12c,cpuid=299,pio=0"), [true, true, false, true]);
        assert_eq!(held("leaf.0x40000000=300,userspace.pio_out=299,msr.0x10=0"), [true, false, true]);
        let check = Budget::parse("cpuid=1").expect("a budget").check(&sample()).remove(0).to_string();
        assert!(check.contains("cpuid: 300 of 1, 299 too many") && check.contains("io_serial_out+0x16"), "{check}");
    }

    #[test]
    fn what_was_not_measured_is_not_held() {
        let mut profile = sample();
        profile.vm_exits = None;
        profile.kvm.insert("exits".into(), 400);
        let check = |text: &str| Budget::parse(text).expect("a budget").check(&profile).remove(0);
        assert!(!check("cpuid=1000").is_held() && check("cpuid=1000").to_string().contains("not known"));
        assert!(check("total=400").is_held() && !check("total=399").is_held());
        assert!(check("port.0x3f8=300").is_held() && !check("port.0x3f8=299").is_held(), "by userspace exits");
    }

    #[test]
    fn yesterdays_run_is_a_budget() {
        let mut today = sample();
        let budget = Budget::from_profile(&sample(), "2%").expect("a budget");
        assert!(budget.check(&today).iter().all(Check::is_held));
        today.userspace_exits.causes[0].count = 306;
        assert!(budget.check(&today).iter().all(Check::is_held));
        today.userspace_exits.causes[0].count = 307;
        assert_eq!(budget.check(&today).iter().filter(|check| !check.is_held()).count(), 1);
        assert!(Budget::from_profile(&today, "much").is_err() && Budget::from_profile(&today, "-1%").is_err());
    }

    #[test]
    fn errors_name_what_is_known() {
        for (text, words) in [
            ("colour=1", "known are: total, userspace, pio"),
            ("userspace.colour=1", "known are"),
            ("pio=many", "budget pio=many"),
            (",=,", "unknown budget ''"),
            ("/nowhere/file", "/nowhere/file"),
        ] {
            let error = Budget::parse(text).expect_err("wrong").to_string();
            assert!(error.contains(words), "{error}");
        }
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "# limits\ntotal = 10\npio=1, npf=2 # two\n").expect("written");
        assert_eq!(Budget::parse(&file.path().to_string_lossy()).expect("a budget").limits.len(), 3);
        std::fs::write(file.path(), "# none\n").expect("written");
        assert!(Budget::parse(&file.path().to_string_lossy()).expect_err("empty").to_string().contains("no limits"));
    }
}
