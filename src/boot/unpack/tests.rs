use super::blocks::{LZ4_BLOCK, LZOP_ADLER32_UNPACKED};
use super::*;
use std::io::Seek;
use std::time::{Duration, Instant};

fn limits() -> Limits {
    Limits::of(64 << 20)
}

/// Bytes that compress, with holes in them.
fn kernel() -> Vec<u8> {
    let mut bytes: Vec<u8> = b"\x7fELF".to_vec();
    bytes.extend((0..100_000_u32).flat_map(|i| (i / 7).to_le_bytes()));
    bytes.resize(bytes.len() + 300_000, 0);
    bytes.extend(b"the end");
    bytes
}

/// What unpacks from `payload` with the unpacked size appended, as the kernel's build does.
fn unpacked(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    payload.extend(u32::try_from(size).expect("small").to_le_bytes());
    let mut file = tempfile::tempfile().expect("a temporary file");
    assert_eq!(unpack(&payload, &file, &limits()).expect("unpacks"), size as u64);
    let mut bytes = Vec::new();
    file.rewind().expect("seek");
    file.read_to_end(&mut bytes).expect("read");
    bytes
}

fn lz4_legacy(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x02\x21\x4c\x18".to_vec();
    for block in data.chunks(LZ4_BLOCK) {
        let packed = lz4_flex::block::compress(block);
        out.extend(u32::try_from(packed.len()).expect("small").to_le_bytes());
        out.extend(packed);
    }
    out
}

fn lzop(data: &[u8]) -> Vec<u8> {
    let mut out = b"\x89LZO\0\r\n\x1a\n".to_vec();
    out.extend([0x10, 0x30, 0x20, 0x80, 0x09, 0x40, 1, 9]);
    out.extend(LZOP_ADLER32_UNPACKED.to_be_bytes());
    out.extend([0; 12]);
    out.extend([0, 1, 2, 3, 4]); // no name, checksum
    for block in data.chunks(256 << 10) {
        let packed = lzokay::compress::compress(block).expect("compresses");
        let stored = packed.len() >= block.len();
        let body = if stored { block } else { &packed };
        out.extend(u32::try_from(block.len()).expect("small").to_be_bytes());
        out.extend(u32::try_from(body.len()).expect("small").to_be_bytes());
        out.extend([9; 4]);
        out.extend(body);
    }
    out.extend([0; 4]);
    out
}

fn xz(data: &[u8], lzma: bool) -> Vec<u8> {
    let stream = if lzma {
        let options = liblzma::stream::LzmaOptions::new_preset(6).expect("preset");
        liblzma::stream::Stream::new_lzma_encoder(&options).expect("encoder")
    } else {
        liblzma::stream::Stream::new_easy_encoder(6, liblzma::stream::Check::Crc32).expect("encoder")
    };
    let mut out = Vec::new();
    liblzma::read::XzEncoder::new_stream(data, stream).read_to_end(&mut out).expect("compresses");
    out
}

fn packed(kind: Compression, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    match kind {
        Compression::Gzip => {
            flate2::read::GzEncoder::new(data, flate2::Compression::best()).read_to_end(&mut out).expect("gzip");
        }
        Compression::Bzip2 => {
            bzip2::read::BzEncoder::new(data, bzip2::Compression::best()).read_to_end(&mut out).expect("bzip2");
        }
        Compression::Zstd => out = zstd::stream::encode_all(data, 3).expect("zstd"),
        Compression::Xz => out = xz(data, false),
        Compression::Lzma => out = xz(data, true),
        Compression::Lz4 => out = lz4_legacy(data),
        Compression::Lzo => out = lzop(data),
        Compression::None => out = data.to_vec(),
    }
    out
}

const PACKED: [Compression; 7] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Zstd,
    Compression::Lz4,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lzo,
];

#[test]
fn every_compression_unpacks_to_what_was_packed() {
    let kernel = kernel();
    for kind in PACKED {
        assert!(unpacked(packed(kind, &kernel), kernel.len()) == kernel, "{}", kind.name());
    }
}

#[test]
fn damage_and_truncation_are_errors_not_panics() {
    let kernel = kernel();
    for kind in PACKED {
        let whole = packed(kind, &kernel);
        for cut in [5, 20, whole.len() / 2] {
            let out = tempfile::tempfile().expect("a temporary file");
            let result = unpack(&whole[..cut.min(whole.len())], &out, &limits());
            let short = result.as_ref().is_ok_and(|bytes| *bytes < kernel.len() as u64);
            assert!(result.is_err() || short, "{} cut at {cut}", kind.name());
        }
        for at in (8..whole.len()).step_by((whole.len() / 20).max(1)) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x55;
            let out = tempfile::tempfile().expect("a temporary file");
            let _ = unpack(&damaged, &out, &limits());
        }
    }
}

#[test]
fn an_unknown_compression_is_named() {
    let out = tempfile::tempfile().expect("a temporary file");
    let error = unpack(b"hello, world", &out, &limits()).expect_err("unknown").to_string();
    assert!(error.contains("68, 65") && error.len() < 200, "{error}");
}

#[test]
fn zero_blocks_become_holes() {
    use std::os::unix::fs::MetadataExt;
    let mut data = vec![0; 8 << 20];
    data[0] = 1;
    let file = tempfile::tempfile().expect("a temporary file");
    unpack(&packed(Compression::Gzip, &data), &file, &limits()).expect("unpacks");
    let metadata = file.metadata().expect("metadata");
    assert_eq!(metadata.len(), 8 << 20);
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
}

#[test]
fn small_holes_are_filled_and_large_ones_are_not() {
    use rustix::fs::{SeekFrom, seek};
    let mut data = Vec::new();
    let mut holes = 0;
    for blocks in [1, 2, 15, 16, 17, 70, 1, 300, 3] {
        data.extend([1; BLOCK]);
        data.resize(data.len() + blocks * BLOCK, 0);
        holes += usize::from(blocks * BLOCK >= HOLE);
    }
    data.extend(b"the end");
    let file = tempfile::tempfile().expect("a temporary file");
    unpack(&packed(Compression::Gzip, &data), &file, &limits()).expect("unpacks");
    let mut content = vec![0; data.len()];
    file.read_exact_at(&mut content, 0).expect("readable");
    assert!(content == data);
    let (mut at, mut found) = (0, 0);
    while let Ok(hole) = seek(&file, SeekFrom::Hole(at)) {
        if hole == data.len() as u64 {
            break;
        }
        found += 1;
        at = seek(&file, SeekFrom::Data(hole)).expect("the end is data");
    }
    // A file system without holes says that there are none.
    assert!(found == holes || found == 0, "{found} holes, not {holes}");
}

/// The system calls by which this thread has written (proc_pid_io(5)); `None` where the kernel does not count them.
fn writes() -> Option<u64> {
    let io = std::fs::read_to_string("/proc/thread-self/io").ok()?;
    io.lines().find_map(|line| line.strip_prefix("syscw: "))?.parse().ok()
}

#[test]
fn what_is_unpacked_is_written_in_large_pieces() {
    let mut data = Vec::new();
    for block in 0..2048_usize {
        data.extend([u8::from(block % 3 != 0); BLOCK]);
    }
    let packed = packed(Compression::Gzip, &data);
    let file = tempfile::tempfile().expect("a temporary file");
    let before = writes();
    unpack(&packed, &file, &limits()).expect("unpacks");
    let (Some(before), Some(after)) = (before, writes()) else {
        return crate::skip::skipped("the kernel does not count system calls");
    };
    let pieces = (data.len() / BUFFER) as u64;
    assert!((pieces..pieces + 4).contains(&(after - before)), "{} writes for {pieces} pieces", after - before);
}

/// What `unpack_parts` makes of `archive`.
fn parts(archive: &[u8]) -> Result<Vec<u8>, UnpackError> {
    let mut file = tempfile::tempfile().expect("a temporary file");
    let size = unpack_parts(archive, &file, &limits())?;
    let mut bytes = Vec::new();
    file.rewind().expect("seek");
    file.read_to_end(&mut bytes).expect("read");
    assert_eq!(bytes.len() as u64, size);
    Ok(bytes)
}

#[test]
fn an_initrd_of_several_parts_is_unpacked_whole() {
    let gzip = |data: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, data).expect("written");
        encoder.finish().expect("finished")
    };
    let (one, two) = (b"070701 one".repeat(1000), b"070701 two.".repeat(999));
    let mut wanted = one.clone();
    wanted.resize(wanted.len().next_multiple_of(4), 0);
    wanted.extend(&two);
    wanted.resize(wanted.len().next_multiple_of(4), 0);
    for first in
        [gzip(&one), xz(&one, false), lz4_legacy(&one), lzop(&one), zstd::encode_all(&one[..], 1).expect("zstd")]
    {
        for second in [gzip(&two), xz(&two, false), lz4_legacy(&two)] {
            let mut archive = first.clone();
            archive.resize(archive.len() + 8, 0);
            archive.extend(&second);
            assert_eq!(parts(&archive).expect("unpacks"), wanted);
        }
    }
    let mut plain = gzip(&one);
    plain.extend(b"070701");
    assert!(matches!(parts(&plain), Err(UnpackError::Unknown(_))));
}

/// The limit that unpacking `archive` reaches.
fn exceeded(archive: &[u8], limits: &Limits) -> Option<Exceeded> {
    let out = tempfile::tempfile().expect("a temporary file");
    match unpack_parts(archive, &out, limits) {
        Err(UnpackError::Limit(exceeded)) => {
            assert!(out.metadata().expect("metadata").len() <= limits.output_bytes, "checked before it is written");
            assert!(exceeded.to_string().contains(&exceeded.limit.to_string()), "{exceeded}");
            Some(exceeded)
        }
        result => panic!("{result:?}"),
    }
}

#[test]
fn empty_blocks_take_no_time_and_are_counted() {
    let mut bomb = lz4_legacy(b"");
    bomb.extend([1, 0, 0, 0, 0].repeat(2000));
    let start = Instant::now();
    assert_eq!(parts(&bomb).expect("unpacks"), b"");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let limits = Limits { blocks: 2000, ..limits() };
    assert_eq!(exceeded(&bomb, &limits), Some(Exceeded { budget: Budget::Blocks, limit: 2000 }));
    bomb.extend([0; 4]);
    let more = bomb.repeat(40);
    assert_eq!(exceeded(&more, &self::limits()).map(|exceeded| exceeded.budget), Some(Budget::Blocks));
}

#[test]
fn output_ends_at_its_limit() {
    let data = vec![7; 1 << 20];
    for kind in PACKED {
        let packed = packed(kind, &data);
        let out = tempfile::tempfile().expect("a temporary file");
        assert_eq!(unpack(&packed, &out, &Limits::of(1 << 20)).expect("unpacks"), 1 << 20, "{}", kind.name());
        let limit = (1 << 20) - 1;
        let exceeded = exceeded(&packed, &Limits { output_bytes: limit, ..limits() });
        assert_eq!(exceeded, Some(Exceeded { budget: Budget::Output, limit }), "{}", kind.name());
    }
}

#[test]
fn parts_are_counted() {
    let one = zstd::encode_all(&b""[..], 1).expect("zstd");
    assert_eq!(parts(&one.repeat(1024)).expect("unpacks"), b"");
    let limit = 1024;
    assert_eq!(exceeded(&one.repeat(1025), &limits()), Some(Exceeded { budget: Budget::Parts, limit }));
}

/// Decoders that ask for more memory than Linux' do: a dictionary of .lzma of 3 GiB, one of .xz of 192 MiB, a window of zstd of 1 GiB.
#[test]
fn memory_of_decoders_is_limited() {
    let mut lzma = b"\x5d\0\0\0\xc0".to_vec();
    lzma.extend([0xff; 8]);
    lzma.extend([0; 100]);
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).expect("preset");
    let xz_with = |options: &liblzma::stream::LzmaOptions| {
        let mut filters = liblzma::stream::Filters::new();
        filters.lzma2(options);
        let stream = liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32);
        let mut out = Vec::new();
        let encoder = liblzma::read::XzEncoder::new_stream(&b"data"[..], stream.expect("encoder"));
        { encoder }.read_to_end(&mut out).expect("compresses");
        out
    };
    let xz = xz_with(options.dict_size(192 << 20));
    // RFC 8878 3.1.1.1: no content size, no single segment; window of 1 << (10 + 20).
    let mut zstd = b"\x28\xb5\x2f\xfd\0".to_vec();
    zstd.extend([20 << 3, 1, 0, 0]);
    for bomb in [&lzma, &xz, &zstd] {
        let limit = 160 << 20;
        assert_eq!(exceeded(bomb, &limits()), Some(Exceeded { budget: Budget::Decoder, limit }));
    }
    // What kernels are packed with.
    assert_eq!(parts(&xz_with(options.dict_size(128 << 20))).expect("unpacks"), b"data");
    zstd[5] = 17 << 3;
    assert_eq!(parts(&zstd).expect("unpacks"), b"");
}

#[test]
fn packed_bytes_and_cpu_time_are_limited() {
    let packed = tempfile::tempfile().expect("a temporary file");
    packed.set_len(1 << 40).expect("sparse");
    let out = tempfile::tempfile().expect("a temporary file");
    let range = FileRange { offset: 0, bytes: 1 << 40 };
    let job = Job { range, content: Content::Stream, limits: Limits::of(u64::MAX) };
    let error = job.run(&packed, &out).expect_err("refused").to_string();
    assert_eq!(error, "it has more than 536870912 packed bytes");
    for kind in PACKED {
        let limits = Limits { cpu: Duration::ZERO, ..limits() };
        let exceeded = exceeded(&self::packed(kind, &kernel()), &limits);
        assert_eq!(exceeded, Some(Exceeded { budget: Budget::Cpu, limit: 0 }), "{}", kind.name());
    }
}
