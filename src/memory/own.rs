//! The memory of hwvmm itself: pages that only start-up used are given back to the host before the guest runs.

use std::io;

/// A read-only file mapping of this process with no changed page (a breakpoint of a debugger would change one).
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    bytes: usize,
}

/// The mappings of code and constants in the text of /proc/self/smaps (Linux' Documentation/filesystems/proc.rst).
fn untouched(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            let (offset, file) = (words.next().unwrap_or(""), words.nth(2).unwrap_or(""));
            // Constants lie in a file's first mapping; the later read-only ones were written by the dynamic linker.
            let code = second == Some("r-xp");
            let constants = second == Some("r--p") && offset.bytes().all(|digit| digit == b'0');
            let wanted = (code || constants) && file.starts_with('/') && end > start;
            candidate = wanted.then(|| Mapping { start, bytes: end - start });
        } else if first == "Anonymous:"
            && second == Some("0")
            && let Some(mapping) = candidate.take()
        {
            found.push(mapping);
        }
    }
    found
}

/// Drops the pages of code and constants from this process. A page that is used again is mapped again from the page cache.
/// Most of the pages served start-up only.
///
/// # Errors
/// Where /proc/self/smaps cannot be read.
pub fn give_back_startup() -> io::Result<()> {
    for Mapping { start, bytes } in untouched(&std::fs::read_to_string("/proc/self/smaps")?) {
        // SAFETY: the range is a private read-only mapping of a file without changed pages (checked above), so that reading
        // it after MADV_DONTNEED gives the same bytes, from the file (madvise(2)). A mapping that went in the meantime makes
        // the call fail; one that came in its place would have to be writable to lose anything, and hwvmm maps no such
        // thing over its own code: this is called before it has threads that map or unmap.
        if unsafe { libc::madvise(start as *mut libc::c_void, bytes, libc::MADV_DONTNEED) } != 0 {
            log::debug!("start-up's pages at {start:#x} stay: {}", io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_file_mappings_are_dropped() {
        let smaps = "1000-3000 r-xp 00001000 fe:00 9  /hwvmm\nRss: 8 kB\nAnonymous: 0 kB\n\
            3000-4000 r-xp 00001000 fe:00 9  /broken/into\nAnonymous: 4 kB\n\
            4000-5000 r--p 00000000 fe:00 9  /hwvmm\nAnonymous: 0 kB\n\
            5000-6000 r--p 00005000 fe:00 9  /hwvmm\nAnonymous: 0 kB\n\
            6000-7000 rw-p 00000000 fe:00 9  /hwvmm\nAnonymous: 0 kB\n\
            7000-8000 r-xp 00000000 00:00 0  [vdso]\nAnonymous: 0 kB\n\
            8000-9000 r-xp 00000000 00:00 0 \nAnonymous: 0 kB\n";
        let expected = [Mapping { start: 0x1000, bytes: 0x2000 }, Mapping { start: 0x4000, bytes: 0x1000 }];
        assert_eq!(untouched(smaps), expected);
        assert_eq!(untouched("zz-1 r-xp\nAnonymous:\n\n-\n"), []);
    }

    #[test]
    fn code_and_constants_are_usable_after_their_pages_were_dropped() {
        give_back_startup().expect("/proc");
        assert_eq!(format!("{:?}", [1.5, 2.0]), "[1.5, 2.0]");
    }
}
