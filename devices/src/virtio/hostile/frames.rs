//! A hostile peer of the network device's stream: a passt that was taken over.

use super::Source;
use crate::virtio::net::{Backend, BackendError, Stream};
use std::error::Error;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The longest frame that a stream takes (stream.rs).
const MAX_FRAME_BYTES: usize = 65535 + 14;

/// Sends the pieces that the input chooses, receives frames of at most as many bytes as its first two bytes say, and compares
/// them with a second reading of the same bytes.
///
/// # Errors
/// Returns an error where the sockets cannot be made, and where the stream's answer fits nothing that was sent.
///
/// # Panics
/// Panics where a frame is not what was sent.
pub fn receive_frames(bytes: &[u8], _folder: &Path) -> Result<(), Box<dyn Error>> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let mut stream = Stream::new(ours)?;
    let mut source = Source(bytes);
    let mut frame = vec![0; usize::from(source.short())];
    let (mut sent, mut read) = (Vec::new(), 0);
    while !source.0.is_empty() {
        let start = sent.len();
        match source.byte() {
            count @ 0..0x80 => (0..count).for_each(|_| sent.push(source.byte())),
            count => sent.resize(start + usize::from(count & 0x7f) * 512, source.byte()),
        }
        theirs.write_all(&sent[start..])?;
        loop {
            let next = sent[read..].split_first_chunk();
            let length = next.and_then(|(length, _)| usize::try_from(u32::from_be_bytes(*length)).ok());
            match (stream.receive(&mut frame), length) {
                (Ok(None), None) => break,
                (Ok(None), Some(length)) => {
                    assert!(read + 4 + length > sent.len(), "a whole frame of {length} bytes was not received");
                    break;
                }
                (Ok(Some(count)), Some(length)) => {
                    assert_eq!(count, length);
                    assert_eq!(frame.get(..count), sent.get(read + 4..read + 4 + count));
                    read += 4 + count;
                }
                (Err(BackendError::TooLong { bytes, .. }), Some(length)) => {
                    assert!(bytes == length && length > frame.len().min(MAX_FRAME_BYTES), "{length}");
                    assert!(matches!(stream.receive(&mut frame), Ok(None)), "nothing follows");
                    return Ok(());
                }
                (result, length) => return Err(format!("{result:?} with a length of {length:?}").into()),
            }
        }
    }
    Ok(())
}
