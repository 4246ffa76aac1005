//! Files that hwvmm's caller has left open: its parent process keeps them, and no other process has them.

use super::harness::{Outcome, Test};
use super::process::child_of;
use super::{guests, hwvmm, kernel, terminate, text, when_it_runs};
use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What the process `pid` has open: the numbers, and what they are.
fn files(pid: impl std::fmt::Display) -> Vec<(u32, String)> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process runs").flatten();
    let named = files.filter_map(|file| {
        let number = file.file_name().to_str()?.parse().ok()?;
        Some((number, fs::read_link(file.path()).ok()?.to_string_lossy().into_owned()))
    });
    named.collect()
}

/// A program called passt that writes down what it has open.
fn fake_passt(folder: &Path) {
    let passt = folder.join("passt");
    fs::write(&passt, "#!/bin/sh\nls -l /proc/$$/fd >\"$0.part\"; mv \"$0.part\" \"$0.files\"; exec sleep 60\n")
        .expect("written");
    fs::set_permissions(&passt, Permissions::from_mode(0o755)).expect("changed");
}

/// With a folder as file 3 and a pipe as file 4, of which file 5 is another copy; as file 6 a kernel that is named by its number.
fn only_the_parent_process_keeps_inherited_files() -> Outcome {
    when_it_runs(|| {
        for sandbox in ["on", "log"] {
            let folder = tempfile::tempdir().expect("a folder");
            fake_passt(folder.path());
            let path = std::env::join_paths(
                [folder.path().to_owned()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
            );
            let mut shell = Command::new("sh");
            shell.args(["-c", "exec 3<\"$FOLDER\" 4<&0 5<&0 6<\"$KERNEL\" </dev/null; exec \"$@\"", "sh"]);
            shell.arg(hwvmm().get_program()).args(["run", "-m", "16M", "--timeout", "20s", "--net", "user"]);
            shell.args([&format!("--sandbox={sandbox}"), "--tune", "coalesced-io=off", "/dev/fd/6"]);
            shell.env("FOLDER", folder.path()).env("HOME", folder.path()).env("PATH", path.expect("a path"));
            shell.env("KERNEL", kernel("inherited", guests::spin()));
            let streams = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut parent = streams.spawn().expect("started");
            parent.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
            let of_parent = files(parent.id());
            let (_, pipe) = of_parent.iter().find(|(number, _)| *number == 4).expect("the parent keeps it");
            let shared = folder.path().to_str().expect("UTF-8");
            assert!(of_parent.contains(&(3, shared.to_owned())), "{of_parent:?}");
            let of_machine = files(child_of(&parent).as_raw_nonzero());
            assert!(of_machine.len() > 5, "{of_machine:?}");
            for (number, name) in &of_machine {
                assert!(name != shared && name != pipe, "{sandbox}: the machine's process has {number}: {name}");
            }
            let written = folder.path().join("passt.files");
            let deadline = Instant::now() + Duration::from_secs(10);
            while !written.exists() {
                assert!(Instant::now() < deadline, "passt does not start");
                std::thread::sleep(Duration::from_millis(10));
            }
            let of_passt = fs::read_to_string(written).expect("written");
            assert!(of_passt.contains("socket:"), "{of_passt}");
            let line = of_passt.lines().find(|line| line.ends_with(shared) || line.ends_with(pipe));
            assert_eq!(line, None, "{sandbox}: passt has it");
            terminate(&parent);
            let out = parent.wait_with_output().expect("ended");
            assert_eq!(out.status.code(), Some(128 + 15), "{}", text(&out.stderr));
        }
    })
}

/// A standard stream that is a folder would be a folder of the host in the machine's process.
fn no_standard_stream_is_a_folder() -> Outcome {
    when_it_runs(|| {
        let mut guest = hwvmm();
        guest.args(["run", "-m", "16M", "--timeout", "20s", "--tune", "coalesced-io=off"]);
        guest.stdin(fs::File::open("/").expect("opened")).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut parent = guest.arg(kernel("folder", guests::spin())).spawn().expect("started");
        parent.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
        let of_machine = files(child_of(&parent).as_raw_nonzero());
        assert!(of_machine.contains(&(0, "/dev/null".into())), "{of_machine:?}");
        assert!(of_machine.iter().all(|(_, name)| name != "/"), "{of_machine:?}");
        terminate(&parent);
        parent.wait_with_output().expect("ended");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("only_the_parent_process_keeps_inherited_files", only_the_parent_process_keeps_inherited_files),
    ("no_standard_stream_is_a_folder", no_standard_stream_is_a_folder),
];
