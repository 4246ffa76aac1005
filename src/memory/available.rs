//! Memory of the host that guests may take.

use std::path::Path;

/// Left to the host's other programs, of its memory that is available.
const RESERVE_BYTES: u64 = 256 << 20;

/// Bytes of memory that guests may take: what the kernel says is available, or what is left of the memory of this process' control
/// groups. `None` where neither is known.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    memory_at(Path::new("/")).map(|bytes| bytes.saturating_sub(RESERVE_BYTES))
}

fn memory_at(root: &Path) -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let available = read("proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    });
    // Control groups, version 2 (Linux, Documentation/admin-guide/cgroup-v2.rst): each above this one has its own limit.
    let group = read("proc/self/cgroup")
        .and_then(|text| Some(text.lines().find_map(|line| line.strip_prefix("0::/"))?.to_owned()));
    let mut groups: Vec<&str> = Vec::new();
    let mut left = group.as_deref();
    while let Some(path) = left {
        groups.push(path);
        left = if path.is_empty() { None } else { Some(path.rsplit_once('/').map_or("", |(above, _)| above)) };
    }
    let of_groups = groups.into_iter().filter_map(|path| {
        let number = |name: &str| read(&format!("sys/fs/cgroup/{path}/{name}"))?.trim().parse::<u64>().ok();
        Some(number("memory.max")?.saturating_sub(number("memory.current")?))
    });
    of_groups.chain(available).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_all_limits_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, text).expect("written");
        };
        assert_eq!(memory_at(folder.path()), None);
        write("proc/meminfo", "MemTotal:  2000 kB\nMemAvailable:    1000 kB\n");
        assert_eq!(memory_at(folder.path()), Some(1000 << 10));
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        write("sys/fs/cgroup/a/memory.max", "900000\n");
        write("sys/fs/cgroup/a/memory.current", "400000\n");
        assert_eq!(memory_at(folder.path()), Some(500_000));
        assert!(available_bytes().is_some());
    }
}
