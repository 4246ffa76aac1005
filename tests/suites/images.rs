//! Kernels in disk images.

use super::fat::fat;
use super::harness::{Outcome, Test, text};
use super::{HEAD, Suite, guests, when_it_runs};
use std::fs;

/// A disk whose first entry powers off, and whose second one resets the guest.
fn image() -> Vec<u8> {
    let [off, reset, command] = [guests::power_off(), guests::reset(), guests::command_exited()].map(guests::multiboot);
    let entry = |name: &str| format!("title {name}\nlinux /{name}\noptions quiet\n").into_bytes();
    let [first, second, third] = ["off", "reset", "command"].map(entry);
    let files: [(&str, &[u8]); 6] = [
        // The last one is the first of the menu.
        ("/loader/entries/c.conf", &first),
        ("/loader/entries/b.conf", &second),
        ("/loader/entries/a.conf", &third),
        ("/off", &off),
        ("/reset", &reset),
        ("/command", &command),
    ];
    fat(2 << 20, &files)
}

fn kernels_are_taken_out_of_images() -> Outcome {
    when_it_runs(|| {
        let suite = Suite::new(&format!(
            "{HEAD}[[kernel]]\nname = 'one'\npath = 'a.img'\n[[kernel]]\nname = 'all'\npath = '*.img'\n\
             [[test]]\nname = 'boot'\nkernel = 'all'\nexpect = 'hello'\n\
             [[test]]\nname = 'chosen'\nkernel = 'one'\nentry = 'reset'\nstatus = 32\n\
             [[test]]\nname = 'seed'\nkernel = 'one'\nseed = 'seed'\n\
             [[test]]\nname = 'command'\nkernel = 'one'\nentry = 'a'\nrun = 'x'\nroot = 'none'\nmemory = '32M'\nstatus = 34\n\
             [[test]]\nname = 'no-entry'\nkernel = 'one'\nentry = 'none'\n\
             [[test]]\nname = 'no-root'\nkernel = 'one'\nentry = 'a'\nrun = 'x'\nroot = 'image'\nmemory = '32M'\n"
        ));
        for name in ["a.img", "b.img"] {
            fs::write(suite.path().join(name), image()).unwrap();
        }
        fs::create_dir(suite.path().join("seed")).unwrap();
        fs::write(suite.path().join("seed/user-data"), "#cloud-config\n").unwrap();
        let out = suite.test(&["-o", "results", "-j", "4"]);
        let said = text(&out.stdout) + &text(&out.stderr);
        assert_eq!(out.status.code(), Some(42), "{said}");
        let results = suite.results("results");
        for name in ["boot[all:a.img]", "boot[all:b.img]", "chosen", "seed", "command"] {
            assert_eq!(results[name]["verdict"], "pass", "{name}: {said}");
        }
        for (name, words) in [("no-entry", "there are: 0 (off)"), ("no-root", "no root file system that hwvmm reads")] {
            let result = &results[name];
            assert_eq!(result["verdict"], "infrastructure", "{result}");
            assert!(result["message"].as_str().unwrap().contains(words), "{result}");
        }
        assert!(fs::read(suite.path().join("a.img")).unwrap() == image(), "no test changes an image");
    })
}

fn an_image_of_vmtest_has_kernel_and_root() -> Outcome {
    when_it_runs(|| {
        let suite = Suite::new("");
        fs::write(suite.path().join("a.img"), image()).unwrap();
        let target = "[[target]]\nname = 'a'\nimage = 'a.img'\nuefi = true\ncommand = 'x'\n";
        fs::write(suite.path().join("vmtest.toml"), target).unwrap();
        let out = suite.test(&["vmtest.toml", "-o", "results"]);
        assert_eq!(out.status.code(), Some(42), "{}", text(&out.stdout));
        assert!(text(&out.stderr).contains("target 'a': uefi is ignored"), "{}", text(&out.stderr));
        let message = &suite.results("results")["a"]["message"];
        assert!(message.as_str().unwrap().contains("no root file system that hwvmm reads"), "{message}");
    })
}

fn what_only_an_image_has_is_refused_for_a_kernel() -> Outcome {
    let suite = Suite::new("");
    for (test, words) in [
        ("entry = '0'", "off is none, or cannot be read"),
        ("run = 'x'\nroot = 'image'", "--root image is for a kernel from a disk image"),
        ("kernel-from = 'a.img'", "is the path of a [[kernel]]"),
    ] {
        let file = format!("[[kernel]]\nname = 'k'\npath = 'off'\n[[test]]\nname = 'a'\n{test}\n");
        fs::write(suite.path().join("bad.toml"), file).unwrap();
        let out = suite.test(&["bad.toml"]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains(words), "{}", text(&out.stderr));
    }
    Outcome::Passed
}

pub(super) const TESTS: &[Test] = &[
    ("kernels_are_taken_out_of_images", kernels_are_taken_out_of_images),
    ("an_image_of_vmtest_has_kernel_and_root", an_image_of_vmtest_has_kernel_and_root),
    ("what_only_an_image_has_is_refused_for_a_kernel", what_only_an_image_has_is_refused_for_a_kernel),
];
