//! The verdicts of tests.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! verdicts {
    ($($(#[$doc:meta])* $verdict:ident $name:literal,)*) => {
        /// What a test came to.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Verdict {
            $($(#[$doc])* $verdict,)*
        }

        impl Verdict {
            /// All verdicts, the best first.
            pub const ALL: &'static [Self] = &[$(Self::$verdict),*];

            /// The name in reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$verdict => $name,)* }
            }
        }
    };
}

verdicts! {
    /// The run ended as the test wants.
    Pass "pass",
    /// It passed when it was tried again.
    Flaky "flaky",
    /// It was not to be run here: KTAP's skip, or an MMU that this host's KVM does not use.
    Skip "skip",
    /// The run ended in another way than the test wants, or one of its sub-tests failed.
    Fail "fail",
    /// The guest's kernel panicked.
    Panic "panic",
    /// The guest's kernel complained, by a line of its log (see [`OopsKind`](super::OopsKind)).
    Oops "oops",
    /// The guest printed nothing for the time of `silence`.
    Hang "hang",
    /// The time of `timeout` passed, or that of `boot-timeout` before the guest had booted.
    TimeOut "time-out",
    /// The guest's processor shut down.
    TripleFault "triple-fault",
    /// The guest made more exits than its budget or its baseline allows.
    OverBudget "over-budget",
    /// hwvmm or the host failed: the test says nothing about the guest.
    Infrastructure "infrastructure",
}

/// What a verdict means for the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// The suite may pass.
    Good,
    /// The suite has failed.
    Bad,
    /// The suite must be run again, elsewhere or later.
    Unknown,
}

impl Verdict {
    /// What it means for the suite.
    #[must_use]
    pub fn meaning(self) -> Meaning {
        match self {
            Self::Pass | Self::Flaky | Self::Skip => Meaning::Good,
            Self::Fail
            | Self::Panic
            | Self::Oops
            | Self::Hang
            | Self::TimeOut
            | Self::TripleFault
            | Self::OverBudget => Meaning::Bad,
            Self::Infrastructure => Meaning::Unknown,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_serde() {
        for verdict in Verdict::ALL {
            assert_eq!(serde_json::to_value(verdict).expect("JSON"), verdict.name());
        }
    }
}
