//! `hwvmm unpack`.

use crate::machine::kernel::{self, Kind};
use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;

/// Options.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The bzImage (vmlinuz)
    kernel: PathBuf,
    /// The ELF file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let result = kernel::open("kernel", &args.kernel).and_then(|file| match kernel::identify(&args.kernel, &file)? {
        Kind::BzImage(image) => unpack(args, &file, &image),
        Kind::Elf(_) | Kind::Multiboot(_) => Err(kernel::KernelError::NotKernel {
            path: args.kernel.clone(),
            what: "it is an ELF file: there is nothing to unpack".into(),
        }),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => super::fail(&error),
    }
}

fn unpack(args: &Args, file: &File, image: &hwvmm_arch::boot::bzimage::BzImage) -> Result<(), kernel::KernelError> {
    let error = |source| kernel::KernelError::Unpack { path: args.kernel.clone(), source };
    let unpacked = kernel::unpack_bzimage(file, image, None, &|_| {}).map_err(error)?;
    let write = |source| kernel::KernelError::Read { what: "unpacked kernel", path: args.output.clone(), source };
    let mut out = File::create(&args.output).map_err(write)?;
    let mut unpacked = unpacked;
    std::io::Seek::rewind(&mut unpacked).map_err(write)?;
    std::io::copy(&mut unpacked, &mut out).map_err(write)?;
    Ok(())
}
