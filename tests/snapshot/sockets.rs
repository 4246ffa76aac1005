//! Socket devices and shared folders of a guest that does not drive them: what a run has to give again.

use super::{Machine, check_sequence, error_of, folder, guests, with_kvm};
use crate::harness::Outcome;
use std::fs;
use std::path::Path;

/// Where the sockets are is a run's; the context ID is the guest's.
pub(super) fn sockets_are_connected_anew() -> Outcome {
    with_kvm(|| {
        for transport in ["pci", "mmio"] {
            let name = format!("vsock-{transport}");
            let vsock = |cid, name: &str| format!("--vsock=cid={cid},uds={}", folder().join(name).display());
            let own = vsock(7, &format!("{name}.v"));
            let machine = Machine::boot(&name, guests::count(), &["-m", "32M", "--transport", transport, &own]);
            machine.answer(&["pause"]);
            let snapshot = folder().join(&name);
            machine.snapshot(&snapshot);
            let before = machine.output();
            machine.stop();
            let json = fs::read_to_string(snapshot.join("machine.json")).unwrap();
            let description: serde_json::Value = serde_json::from_str(&json).unwrap();
            assert_eq!(description["sockets"]["vsock"]["cid"], 7, "{json}");
            let (status, error) = error_of(&snapshot, &["--vsock=cid=7,vhost=on"]);
            assert!(status == Some(42) && error.contains("--vsock uds=PATH"), "{status:?} {error}");
            // With its sockets elsewhere, and without any.
            for (round, given) in [Some(vsock(3, &format!("{name}.w"))), None].iter().enumerate() {
                let options: Vec<&str> = given.iter().map(String::as_str).collect();
                let machine = Machine::start(&format!("{name}-{round}"), &[Path::new("--from"), &snapshot], &options);
                machine.wait_for_lines(10);
                check_sequence(&[&before, &machine.output()]);
                assert_eq!(folder().join(format!("{name}.w")).exists(), given.is_some());
                machine.stop();
            }
        }
        let machine = Machine::boot("no-vsock", guests::count(), &["-m", "16M"]);
        let snapshot = folder().join("no-vsock");
        machine.snapshot(&snapshot);
        machine.stop();
        let given = format!("--vsock=cid=3,uds={}", folder().join("none.v").display());
        let (status, error) = error_of(&snapshot, &[&given]);
        assert!(status == Some(42) && error.contains("no socket device"), "{status:?} {error}");
    })
}

/// Which folder is shared is said by each run: nothing in a snapshot decides what is opened.
pub(super) fn shares_are_given_again() -> Outcome {
    with_kvm(|| {
        let [one, other, link] = ["share", "share-other", "share-link"].map(|name| folder().join(name));
        [&one, &other].iter().for_each(|path| fs::create_dir(path).unwrap());
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let share = |tag: &str, path: &Path| format!("--share=tag={tag},path={},readonly=on", path.display());
        for transport in ["pci", "mmio"] {
            let name = format!("share-{transport}");
            let options = ["-m", "32M", "--transport", transport, &share("a", &one), &share("b", &other)];
            let machine = Machine::boot(&name, guests::count(), &options);
            machine.answer(&["pause"]);
            let snapshot = folder().join(format!("{name}-snapshot"));
            machine.snapshot(&snapshot);
            let before = machine.output();
            machine.stop();
            let refused = |options: &[&str], words: &[&str]| {
                let (status, error) = error_of(&snapshot, options);
                assert!(status == Some(42) && words.iter().all(|word| error.contains(word)), "{status:?} {error}");
            };
            refused(&[], &["--share tag=a,path=DIR"]);
            refused(&[&share("a", &one)], &["--share tag=b,path=DIR"]);
            refused(&[&share("a", &one), &share("b", &other), &share("c", &other)], &["tag=c", "leave it out"]);
            refused(&[&share("a", &other), &share("b", &one)], &["share a", "another directory"]);
            // In any order, and by another path.
            let machine = Machine::start(
                &format!("{name}-on"),
                &[Path::new("--from"), &snapshot],
                &[&share("b", &other), &format!("--share=tag=a,path={}", link.display())],
            );
            machine.wait_for_lines(10);
            check_sequence(&[&before, &machine.output()]);
            // A snapshot of what goes on from one.
            machine.answer(&["pause"]);
            machine.snapshot(&folder().join(format!("{name}-again")));
            machine.stop();
        }
    })
}
