//! A qcow2 image on a block device: it takes more room as the guest writes, and a device does not grow as a file does.

use super::super::file::size;
use super::super::options::ImageOptions;
use crate::path_text::PathText as _;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Where the header has the binary logarithm of the size of a cluster.
const CLUSTER_BITS_AT: u64 = 20;

/// Warns where the checked image that is open as `file`, a block device, may need more than that has. `disk_bytes`: the size of its disk.
///
/// # Errors
/// Where the device cannot be read.
pub(in crate::virtio::block) fn warn_of_device(options: &ImageOptions, file: &File, disk_bytes: u64) -> io::Result<()> {
    let mut cluster_bits = [0; 4];
    file.read_exact_at(&mut cluster_bits, CLUSTER_BITS_AT)?;
    let data_bytes = if options.data_file.is_some() { 0 } else { disk_bytes };
    let needed = data_bytes.saturating_add(table_bytes(disk_bytes, u32::from_be_bytes(cluster_bits)));
    let has = size(file)?;
    if has < needed {
        log::warn!(
            "the qcow2 image {} is on a block device of {has} bytes, which does not grow as a file does, and with its disk of {disk_bytes} bytes \
             it may need {needed}: writes of the guest fail then. A larger device, a copy of the image in a file, or readonly=on avoids that",
            options.path.shown()
        );
    }
    Ok(())
}

/// The bytes of header and tables of a full image: an L2 entry and a reference count, of 8 bytes each at most, for each cluster, and an eighth
/// more for the tables that lead to these; each of them begins a cluster.
fn table_bytes(disk_bytes: u64, cluster_bits: u32) -> u64 {
    let cluster = 1_u64.checked_shl(cluster_bits).unwrap_or(u64::MAX);
    let entries = (disk_bytes / cluster).saturating_mul(16);
    entries.saturating_add(entries / 8).saturating_add(cluster.saturating_mul(8))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_full_image_needs_no_more() {
        let mut none = true;
        for (cluster_bits, disk_bytes) in [9, 12, 16, 21]
            .into_iter()
            .flat_map(|bits| [1 << 9, 1 << 20, 1 << 26, 1 << 32, 1 << 37].map(|bytes: u64| (bits, bytes)))
        {
            let options = format!("cluster_size={},refcount_bits=64", 1 << cluster_bits);
            let size = disk_bytes.to_string();
            let measured =
                Command::new("qemu-img").args(["measure", "-O", "qcow2", "-o", &options, "--size", &size]).output();
            let Ok(measured) = measured else { return crate::skip::skipped("qemu-img is not installed") };
            let text = String::from_utf8_lossy(&measured.stdout);
            let full = text.lines().find_map(|line| line.strip_prefix("fully allocated size: ")?.parse::<u64>().ok());
            // 128 GiB in clusters of 512 bytes are more than qcow2 has.
            let Some(full) = full else { continue };
            none = false;
            let needed = disk_bytes + table_bytes(disk_bytes, cluster_bits);
            let cluster = 1 << cluster_bits;
            assert!(
                (full..full + full / 100 + 9 * cluster).contains(&needed),
                "{cluster}, {disk_bytes}: {needed}, not {full}"
            );
        }
        assert!(!none, "qemu-img measures");
    }

    #[test]
    fn the_size_of_a_cluster_is_no_panic() {
        assert_eq!(table_bytes(u64::MAX, u32::MAX), u64::MAX);
        assert!(table_bytes(u64::MAX, 0) > 1 << 60);
    }
}
