//! Unpacks in a process of its own, which has the packed files and the files to fill.

use super::limits::Exceeded;
use super::{Job, UnpackError};
use crate::escape::escape;
use crate::sandbox::{self, ConfinedError, Isolation, confined};
use hwvmm_arch::boot::bzimage::Compression;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

/// Memory beside the packed bytes and the decompressor: buffers, and blocks of LZ4.
const BUFFER_BYTES: u64 = 64 << 20;
/// CPU time beside that of [`Limits::cpu`](super::Limits), after which the process itself says what it took.
const SPARE: Duration = Duration::from_secs(5);
/// The longest text of an error, in bytes.
const TEXT_BYTES: usize = 256;
/// The longest answer in bytes.
const ANSWER_BYTES: usize = 4096;
/// The bytes of an unknown format that are shown.
const START_BYTES: usize = 16;

/// What the process answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// All is unpacked: the size in bytes.
    Done(u64),
    Unknown(Vec<u8>),
    Read(Failure),
    Data(Compression, Failure),
    Write(Failure),
    Limit(Exceeded),
}

/// An [`io::Error`].
#[derive(Debug, Serialize, Deserialize)]
enum Failure {
    /// Of a system call: its number.
    Call(i32),
    /// Of a library: its text.
    Text(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        error.raw_os_error().map_or_else(|| Self::Text(error.to_string()), Self::Call)
    }
}

impl From<Failure> for io::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Call(number) => Self::from_raw_os_error(number),
            Failure::Text(text) => Self::new(io::ErrorKind::InvalidData, escape(&text, TEXT_BYTES)),
        }
    }
}

impl From<Result<u64, UnpackError>> for Answer {
    fn from(result: Result<u64, UnpackError>) -> Self {
        let text = |error: &dyn std::error::Error| Failure::Text(escape(&error.to_string(), TEXT_BYTES));
        match result {
            Ok(bytes) => Self::Done(bytes),
            Err(UnpackError::Unknown(start)) => Self::Unknown(start),
            Err(UnpackError::Read(error)) => Self::Read(error.into()),
            Err(UnpackError::Data(kind, error)) => Self::Data(kind, error.into()),
            Err(UnpackError::Write(error)) => Self::Write(error.into()),
            Err(UnpackError::Limit(exceeded)) => Self::Limit(exceeded),
            Err(error @ (UnpackError::NoPayload | UnpackError::Process(_))) => Self::Read(text(&error)),
        }
    }
}

impl From<Answer> for Result<u64, UnpackError> {
    fn from(answer: Answer) -> Self {
        Err(match answer {
            Answer::Done(bytes) => return Ok(bytes),
            Answer::Unknown(mut start) => {
                start.truncate(START_BYTES);
                UnpackError::Unknown(start)
            }
            Answer::Read(failure) => UnpackError::Read(failure.into()),
            Answer::Data(kind, failure) => UnpackError::Data(kind, failure.into()),
            Answer::Write(failure) => UnpackError::Write(failure.into()),
            Answer::Limit(exceeded) => UnpackError::Limit(exceeded),
        })
    }
}

/// A packed file, and the empty file that its bytes are unpacked into.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The range of the packed file, and its limits.
    pub job: Job,
    /// The file that is unpacked.
    pub packed: &'a File,
    /// The file that is filled.
    pub out: &'a File,
}

/// One of several files cannot be unpacked.
#[derive(Debug)]
pub struct FailedTask {
    /// Its place in the list.
    pub index: usize,
    /// Why it cannot.
    pub error: UnpackError,
}

impl Job {
    /// As [`Job::run`], in a process of its own where `isolation` says so.
    ///
    /// # Errors
    /// [`UnpackError`].
    pub fn run_confined(&self, packed: &File, out: &File, isolation: Isolation) -> Result<u64, UnpackError> {
        let sizes = run_all(&[Task { job: *self, packed, out }], isolation).map_err(|failed| failed.error)?;
        sizes.first().copied().ok_or(UnpackError::Process(ConfinedError::Nonsense))
    }
}

/// Runs tasks one after the other, all in one process of their own where `isolation` says so: to make a process takes as long as to
/// unpack a small file. Together they may take the CPU time of the one with the most. Returns their unpacked sizes in bytes.
///
/// # Errors
/// That of the first task that fails; those behind it are not run.
pub fn run_all(tasks: &[Task<'_>], isolation: Isolation) -> Result<Vec<u64>, FailedTask> {
    let failed = |index, error| FailedTask { index, error };
    if isolation == Isolation::None {
        let run = |(index, task): (usize, &Task<'_>)| task.run().map_err(|error| failed(index, error));
        return tasks.iter().enumerate().map(run).collect();
    }
    for (index, task) in tasks.iter().enumerate() {
        task.job.check_packed().map_err(|exceeded| failed(index, exceeded.into()))?;
    }
    let of_process = |error| failed(0, UnpackError::Process(error));
    let files: Vec<_> = tasks.iter().flat_map(|task| [task.packed.as_fd(), task.out.as_fd()]).collect();
    let job = || serde_json::to_vec(&answers(tasks)).unwrap_or_default();
    let answer = confined(isolation, &limits(tasks), &files, job).map_err(of_process)?;
    let answers: Vec<Answer> = serde_json::from_slice(&answer).map_err(|_| of_process(ConfinedError::Nonsense))?;
    let mut sizes = Vec::new();
    for (index, (task, answer)) in tasks.iter().zip(answers).enumerate() {
        sizes.push(task.checked(answer).map_err(|error| failed(index, error))?);
    }
    if sizes.len() == tasks.len() { Ok(sizes) } else { Err(of_process(ConfinedError::Nonsense)) }
}

/// What the process answers: up to the first task that fails.
fn answers(tasks: &[Task<'_>]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for task in tasks {
        let result = task.run();
        let fails = result.is_err();
        answers.push(result.into());
        if fails {
            break;
        }
    }
    answers
}

fn limits(tasks: &[Task<'_>]) -> sandbox::Limits {
    let most = |of: fn(&Job) -> u64| tasks.iter().map(|task| of(&task.job)).max().unwrap_or_default();
    let cpu = tasks.iter().map(|task| task.job.limits.cpu).max().unwrap_or_default().saturating_add(SPARE);
    sandbox::Limits {
        // One after the other: each gives back what it took.
        memory_bytes: most(|job| job.range.bytes)
            .saturating_add(most(|job| job.limits.decoder_bytes))
            .saturating_add(BUFFER_BYTES),
        cpu,
        wall: cpu.saturating_mul(2),
        file_bytes: most(|job| job.limits.output_bytes),
        answer_bytes: ANSWER_BYTES.saturating_mul(tasks.len().max(1)),
    }
}

impl Task<'_> {
    fn run(&self) -> Result<u64, UnpackError> {
        self.job.run(self.packed, self.out)
    }

    /// The size that the process answers, if it is that of the file.
    fn checked(&self, answer: Answer) -> Result<u64, UnpackError> {
        let bytes = Result::from(answer)?;
        let written = self.out.metadata().map_err(UnpackError::Write)?.len();
        if bytes != written || bytes > self.job.limits.output_bytes {
            return Err(UnpackError::Process(ConfinedError::Nonsense));
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_keep_errors_as_they_are() {
        let errors = [
            UnpackError::Unknown(vec![1, 2]),
            UnpackError::Read(io::Error::from_raw_os_error(libc::EIO)),
            UnpackError::Data(Compression::Xz, io::Error::new(io::ErrorKind::InvalidData, "no")),
            UnpackError::Write(io::Error::from_raw_os_error(libc::ENOSPC)),
            UnpackError::Limit(Exceeded { budget: super::super::Budget::Parts, limit: 9 }),
        ];
        for error in errors {
            let before = format!("{error} {:?}", std::error::Error::source(&error).map(ToString::to_string));
            let json = serde_json::to_vec(&Answer::from(Err(error))).expect("JSON");
            assert!(json.len() <= ANSWER_BYTES);
            let answer: Answer = serde_json::from_slice(&json).expect("an answer");
            let after = Result::from(answer).expect_err("an error");
            assert_eq!(format!("{after} {:?}", std::error::Error::source(&after).map(ToString::to_string)), before);
        }
        let hostile = Answer::Read(Failure::Text("\x1b[2J".repeat(1000)));
        let error = Result::from(hostile).expect_err("an error");
        let text = std::error::Error::source(&error).expect("a source").to_string();
        assert!(text.len() <= TEXT_BYTES + 8 && !text.contains(char::is_control), "{text}");
        assert!(
            matches!(Result::from(Answer::Unknown(vec![0; 5000])), Err(UnpackError::Unknown(start)) if start.len() == 16)
        );
    }
}
