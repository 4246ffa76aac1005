//! Paths with any bytes.

use super::harness::{Outcome, Test};
use super::{folder, fs, guests, hwvmm, text, when_it_runs};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn joined(parts: &[&OsStr]) -> OsString {
    parts.join(OsStr::new(""))
}

/// `start`, and the path with its commas written twice, as in `hwvmm run --help`.
fn item(start: &str, path: &Path) -> OsString {
    let mut bytes = start.as_bytes().to_vec();
    bytes.extend(
        path.as_os_str()
            .as_bytes()
            .iter()
            .flat_map(|byte| if *byte == b',' { &b",,"[..] } else { std::slice::from_ref(byte) }),
    );
    OsStr::from_bytes(&bytes).to_owned()
}

fn every_option_takes_every_path() -> Outcome {
    when_it_runs(|| {
        for name in [&b"a,b"[..], b"k=v", b"\xff\xc3", b"a, 'b'\\x=,,\"", "é\n".as_bytes()] {
            let folder = folder().join(OsStr::from_bytes(name));
            fs::create_dir(&folder).expect("made");
            let at = |name: &str| folder.join(name);
            fs::write(at("disk"), [0; 4096]).expect("written");
            fs::write(at("kernel"), guests::multiboot(guests::show_boot())).expect("written");
            fs::write(at("module"), b"from-the-module\0").expect("written");
            let whole = |start: &str, path: &Path| joined(&[OsStr::new(start), path.as_os_str()]);
            let out = hwvmm()
                .args(["run", "-m", "32M", "--timeout", "20s", "--sandbox=on"])
                .args([OsStr::new("--disk"), &item("path=", &at("disk"))])
                .args([OsStr::new("--share"), &item("tag=t,readonly=on,path=", &folder)])
                .args([OsStr::new("--vsock"), &item("cid=3,uds=", &at("vsock"))])
                .args([OsStr::new("--module"), &joined(&[&item("", &at("module")), OsStr::new(",x,,y=z")])])
                .args([OsStr::new("--serial"), &whole("2=file:", &at("log"))])
                .args([OsStr::new("--console"), &whole("virtio=file:", &at("console"))])
                .args([OsStr::new("--api"), at("api").as_os_str()])
                .args([OsStr::new("--stats-out"), at("stats").as_os_str()])
                .args([OsStr::new("--profile-out"), at("profile").as_os_str()])
                .args([OsStr::new("--kernel-cache"), at("cache").as_os_str()])
                .arg(at("kernel"))
                .output()
                .expect("started");
            assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
            for made in ["log", "console", "stats", "profile"] {
                assert!(at(made).exists(), "{made} in {}", folder.display());
            }
            let said = [at("kernel").as_os_str().as_bytes(), b" from-the-module\n"].concat();
            assert_eq!(text(&out.stdout), text(&said), "the guest is told the path as it is");
            assert_eq!(out.stdout, said);
        }
    })
}

/// Two paths that differ in a byte that is not UTF-8 are told apart in messages.
fn messages_show_every_byte_of_a_path() -> Outcome {
    for (kernel, words) in [(&b"/no/\xfe\n"[..], r"/no/\xfe\n"), (b"/no/\xff,x", r"/no/\xff,x")] {
        let out = hwvmm().arg("run").arg(OsStr::from_bytes(kernel)).output().expect("started");
        let said = text(&out.stderr);
        assert!(said.contains(words) && !said.contains('\u{fffd}'), "{said}");
    }
    Outcome::Passed
}

fn a_mistyped_key_behind_a_path_is_refused() -> Outcome {
    for (option, value, words) in [
        ("--disk", "/no/b.img,read-only", ["'read-only'", "readonly=on|off"]),
        ("--disk", "/no/b.img,ReadOnly=on", ["'ReadOnly'", "readonly=on|off"]),
        ("--share", "tag=t,path=/no,read-only", ["'read-only'", "readonly=on|off"]),
        ("--vsock", "cid=3,uds=/no/v,vhots", ["'vhots'", "vhost=on|off"]),
        ("--disk", "root=1.img", ["'root'", "path=root=1.img"]),
    ] {
        let out = hwvmm().args(["run", option, value, "kernel"]).output().expect("started");
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{value}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{value}: {said}");
    }
    Outcome::Passed
}

pub(super) const TESTS: &[Test] = &[
    ("every_option_takes_every_path", every_option_takes_every_path),
    ("messages_show_every_byte_of_a_path", messages_show_every_byte_of_a_path),
    ("a_mistyped_key_behind_a_path_is_refused", a_mistyped_key_behind_a_path_is_refused),
];
