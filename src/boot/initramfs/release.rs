//! The release of a kernel file, which names the folder of its modules.

use crate::boot::identify::{KernelFile, KernelFormat};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What stands before the release in a kernel's banner (init/version-timestamp.c).
const BANNER: &[u8] = b"Linux version ";
/// The longest release (`__NEW_UTS_LEN`).
const RELEASE_BYTES: usize = 64;
/// How much of a vmlinux is searched at once, and at most.
const PIECE_BYTES: usize = 1 << 20;
const SEARCH_BYTES: u64 = 256 << 20;
/// A sector of a bzImage's setup code.
const SECTOR_BYTES: u64 = 512;

/// The release at the start of `text`. It becomes a part of paths: it has no `/`, and does not start with a dot.
fn release_at(text: &[u8]) -> Option<String> {
    let is_end = |byte: &u8| !(byte.is_ascii_alphanumeric() || b"._+-~".contains(byte));
    let bytes = text.iter().position(is_end).unwrap_or(text.len());
    let release = std::str::from_utf8(text.get(..bytes)?).ok()?;
    let is_release = release.starts_with(|first: char| first.is_ascii_digit()) && bytes <= RELEASE_BYTES;
    is_release.then(|| release.to_owned())
}

/// Reads at `offset` what is there of `buffer`'s size.
pub(super) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Returns the release of a Linux kernel, such as `6.1.0-13-amd64`, or `None` where the file does not say it.
///
/// # Errors
/// Those of reading the file.
pub fn kernel_release(kernel: &KernelFile) -> io::Result<Option<String>> {
    match kernel.format() {
        KernelFormat::BzImage(image) => {
            // boot.rst, kernel_version: behind 0x200, and within the setup code.
            let offset = u64::from(image.header.kernel_version);
            if offset == 0 || offset >= u64::from(image.header.setup_sects) * SECTOR_BYTES {
                return Ok(None);
            }
            let mut text = [0; RELEASE_BYTES + 1];
            let count = read_up_to(kernel.file(), &mut text, offset + SECTOR_BYTES)?;
            Ok(release_at(&text[..count]))
        }
        KernelFormat::Elf(_) => search(kernel.file()),
        KernelFormat::Multiboot(_) => Ok(None),
    }
}

/// Looks for the banner. Formats of banners (`Linux version %s`) have no digit there.
fn search(file: &File) -> io::Result<Option<String>> {
    let overlap = BANNER.len() + RELEASE_BYTES + 1;
    let mut piece = vec![0; PIECE_BYTES + overlap];
    let mut offset = 0;
    while offset < SEARCH_BYTES {
        let count = read_up_to(file, &mut piece, offset)?;
        let bytes = piece.get(..count).unwrap_or_default();
        let found = memchr::memmem::find_iter(bytes, BANNER)
            .find_map(|at| release_at(bytes.get(at + BANNER.len()..).unwrap_or_default()));
        if found.is_some() || count < piece.len() {
            return Ok(found);
        }
        offset += PIECE_BYTES as u64;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_release_is_a_plain_name() {
        assert_eq!(release_at(b"6.1.0-13-amd64 (debian) #1").as_deref(), Some("6.1.0-13-amd64"));
        assert_eq!(release_at(b"6.12.107+deb12-amd64\0").as_deref(), Some("6.12.107+deb12-amd64"));
        for none in [&b""[..], b"%s (%s)", b"../6.1", b".6", b"\xff"] {
            assert_eq!(release_at(none), None);
        }
        assert_eq!(release_at(b"6.1/../../etc").as_deref(), Some("6.1"));
        assert_eq!(release_at(&[b'6'; 65]), None);
    }

    #[test]
    fn the_banner_is_found_across_pieces() {
        for at in [0, 5, PIECE_BYTES - 20, PIECE_BYTES - 3, PIECE_BYTES + 60, PIECE_BYTES * 2 - 1] {
            let mut file = tempfile::tempfile().expect("a file");
            let mut bytes = vec![0; at];
            bytes.extend_from_slice(b"Linux version %s\0Linux version 6.1.7 (x)");
            bytes.resize(PIECE_BYTES * 2 + 200, 0);
            file.write_all(&bytes).expect("written");
            assert_eq!(search(&file).expect("read").as_deref(), Some("6.1.7"), "at {at}");
        }
        assert_eq!(search(&tempfile::tempfile().expect("a file")).expect("read"), None);
    }
}
