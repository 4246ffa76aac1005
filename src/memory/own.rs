//! The memory of hwvmm itself: pages that only start-up used are given back to the host before the guest runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;
/// Bytes of an entry of /proc/self/pagemap.
const ENTRY: usize = 8;
/// The page is in swap; the page is in memory (Linux' Documentation/admin-guide/mm/pagemap.rst).
const SWAPPED_OR_PRESENT: u64 = 1 << 62 | 1 << 63;
/// The page is one of a file, or of shared memory: not a private copy.
const OF_FILE: u64 = 1 << 61;

/// Whole pages of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pages {
    start: usize,
    bytes: usize,
}

impl Pages {
    /// The pages that have a byte of the `bytes` bytes from `start` on.
    fn around(start: usize, bytes: usize) -> Self {
        let first = start & !(PAGE - 1);
        Self { start: first, bytes: start.saturating_add(bytes).next_multiple_of(PAGE) - first }
    }

    /// Returns true if all pages are as the file has them, or not in memory. A breakpoint of a debugger or of uprobes makes a
    /// private copy of a page, which would be lost.
    ///
    /// # Errors
    /// Where `pagemap` cannot be read.
    fn are_unchanged(&self, pagemap: &File) -> io::Result<bool> {
        let mut entries = vec![0; self.bytes / PAGE * ENTRY];
        pagemap.read_exact_at(&mut entries, (self.start / PAGE * ENTRY) as u64)?;
        let unchanged = |entry: &[u8]| {
            let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
            entry & SWAPPED_OR_PRESENT == 0 || entry & OF_FILE != 0
        };
        Ok(entries.chunks_exact(ENTRY).all(unchanged))
    }
}

/// Adds the read-only segments of an object: its code and constants. What the dynamic linker changes lies in a
/// segment that is writable first (PT_GNU_RELRO).
unsafe extern "C" fn add_read_only(info: *mut libc::dl_phdr_info, _: usize, found: *mut libc::c_void) -> libc::c_int {
    // SAFETY: dl_iterate_phdr calls this with an object's description, which is valid until it returns, and with the pointer to
    // the Vec that `read_only_segments` gave it, which no other code uses meanwhile.
    let (object, found) = unsafe { (&*info, &mut *found.cast::<Vec<Pages>>()) };
    if object.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: the loader keeps the `dlpi_phnum` program headers at `dlpi_phdr` as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)) };
    for header in headers {
        if header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0 && header.p_memsz > 0 {
            let start = object.dlpi_addr.wrapping_add(header.p_vaddr);
            if let (Ok(start), Ok(bytes)) = (usize::try_from(start), usize::try_from(header.p_memsz)) {
                found.push(Pages::around(start, bytes));
            }
        }
    }
    0
}

/// Code and constants of this program and its libraries, without the kernel's vDSO. In contrast to /proc/self/smaps, this needs no
/// walk over the pages of the guest's memory.
fn read_only_segments() -> Vec<Pages> {
    let mut found: Vec<Pages> = Vec::new();
    // SAFETY: the callback keeps to its contract, see there; the pointer is that of a Vec that outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(add_read_only), (&raw mut found).cast()) };
    // SAFETY: getauxval only reads what the kernel gave this process at its start.
    let vdso = usize::try_from(unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) }).unwrap_or(0);
    found.retain(|pages| !(pages.start..pages.start + pages.bytes).contains(&vdso));
    merge(found)
}

/// The same pages with neighbours as one: an object's constants lie before and behind its code.
fn merge(mut pages: Vec<Pages>) -> Vec<Pages> {
    pages.sort_by_key(|pages| pages.start);
    let mut merged: Vec<Pages> = Vec::with_capacity(pages.len());
    for next in pages {
        match merged.last_mut() {
            Some(last) if last.start + last.bytes == next.start => last.bytes += next.bytes,
            _ => merged.push(next),
        }
    }
    merged
}

/// Drops the pages of code and constants from this process. A page that is used again is mapped again from the page cache.
/// Most of the pages served start-up only. Opens /proc/self/pagemap: to be called before the process is confined.
///
/// # Errors
/// Where /proc/self/pagemap cannot be read: then nothing is dropped.
pub fn give_back_startup() -> io::Result<()> {
    let pagemap = File::open("/proc/self/pagemap")?;
    for pages in read_only_segments() {
        if !pages.are_unchanged(&pagemap)? {
            continue;
        }
        // SAFETY: the range is a private mapping of a file that was never writable, without changed pages (checked above), so
        // that reading it after MADV_DONTNEED gives the same bytes, from the file (madvise(2)). Objects are not unloaded
        // meanwhile: hwvmm loads none at run time.
        if unsafe { libc::madvise(pages.start as *mut libc::c_void, pages.bytes, libc::MADV_DONTNEED) } != 0 {
            log::debug!("pages used at the start are kept at {:#x}: {}", pages.start, io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines of /proc/self/maps that `pages` lie in: access, and the path.
    fn mapped(pages: &Pages) -> Vec<(String, String)> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc");
        let mut found = Vec::new();
        for line in maps.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let (start, end) = words[0].split_once('-').expect("a range");
            let number = |text| usize::from_str_radix(text, 16).expect("hexadecimal");
            if number(start) < pages.start + pages.bytes && pages.start < number(end) {
                found.push((words[1].to_owned(), words.get(5).copied().unwrap_or("").to_owned()));
            }
        }
        found
    }

    #[test]
    fn code_and_constants_of_files_are_found_and_nothing_else() {
        let found = read_only_segments();
        let code = code_and_constants_of_files_are_found_and_nothing_else as *const () as usize;
        assert!(found.iter().any(|pages| (pages.start..pages.start + pages.bytes).contains(&code)));
        for pages in &found {
            for (access, path) in mapped(pages) {
                assert!(access.starts_with('r') && access.ends_with("-p") | access.ends_with("xp"), "{access} {path}");
                assert!(!access.contains('w') && path.starts_with('/'), "{access} {path}");
            }
        }
    }

    #[test]
    fn neighbours_are_merged() {
        let pages = |start, bytes| Pages { start, bytes };
        let merged = merge(vec![pages(0x3000, 0x1000), pages(0x1000, 0x1000), pages(0x4000, 0x2000)]);
        assert_eq!(merged, [pages(0x1000, 0x1000), pages(0x3000, 0x3000)]);
    }

    #[test]
    fn a_changed_page_is_seen() {
        let pagemap = File::open("/proc/self/pagemap").expect("/proc");
        let data = vec![7_u8; 4 * PAGE];
        assert!(
            !Pages::around(data.as_ptr() as usize, data.len()).are_unchanged(&pagemap).expect("readable"),
            "anonymous"
        );
        let unused = Pages { start: PAGE, bytes: PAGE };
        assert!(unused.are_unchanged(&pagemap).expect("readable"), "nothing is mapped there");
        let shortest = read_only_segments().into_iter().min_by_key(|pages| pages.bytes).expect("one");
        assert!(shortest.are_unchanged(&pagemap).expect("readable"), "{:?}", mapped(&shortest));
    }

    #[test]
    fn code_and_constants_are_usable_after_their_pages_were_dropped() {
        give_back_startup().expect("/proc");
        assert_eq!(format!("{:?}", [1.5, 2.0]), "[1.5, 2.0]");
    }
}
