//! What to do about exits. The rules are data: `advice.toml` beside this file.

use super::data::{Cause, Exits, Profile};
use super::kinds::{ExitClass, PhaseName};
use super::mmu_work::is_shadow;
use super::units::{float, number, share, time};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::OnceLock;

const RULES: &str = include_str!("advice.toml");

/// One piece of advice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// The name of the rule in advice.toml.
    pub rule: &'static str,
    /// What was found, and what to do.
    pub text: String,
    /// Exits that it saves.
    pub saved: u64,
}

#[derive(Debug, Deserialize)]
struct Rules {
    rule: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    name: String,
    #[serde(default)]
    sort: Option<Sort>,
    #[serde(default)]
    class: Option<ExitClass>,
    #[serde(default)]
    either: Option<Vec<Kind>>,
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    unmapped: bool,
    #[serde(default)]
    address: Option<(u64, u64)>,
    #[serde(default)]
    write: Option<bool>,
    #[serde(default)]
    virtio: Option<bool>,
    #[serde(default)]
    phase: Option<PhaseName>,
    #[serde(default)]
    counter: Option<String>,
    #[serde(default)]
    among: Option<BTreeMap<String, u64>>,
    #[serde(default)]
    shadow: Option<bool>,
    share: f64,
    count: u64,
    saves: f64,
    text: String,
    #[cfg_attr(not(test), expect(dead_code, reason = "read by the rules' test"))]
    example: toml::Value,
}

/// Causes with this reason, or with this device or register.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
enum Kind {
    Reason(String),
    Device(String),
}

impl Kind {
    fn matches(&self, cause: &Cause) -> bool {
        match self {
            Self::Reason(name) => cause.reason == *name,
            Self::Device(name) => cause.device.as_ref() == Some(name),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Sort {
    Vm,
    Userspace,
}

/// What of a profile a rule is about.
struct Found<'a> {
    count: u64,
    time_ns: u64,
    all: u64,
    function: String,
    device: &'a str,
}

/// The rules; the file is part of the program, and the tests read all of it.
fn rules() -> &'static [Rule] {
    static PARSED: OnceLock<Vec<Rule>> = OnceLock::new();
    PARSED.get_or_init(|| match toml::from_str::<Rules>(RULES) {
        Ok(rules) => rules.rule,
        Err(error) => {
            log::error!("advice.toml: {error}");
            Vec::new()
        }
    })
}

impl Rule {
    fn matches(&self, cause: &Cause) -> bool {
        let device = match (&self.device, &cause.device) {
            (Some(start), Some(device)) => device.starts_with(start.as_str()),
            (Some(_), None) => false,
            (None, _) => true,
        };
        device
            && self.either.as_ref().is_none_or(|kinds| kinds.iter().any(|kind| kind.matches(cause)))
            && self.class.is_none_or(|class| class == cause.class)
            && (!self.unmapped || cause.device.is_none())
            && self.address.is_none_or(|(first, last)| cause.address.is_some_and(|it| (first..=last).contains(&it)))
            && self.write.is_none_or(|write| cause.write == Some(write))
    }

    fn in_exits<'a>(&self, exits: &'a Exits) -> Found<'a> {
        let mut found = Found { count: 0, time_ns: 0, all: exits.total, function: String::new(), device: "" };
        let mut functions: BTreeMap<String, u64> = BTreeMap::new();
        for cause in exits.causes.iter().filter(|cause| self.matches(cause)) {
            found.count = found.count.saturating_add(cause.count);
            found.time_ns = found.time_ns.saturating_add(cause.time_ns);
            let sum = functions.entry(cause.function()).or_default();
            *sum = sum.saturating_add(cause.count);
            if found.device.is_empty() {
                found.device = cause.device.as_deref().unwrap_or("");
            }
        }
        found.function =
            functions.into_iter().max_by_key(|(_, count)| *count).map(|(name, _)| name).unwrap_or_default();
        found
    }

    fn in_phases(&self, profile: &Profile, name: PhaseName) -> Found<'static> {
        let phases = profile.phases.iter().filter(|phase| phase.name == name);
        let ns = phases.map(super::data::Phase::length_ns).max().unwrap_or(0);
        Found { count: ns, time_ns: ns, all: profile.ran_ns, function: String::new(), device: "" }
    }

    fn in_counters(&self, profile: &Profile, counter: &str) -> Found<'static> {
        let of = |name: &str| profile.kvm.get(name).copied().unwrap_or(0);
        let weighed = |(name, weight): (&String, &u64)| of(name).saturating_mul(*weight);
        let all = self.among.as_ref().map_or_else(|| of("exits"), |among| among.iter().map(weighed).sum());
        Found { count: of(counter), time_ns: 0, all, function: String::new(), device: "" }
    }

    fn apply(&'static self, profile: &Profile) -> Option<Advice> {
        if self.shadow.is_some_and(|wanted| wanted != is_shadow(&profile.kvm)) {
            return None;
        }
        if self.virtio.is_some_and(|wanted| wanted == profile.virtio.is_empty()) {
            return None;
        }
        let found = match (self.phase, &self.counter, self.sort) {
            (Some(phase), _, _) => self.in_phases(profile, phase),
            (None, Some(counter), _) => self.in_counters(profile, counter),
            (None, None, Some(Sort::Vm)) => self.in_exits(profile.vm_exits.as_ref()?),
            (None, None, _) => self.in_exits(&profile.userspace_exits),
        };
        if found.count == 0 || found.count < self.count || float(found.count) < self.share * float(found.all) {
            return None;
        }
        let saved = std::time::Duration::try_from_secs_f64(float(found.count) * self.saves / 1e9);
        let saved = saved.map_or(0, |it| u64::try_from(it.as_nanos()).unwrap_or(u64::MAX));
        let text = self
            .text
            .replace("{count}", &number(found.count))
            .replace("{share}", &share(found.count, found.all))
            .replace("{all}", &number(found.all))
            .replace("{time}", &time(found.time_ns))
            .replace("{saved}", &number(saved))
            .replace("{device}", found.device)
            .replace("{function}", &found.function);
        let saved = if self.phase.is_some() { 0 } else { saved };
        Some(Advice { rule: &self.name, text, saved })
    }
}

impl Advice {
    /// All that applies to a profile, what saves most first.
    #[must_use]
    pub fn of(profile: &Profile) -> Vec<Self> {
        let mut advice: Vec<Self> = rules().iter().filter_map(|rule| rule.apply(profile)).collect();
        advice.sort_by_key(|one| std::cmp::Reverse(one.saved));
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::Phase;

    /// The rule's example, among other exits that make it a quarter of all.
    fn provoke(rule: &Rule) -> Profile {
        let mut profile = Profile { ran_ns: 10_000_000, ..Profile::default() };
        if rule.example.as_str() == Some("phase") {
            let name = rule.phase.expect("a phase");
            profile.phases.push(Phase { name, start_ns: 0, end_ns: 5_000_000 });
            return profile;
        }
        let number =
            |key: &str| rule.example.get(key).and_then(toml::Value::as_integer).and_then(|it| u64::try_from(it).ok());
        let word = |key: &str| rule.example.get(key).and_then(|it| it.as_str()).map(str::to_owned);
        let count = number("count").expect("a count");
        if rule.shadow == Some(true) {
            profile.kvm.insert("pf_guest".into(), 1);
        }
        if let Some(counter) = word("counter") {
            profile.kvm.extend([("exits".into(), count * 4), (counter, count)]);
            return profile;
        }
        let cause = Cause {
            class: rule.example.get("class").expect("a class").clone().try_into().expect("a known class"),
            reason: word("reason").unwrap_or_default(),
            device: word("device"),
            address: number("address"),
            write: rule.example.get("write").and_then(toml::Value::as_bool),
            function: Some("the_function".into()),
            count,
            ..Cause::default()
        };
        let exits = Exits { total: count * 2, causes: vec![cause], ..Exits::default() };
        match rule.sort {
            Some(Sort::Vm) => profile.vm_exits = Some(exits),
            _ => profile.userspace_exits = exits,
        }
        profile
    }

    #[test]
    fn every_rule_is_provoked_by_its_example_and_by_no_other() {
        assert!(rules().len() >= 14, "the file is read");
        for rule in rules() {
            let advice = Advice::of(&provoke(rule));
            let names: Vec<&str> = advice.iter().map(|one| one.rule).collect();
            assert_eq!(names, [rule.name.as_str()]);
            let text = &advice[0].text;
            assert!(!text.contains('{'), "{text}");
            assert!(
                rule.phase.is_some() || !rule.text.contains("{function}") || text.contains("the_function"),
                "{text}"
            );
        }
        assert_eq!(Advice::of(&Profile::default()), []);
    }

    #[test]
    fn a_rule_keeps_quiet_below_its_share() {
        let rule = rules().iter().find(|rule| rule.name == "uart output").expect("there");
        let mut profile = provoke(rule);
        profile.userspace_exits.total *= 100;
        assert_eq!(Advice::of(&profile), []);
    }

    #[test]
    fn who_has_pci_devices_is_not_told_to_do_without() {
        let rule = rules().iter().find(|rule| rule.name == "pci configuration").expect("there");
        let mut profile = provoke(rule);
        assert_eq!(Advice::of(&profile).len(), 1);
        let queue = crate::measure::record::VirtioQueue {
            device: "disk0".into(),
            queue: 0,
            kicks: 1,
            interrupts: 1,
            requests: 1,
        };
        profile.virtio.push(queue);
        assert_eq!(Advice::of(&profile), []);
    }

    #[test]
    fn figures_are_those_of_the_profile() {
        let rule = rules().iter().find(|rule| rule.name == "uart output").expect("there");
        let text = Advice::of(&provoke(rule)).remove(0).text;
        assert!(text.starts_with("50.0 % of userspace exits (500) are writes to UART 1 from the_function"), "{text}");
        assert!(text.ends_with("saves about 475 exits"), "{text}");
    }

    /// The profile of recorded exits of an Intel processor.
    fn recorded(exits: &str, kvm: &[(&str, u64)]) -> Profile {
        use crate::config::RunOptions;
        use crate::measure::record::tests::sample;
        use crate::measure::tracer::{TraceRecord, recorded};
        use crate::profile::RunSymbols;
        let options: RunOptions = toml::from_str("kernel = '/nowhere'").expect("TOML");
        let mut record = sample();
        record.trace = Some(TraceRecord { vcpus: vec![Some(recorded::collect(exits))], ..TraceRecord::default() });
        let mut profile = Profile::new(&options.into_config().expect("valid"), &record, &RunSymbols::default());
        profile.kvm.extend(kvm.iter().map(|(name, count)| ((*name).to_owned(), *count)));
        profile
    }

    #[test]
    fn on_shadow_paging_nested_paging_is_the_first_advice_with_all_that_it_saves() {
        use crate::measure::tracer::recorded::{VMX_EPT0, VMX_EPT1};
        let profile = recorded(VMX_EPT0, &[("pf_guest", 40), ("invlpg", 610)]);
        let advice = Advice::of(&profile);
        assert_eq!(advice[0].rule, "shadow paging");
        // 610 INVLPGs, 142 accesses to CR3, 110 page faults.
        assert!(
            advice[0].text.starts_with("86.2 % of VM exits (862, ") && advice[0].text.contains("ept=1"),
            "{advice:?}"
        );
        assert_eq!(advice[0].saved, 819, "95 % of them");
        let names = |profile: &Profile| Advice::of(profile).iter().map(|one| one.rule).collect::<Vec<_>>();
        assert!(!names(&recorded(VMX_EPT1, &[])).contains(&"shadow paging"));
        assert!(!names(&profile).contains(&"host interrupts"), "4.7 %");
    }

    #[test]
    fn a_profile_names_vectors_and_registers() {
        let profile = recorded(crate::measure::tracer::recorded::VMX_EPT0, &[]);
        let exits = profile.vm_exits.as_ref().expect("there");
        let what: Vec<String> = exits.causes.iter().map(|cause| format!("{} {}", cause.reason, cause.what())).collect();
        for expected in [
            "EXCEPTION_NMI #PF",
            "EXCEPTION_NMI NMI",
            "CR_ACCESS CR3 write",
            "CR_ACCESS CR3 read",
            "DR_ACCESS DR7 write",
            "EXTERNAL_INTERRUPT vector 0xec",
            "MSR_WRITE TSC_DEADLINE 0x6e0 write",
        ] {
            assert!(what.iter().any(|found| found == expected), "{expected}: {what:?}");
        }
        let interrupts = exits.causes.iter().filter(|cause| cause.class == ExitClass::Interrupt);
        assert_eq!(interrupts.map(|cause| cause.count).sum::<u64>(), 47);
    }
}
