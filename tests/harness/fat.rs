//! Disks of FAT for tests: of the command, and of the package itself.

use std::io::{Cursor, Seek, SeekFrom, Write};

/// A disk of so many bytes that is one FAT file system with these files. Their paths begin with `/`.
pub(crate) fn fat(bytes: usize, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut disk = Cursor::new(vec![0; bytes]);
    fatfs::format_volume(&mut disk, fatfs::FormatVolumeOptions::new().volume_id(0x1234_abcd)).expect("formatted");
    disk.seek(SeekFrom::Start(0)).expect("start");
    {
        let volume = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("FAT");
        for (path, content) in files {
            let mut folder = volume.root_dir();
            let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
            let (name, folders) = parts.split_last().expect("a name");
            for part in folders {
                folder = folder.create_dir(part).expect("a folder");
            }
            folder.create_file(name).expect("a file").write_all(content).expect("written");
        }
    }
    disk.into_inner()
}
