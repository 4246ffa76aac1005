//! The subcommand `hwvmm unpack`: writes the kernel in a bzImage as an ELF file.

use super::output::fail;
use crate::boot::unpack::Limits;
use crate::boot::{self, FileRole, KernelFile, KernelFormat};
use crate::sandbox::{Isolation, Mode};
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    /// The bzImage (vmlinuz)
    kernel: PathBuf,
    /// The ELF file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let result = KernelFile::open(&args.kernel).and_then(|kernel| match kernel.format() {
        KernelFormat::BzImage(image) => unpack(args, kernel.file(), image),
        KernelFormat::Elf(_) | KernelFormat::Multiboot(_) => Err(boot::KernelError::NotKernel {
            path: args.kernel.clone(),
            what: "it is an ELF file: there is nothing to unpack".into(),
        }),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn unpack(args: &Args, file: &File, image: &hwvmm_arch::boot::bzimage::BzImage) -> Result<(), boot::KernelError> {
    let error = |source| boot::KernelError::Unpack { path: args.kernel.clone(), source };
    let how = boot::UnpackOptions { cache: None, isolation: Isolation::Process(Mode::On), progress: &|_| {} };
    let unpacked = boot::unpack_bzimage(file, image, Limits::of(u64::MAX), &how).map_err(error)?;
    let write =
        |source| boot::KernelError::WriteFile { role: FileRole::UnpackedKernel, path: args.output.clone(), source };
    let mut out = File::create(&args.output).map_err(write)?;
    let mut unpacked = unpacked;
    std::io::Seek::rewind(&mut unpacked).map_err(write)?;
    std::io::copy(&mut unpacked, &mut out).map_err(write)?;
    Ok(())
}
