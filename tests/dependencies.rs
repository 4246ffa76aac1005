//! What may be depended on: the licences and the sources that deny.toml allows, for cargo-deny, hold for every package that is built
//! into hwvmm or its tests. Advisories, which need a database from the network, are cargo-deny's own: `cargo deny check`.

#![allow(clippy::expect_used, clippy::panic, reason = "a test may fail where it stands")]

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// The registry that packages may come from.
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What deny.toml allows.
struct Allowed {
    /// Of all packages.
    licenses: BTreeSet<String>,
    /// Of single packages beside that.
    exceptions: BTreeMap<String, BTreeSet<String>>,
}

fn names(list: &toml::Value) -> BTreeSet<String> {
    let list = list.as_array().expect("a list").iter();
    list.map(|name| name.as_str().expect("a name").to_owned()).collect()
}

impl Allowed {
    fn read() -> Self {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("deny.toml")).expect("deny.toml");
        let deny: toml::Table = toml::from_str(&text).expect("TOML");
        for kind in ["unknown-registry", "unknown-git"] {
            assert_eq!(deny["sources"][kind].as_str(), Some("deny"), "this test would be stricter than deny.toml");
        }
        let exceptions = deny["licenses"]["exceptions"].as_array().expect("a list").iter();
        let exceptions =
            exceptions.map(|one| (one["crate"].as_str().expect("a name").to_owned(), names(&one["allow"])));
        Self { licenses: names(&deny["licenses"]["allow"]), exceptions: exceptions.collect() }
    }

    /// Returns true if `expression` (SPDX 2.3, annex D) can be kept to with what is allowed for `package`. `/` is an old `OR`.
    fn allows(&self, package: &str, expression: &str) -> bool {
        let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
        let mut words = spaced.split_whitespace().peekable();
        let allowed = self.any(package, &mut words);
        allowed && words.next().is_none()
    }

    fn any<'a>(&self, package: &str, words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> bool {
        let mut allowed = self.all(package, words);
        while words.next_if_eq(&"OR").is_some() {
            allowed |= self.all(package, words);
        }
        allowed
    }

    fn all<'a>(&self, package: &str, words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> bool {
        let mut allowed = self.one(package, words);
        while words.next_if_eq(&"AND").is_some() {
            allowed &= self.one(package, words);
        }
        allowed
    }

    fn one<'a>(&self, package: &str, words: &mut std::iter::Peekable<impl Iterator<Item = &'a str>>) -> bool {
        if words.next_if_eq(&"(").is_some() {
            let allowed = self.any(package, words);
            return words.next() == Some(")") && allowed;
        }
        let mut license = words.next().unwrap_or_default().to_owned();
        if words.next_if_eq(&"WITH").is_some() {
            license = format!("{license} WITH {}", words.next().unwrap_or_default());
        }
        self.licenses.contains(&license) || self.exceptions.get(package).is_some_and(|own| own.contains(&license))
    }
}

/// The packages of a build for x86_64 Linux, as `cargo metadata` has them.
fn packages() -> Vec<Value> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let out = Command::new(cargo)
        .args(["metadata", "--format-version=1", "--locked", "--offline", "--filter-platform=x86_64-unknown-linux-gnu"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    // Of other platforms there are packages, and no nodes.
    let built: BTreeSet<&str> =
        metadata["resolve"]["nodes"].as_array().expect("nodes").iter().filter_map(|node| node["id"].as_str()).collect();
    let packages = metadata["packages"].as_array().expect("packages").iter();
    packages.filter(|package| package["id"].as_str().is_some_and(|id| built.contains(id))).cloned().collect()
}

#[test]
fn licences_and_sources_are_those_that_deny_toml_allows() {
    let allowed = Allowed::read();
    let packages = packages();
    assert!(packages.len() > 50, "{}", packages.len());
    let mut used = BTreeSet::new();
    for package in &packages {
        let name = package["name"].as_str().expect("a name");
        match package["source"].as_str() {
            // Of this workspace, which cargo-deny leaves out as well where it is private.
            None => continue,
            Some(source) => assert_eq!(source, REGISTRY, "{name}"),
        }
        let license = package["license"].as_str().unwrap_or_default();
        assert!(allowed.allows(name, license), "{name} has the licence '{license}', which deny.toml does not allow");
        used.insert(name);
    }
    for package in allowed.exceptions.keys() {
        assert!(used.contains(package.as_str()), "deny.toml has an exception for {package}, which is not used");
    }
}

#[test]
fn expressions_of_licences_are_understood() {
    let allowed = Allowed {
        licenses: ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into(),
        exceptions: [("one".to_owned(), BTreeSet::from(["CDDL-1.0".to_owned()]))].into(),
    };
    for good in [
        "MIT",
        "MIT/GPL-3.0",
        "GPL-2.0 OR MIT",
        "(MIT OR GPL-2.0) AND Apache-2.0",
        "Apache-2.0 WITH LLVM-exception",
        "MIT AND MIT OR X",
    ] {
        assert!(allowed.allows("a", good), "{good}");
    }
    for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "MIT WITH X", "(MIT", "MIT MIT", "CDDL-1.0", "X OR (MIT AND Y)"] {
        assert!(!allowed.allows("a", bad), "{bad}");
    }
    assert!(allowed.allows("one", "CDDL-1.0"));
}
