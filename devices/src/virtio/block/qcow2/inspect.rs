//! What is to be known of an image before imago opens it: its header and tables are checked, in this process or in another.

use super::error::Qcow2Error;
use super::header::{Backing, DataPlace, Header};
use super::tables::{FormatSource, check};
use std::error::Error;
use std::fs::File;
use std::os::fd::AsRawFd;

/// The longest name of a file or a format that is kept, in bytes.
const NAME_BYTES: usize = 1024;
/// The longest text of an error in bytes.
const TEXT_BYTES: usize = 1024;

// The first byte of an answer.
const FACTS: u8 = 0;
const ERROR: u8 = 1;

/// A check of an image. It reads the file, and returns an answer of at most [`CheckJob::ANSWER_BYTES`].
pub struct CheckJob<'a> {
    /// The image, opened for reading only: where the check is taken over, it cannot write to it either.
    pub file: &'a File,
    run: &'a dyn Fn() -> Vec<u8>,
}

impl CheckJob<'_> {
    /// The longest answer in bytes.
    pub const ANSWER_BYTES: usize = 8192;
    /// The memory that the check takes at most, in bytes: uses of clusters, tables of offsets, one cluster.
    pub const MEMORY_BYTES: u64 = 256 << 20;

    /// Checks the image. Returns the answer.
    #[must_use]
    pub fn run(&self) -> Vec<u8> {
        (self.run)()
    }
}

/// Runs a check somewhere else than in this process, and returns its answer.
pub type CheckPlace<'a> = dyn Fn(&CheckJob<'_>) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> + 'a;

/// What a checked image needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) backing: Option<Backing>,
    pub(super) data: DataPlace,
}

/// Checks header and tables of `file`, an image of `file_bytes` bytes; of a detected image that names another file, which is not opened,
/// the header only. In this process where there is no `place`.
pub(super) fn inspect(
    file: &File,
    file_bytes: u64,
    format: FormatSource,
    place: Option<&CheckPlace<'_>>,
) -> Result<Facts, Qcow2Error> {
    let Some(place) = place else { return facts(file, file_bytes, format) };
    // Locks are those of the other open file description: closing this one keeps them.
    let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(Qcow2Error::Reopen)?;
    let run = || encode(facts(&file, file_bytes, format));
    let answer = place(&CheckJob { file: &file, run: &run }).map_err(Qcow2Error::Process)?;
    decode(&answer).unwrap_or(Err(Qcow2Error::Answer))
}

fn facts(file: &File, file_bytes: u64, format: FormatSource) -> Result<Facts, Qcow2Error> {
    let header = Header::read(file, file_bytes)?;
    let names_a_file = header.backing.is_some() || header.data != DataPlace::Image;
    if format == FormatSource::Configured || !names_a_file {
        check(file, file_bytes, &header, format)?;
    }
    Ok(Facts { backing: header.backing, data: header.data })
}

fn encode(result: Result<Facts, Qcow2Error>) -> Vec<u8> {
    match result {
        Ok(Facts { backing, data }) => {
            let mut answer = vec![FACTS];
            put(&mut answer, backing.as_ref().map(|backing| backing.name.as_slice()));
            put(&mut answer, backing.as_ref().and_then(|backing| backing.format.as_deref()));
            answer.push(u8::from(data != DataPlace::Image));
            put(&mut answer, if let DataPlace::File(name) = &data { name.as_deref() } else { None });
            answer
        }
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                text = format!("{text}: {error}");
                source = error.source();
            }
            [&[ERROR], text.as_bytes()].concat()
        }
    }
}

/// Adds a name that may be missing.
fn put(answer: &mut Vec<u8>, name: Option<&[u8]>) {
    match name.map(|name| name.get(..NAME_BYTES).unwrap_or(name)) {
        None => answer.push(0),
        Some(name) => {
            answer.push(1);
            answer.extend(u16::try_from(name.len()).unwrap_or(0).to_be_bytes());
            answer.extend(name);
        }
    }
}

/// Takes a name that may be missing off the front. `None` where there is no such.
fn take(rest: &mut &[u8]) -> Option<Option<Vec<u8>>> {
    let (given, behind) = rest.split_first()?;
    *rest = behind;
    match given {
        0 => Some(None),
        1 => {
            let (length, behind) = rest.split_first_chunk()?;
            let length = usize::from(u16::from_be_bytes(*length));
            let (name, behind) = behind.split_at_checked(length)?;
            *rest = behind;
            (length <= NAME_BYTES).then(|| Some(name.to_vec()))
        }
        _ => None,
    }
}

/// `None` where the answer is none.
fn decode(answer: &[u8]) -> Option<Result<Facts, Qcow2Error>> {
    let (kind, mut rest) = answer.split_first()?;
    if *kind == ERROR {
        let text = String::from_utf8_lossy(rest.get(..TEXT_BYTES).unwrap_or(rest));
        return Some(Err(Qcow2Error::Found(text.chars().filter(|c| !c.is_control()).collect())));
    }
    if *kind != FACTS {
        return None;
    }
    let (name, format) = (take(&mut rest)?, take(&mut rest)?);
    let (elsewhere, mut rest) = rest.split_first()?;
    let data_name = take(&mut rest)?;
    let data = match elsewhere {
        0 => DataPlace::Image,
        _ => DataPlace::File(data_name),
    };
    let facts = Facts { backing: name.map(|name| Backing { name, format }), data };
    rest.is_empty().then_some(Ok(facts))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_check_in_another_place_cannot_write_to_the_image() {
        let image = tempfile::tempfile().expect("a file");
        image.set_len(4096).expect("resized");
        let place = |job: &CheckJob<'_>| {
            assert!(job.file.write_at(b"QFI\xfb", 0).is_err() && job.file.set_len(0).is_err());
            Ok(job.run())
        };
        let refused = inspect(&image, 4096, FormatSource::Configured, Some(&place)).expect_err("no qcow2");
        assert!(refused.to_string().starts_with("magic in its header is 0x0"), "{refused}");
        assert_eq!(image.metadata().expect("known").len(), 4096);
    }

    #[test]
    fn answers_keep_what_the_header_says() {
        let backing = |format: Option<&[u8]>| Backing { name: b"a\x1b/b".to_vec(), format: format.map(<[u8]>::to_vec) };
        for facts in [
            Facts { backing: None, data: DataPlace::Image },
            Facts { backing: Some(backing(None)), data: DataPlace::File(None) },
            Facts { backing: Some(backing(Some(b"qcow2"))), data: DataPlace::File(Some(b"data".to_vec())) },
        ] {
            let answer = encode(Ok(facts.clone()));
            assert_eq!(decode(&answer).expect("an answer").expect("facts"), facts);
            for cut in 0..answer.len() {
                assert!(decode(&answer[..cut]).is_none_or(|decoded| decoded.is_err()), "cut at {cut}");
            }
            assert!(decode(&[answer, vec![0]].concat()).is_none());
        }
        let long = Facts {
            backing: Some(Backing { name: vec![b'x'; 1023], format: Some(vec![b'y'; 1 << 20]) }),
            data: DataPlace::File(Some(vec![0; 1 << 20])),
        };
        let answer = encode(Ok(long));
        assert!(answer.len() <= CheckJob::ANSWER_BYTES && decode(&answer).is_some());
    }

    #[test]
    fn errors_come_as_text_without_control_characters() {
        let error = Qcow2Error::Read { at: 7, bytes: 8, source: std::io::Error::from_raw_os_error(5) };
        let text = decode(&encode(Err(error))).expect("an answer").expect_err("an error").to_string();
        assert!(text.starts_with("cannot read 8 bytes at 0x7: ") && text.contains("os error 5"), "{text}");
        let hostile = [&[ERROR], "\x1b[2J\n".repeat(1000).as_bytes()].concat();
        let text = decode(&hostile).expect("an answer").expect_err("an error").to_string();
        assert!(text.len() <= TEXT_BYTES && !text.contains(char::is_control), "{text}");
        assert!(decode(&[]).is_none() && decode(&[9]).is_none());
    }
}
