//! Two profiles: what changed, most first.

use super::rows::rows;
use super::text::Style;
use crate::profile::data::{Exits, Profile};
use crate::profile::units::{number, time};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A cause in two profiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The sort of exits: "vm" or "userspace".
    pub sort: &'static str,
    /// The name of the exit reason.
    pub reason: String,
    /// The device or the register.
    pub what: String,
    /// The function that made the exits.
    pub function: String,
    /// In the first profile.
    pub before: u64,
    /// The number of exits in the second profile.
    pub after: u64,
}

/// A figure of two profiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// In the first profile.
    pub before: u64,
    /// In the second profile.
    pub after: u64,
}

/// The difference of two profiles.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// VM exits before and after, where both tell.
    pub vm_exits: Option<Pair>,
    /// Userspace exits before and after.
    pub userspace_exits: Pair,
    /// Exits that were avoided, before and after, where one of them tells; they are no exits.
    pub avoided_exits: Option<Pair>,
    /// How long the guest ran, in nanoseconds.
    pub ran_ns: Pair,
    /// What changed, most first; what did not is left out.
    pub changes: Vec<Change>,
}

impl Change {
    fn size(&self) -> u64 {
        self.before.abs_diff(self.after)
    }
}

fn changes(sort: &'static str, before: &Exits, after: &Exits) -> Vec<Change> {
    let mut all: BTreeMap<(String, String, String), (u64, u64)> = BTreeMap::new();
    for row in rows(&before.causes) {
        all.entry((row.reason, row.what, row.function)).or_default().0 += row.count;
    }
    for row in rows(&after.causes) {
        all.entry((row.reason, row.what, row.function)).or_default().1 += row.count;
    }
    let change = |((reason, what, function), (before, after))| Change { sort, reason, what, function, before, after };
    all.into_iter().map(change).filter(|change| change.before != change.after).collect()
}

/// Compares two profiles, by reason, device or register, and function.
#[must_use]
pub fn diff(before: &Profile, after: &Profile) -> Difference {
    let mut all = Vec::new();
    let both = before.vm_exits.as_ref().zip(after.vm_exits.as_ref());
    if let Some((before, after)) = both {
        all.extend(changes("vm", before, after));
    }
    all.extend(changes("userspace", &before.userspace_exits, &after.userspace_exits));
    all.sort_by(|a, b| {
        b.size().cmp(&a.size()).then_with(|| (a.sort, &a.reason, &a.what).cmp(&(b.sort, &b.reason, &b.what)))
    });
    Difference {
        vm_exits: both.map(|(before, after)| Pair { before: before.total, after: after.total }),
        userspace_exits: Pair { before: before.userspace_exits.total, after: after.userspace_exits.total },
        avoided_exits: avoided_exits(before, after),
        ran_ns: Pair { before: before.ran_ns, after: after.ran_ns },
        changes: all,
    }
}

fn avoided_exits(before: &Profile, after: &Profile) -> Option<Pair> {
    let total = |profile: &Profile| profile.avoided.as_ref().map(|avoided| avoided.total);
    let (before, after) = (total(before), total(after));
    before.or(after).map(|_| Pair { before: before.unwrap_or(0), after: after.unwrap_or(0) })
}

fn signed(before: u64, after: u64) -> String {
    let sign = if after >= before { '+' } else { '-' };
    format!("{sign}{}", number(before.abs_diff(after)))
}

impl Difference {
    /// A table for people.
    #[must_use]
    pub fn text(&self, style: Style) -> String {
        let mut out = String::new();
        let mut total = |what: &str, Pair { before, after }: Pair| {
            let _ = writeln!(out, "{what}: {} → {} ({})", number(before), number(after), signed(before, after));
        };
        if let Some(exits) = self.vm_exits {
            total("VM exits", exits);
        }
        total("userspace exits", self.userspace_exits);
        if let Some(avoided) = self.avoided_exits {
            total("exits avoided", avoided);
        }
        if self.vm_exits.is_none() {
            let _ = writeln!(out, "(VM exits are not in both profiles)");
        }
        let _ = writeln!(out, "the guest ran {} → {}", time(self.ran_ns.before), time(self.ran_ns.after));
        if self.changes.is_empty() {
            let _ = writeln!(out, "no cause changed");
            return out;
        }
        let _ = writeln!(
            out,
            "{:>9} {:>9} {:>9}  {:<9} {:<11} {:<24} function",
            "before", "after", "change", "sort", "reason", "what"
        );
        for change in self.changes.iter().take(style.rows) {
            let cells = super::text::cells(&[(&change.reason, 11), (&change.what, 24), (&change.function, 19)]);
            let (before, after) = (number(change.before), number(change.after));
            let line = format!(
                "{before:>9} {after:>9} {:>9}  {:<9} {cells}",
                signed(change.before, change.after),
                change.sort
            );
            let _ = writeln!(out, "{}", line.trim_end());
        }
        if self.changes.len() > style.rows {
            let _ = writeln!(out, "and {} smaller changes (--rows N shows more)", self.changes.len() - style.rows);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn what_changed_most_comes_first() {
        let (before, mut after) = (sample(), sample());
        assert_eq!(diff(&before, &after).changes, []);
        assert!(diff(&before, &after).text(Style::default()).contains("no cause changed"));
        after.userspace_exits.causes[0].count = 10;
        after.userspace_exits.total = 10;
        if let Some(exits) = &mut after.vm_exits {
            exits.causes[0].function = Some("another".into());
            exits.causes[0].count = 301;
            exits.total = 301;
        }
        after.avoided = None;
        let difference = diff(&before, &after);
        assert_eq!(difference.avoided_exits, Some(Pair { before: 7_000, after: 0 }));
        let found: Vec<_> = difference.changes.iter().map(|c| (c.sort, c.before, c.after)).collect();
        assert_eq!(found, [("vm", 0, 301), ("vm", 300, 0), ("userspace", 300, 10)]);
        let json = serde_json::to_value(&difference).expect("JSON");
        assert_eq!(json["userspace_exits"], serde_json::json!({ "before": 300, "after": 10 }));
        let text = difference.text(Style::default());
        assert!(
            text.contains("userspace exits: 300 → 10 (-290)") && text.contains("VM exits: 300 → 301 (+1)"),
            "{text}"
        );
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
}
