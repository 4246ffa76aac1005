use super::super::image_map::{ImageMap, Mapped};
use super::super::table::{Origin, Table};
use super::names::DIGITS;
use super::read::{MARKED, align};
use super::search::CHUNK;
use super::*;
use hwvmm_arch::boot::elf::ElfClass;
use proptest::prelude::*;
use std::time::{Duration, Instant};

/// As the process that searches hands them over.
fn table(tables: Tables) -> Table {
    let kallsyms = Kallsyms { tables };
    let packed = kallsyms.pack().expect("few");
    let again = Kallsyms::unpack(&packed).expect("unpacked");
    for (address, name) in [again.symbols().first(), again.symbols().last()].into_iter().flatten() {
        assert_eq!(again.resolve(*address).map(|(_, start)| start), Some(*address), "{name}");
    }
    Table::new(again.symbols(), Origin::Elf).expect("symbols")
}

#[test]
fn packed_tables_are_checked() {
    let tables = |addresses: &[u64], names: &[u8]| {
        Kallsyms::new(vec![b"Ta".to_vec(), b"b".to_vec()], names.to_vec(), addresses.to_vec())
    };
    let kallsyms = tables(&[16, 16, 32], &[1, 0, 2, 0, 1, 1, 0]).expect("three names");
    assert_eq!(kallsyms.resolve(20), Some(("a".to_owned(), 16)), "the first of several");
    assert_eq!((kallsyms.address("ab"), kallsyms.address("b"), kallsyms.bounds()), (Some(16), None, Some((16, 32))));
    assert!(kallsyms.resolve(15).is_none());
    assert!(tables(&[1, 2], &[1, 0]).is_none(), "fewer names");
    let packed = kallsyms.pack().expect("few");
    for cut in 0..packed.len() {
        assert!(Kallsyms::unpack(&packed[..cut]).is_none(), "cut at {cut}");
    }
    let mut unsorted = packed.clone();
    unsorted[4] = 200;
    assert!(Kallsyms::unpack(&unsorted).is_none());
    let mut many = packed;
    many[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Kallsyms::unpack(&many).is_none());
}

fn find(made: &Made) -> Option<Table> {
    search(&made.image[..], &made.map, STEPS).expect("few steps").map(table)
}

fn find_raw(image: &[u8]) -> Option<Table> {
    search(image, &ImageMap::default(), STEPS).expect("few steps").map(table)
}

/// Where the addresses are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Side {
    BeforeCount,
    BehindTokens,
}

/// What the addresses are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Offsets from a base; per-CPU symbols by themselves, the others negative.
    FromBasePercpu,
    /// Offsets from a base.
    FromBase,
    /// Offsets from their own places.
    FromPlace,
    /// Virtual addresses, each of the size of a pointer.
    Absolute,
}

/// How a kernel lays the tables out.
#[derive(Clone, Copy, Debug)]
struct Layout {
    side: Side,
    form: Form,
    class: ElfClass,
    /// What tables start at a multiple of, in bytes.
    multiple: usize,
    marker_bytes: usize,
    count_bytes: usize,
    /// A table of 3 bytes for each symbol stands between markers and tokens.
    sequences: bool,
}

const LINUX_5_10: Layout = Layout {
    side: Side::BeforeCount,
    form: Form::FromBasePercpu,
    class: ElfClass::Elf64,
    multiple: 8,
    marker_bytes: 4,
    count_bytes: 4,
    sequences: false,
};
const LINUX_6_3: Layout = Layout { sequences: true, ..LINUX_5_10 };
const LINUX_6_5: Layout = Layout { side: Side::BehindTokens, ..LINUX_5_10 };
const LINUX_6_15: Layout = Layout { form: Form::FromBase, ..LINUX_6_5 };
const LINUX_7_0: Layout = Layout { form: Form::FromPlace, multiple: 4, ..LINUX_6_15 };
const LINUX_4_14: Layout = Layout { marker_bytes: 8, count_bytes: 8, ..LINUX_5_10 };
const LINUX_4_4: Layout = Layout { form: Form::Absolute, ..LINUX_4_14 };
const LINUX_32: Layout = Layout { form: Form::FromBase, class: ElfClass::Elf32, multiple: 4, ..LINUX_5_10 };

/// All that Linux had, with and without pointers for addresses (CONFIG_KALLSYMS_BASE_RELATIVE), for both classes.
fn layouts() -> Vec<Layout> {
    let mut all = vec![LINUX_4_4, LINUX_4_14, LINUX_5_10, LINUX_6_3, LINUX_6_5, LINUX_6_15, LINUX_7_0];
    all.extend([LINUX_5_10, LINUX_6_3, LINUX_6_5].map(|layout| Layout { form: Form::Absolute, ..layout }));
    // Up to 6.14 without SMP, and a table at a multiple of 4 that is one of 8 too.
    all.extend([LINUX_4_14, LINUX_5_10, LINUX_6_3].map(|layout| Layout { form: Form::FromBase, ..layout }));
    all.push(Layout { multiple: 8, ..LINUX_7_0 });
    let old_32 = Layout { marker_bytes: 4, count_bytes: 4, ..LINUX_32 };
    for form in [Form::FromBase, Form::Absolute] {
        all.extend([false, true].map(|sequences| Layout { form, sequences, ..old_32 }));
        all.push(Layout { form, side: Side::BehindTokens, ..old_32 });
    }
    all.push(Layout { form: Form::FromPlace, side: Side::BehindTokens, ..old_32 });
    all
}

const COUNT: usize = 1500;

/// A file with tables, and what is where in it.
struct Made {
    image: Vec<u8>,
    map: ImageMap,
    /// The address of each symbol.
    addresses: Vec<u64>,
}

fn pad(image: &mut Vec<u8>, multiple: usize) {
    image.resize(align(image.len(), multiple), 0);
}

fn word(value: usize) -> [u8; 4] {
    u32::try_from(value).expect("small").to_le_bytes()
}

/// Digits and letters stand for themselves; 1 is "sys_", 2 is "Tfunction_", 3 is "x" 200 times.
fn tokens() -> Vec<Vec<u8>> {
    let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|token| vec![b'~', token | 0x80]).collect();
    for token in 0x21..0x7f_u8 {
        tokens[usize::from(token)] = vec![token];
    }
    tokens[1] = b"sys_".to_vec();
    tokens[2] = b"Tfunction_".to_vec();
    tokens[3] = vec![b'x'; 200];
    tokens
}

/// The tokens, and their index.
fn add_tokens(image: &mut Vec<u8>, tokens: &[Vec<u8>], multiple: usize) {
    let (start, mut index) = (image.len(), Vec::new());
    for token in tokens {
        index.extend(u16::try_from(image.len() - start).expect("small").to_le_bytes());
        image.extend(token);
        image.push(0);
    }
    pad(image, multiple);
    image.extend(index);
    pad(image, multiple);
}

/// The compressed names, and the offset of every 256th of them. Number 700 has a name of 130 tokens.
fn names(count: usize) -> (Vec<u8>, Vec<usize>) {
    let (mut names, mut markers) = (Vec::new(), Vec::new());
    for number in 0..count {
        if number % MARKED == 0 {
            markers.push(names.len());
        }
        let mut name = vec![2];
        if number == 400 {
            name = b"T\x01read".to_vec();
        } else {
            name.extend(number.to_string().bytes());
        }
        if number == 300 {
            name.extend([b'y'; 130]);
        }
        match u8::try_from(name.len()) {
            Ok(length @ 0..0x80) => names.push(length),
            _ => names.extend([u8::try_from(name.len() & 0x7f).expect("small") | 0x80, 1]),
        }
        names.extend(name);
    }
    (names, markers)
}

/// Where the image lies in memory, and where the kernel's first function does.
fn bases(class: ElfClass) -> (u64, u64) {
    match class {
        ElfClass::Elf64 => (0xffff_ffff_8200_0000, 0xffff_ffff_8100_0000),
        ElfClass::Elf32 => (0xc200_0000, 0xc100_0000),
    }
}

fn add_addresses(image: &mut Vec<u8>, layout: Layout, addresses: &[u64]) {
    let (image_base, base) = bases(layout.class);
    let pointer = if layout.class == ElfClass::Elf64 { 8 } else { 4 };
    for address in addresses {
        let value = match layout.form {
            Form::Absolute => {
                image.extend(&address.to_le_bytes()[..pointer]);
                continue;
            }
            Form::FromBasePercpu if *address < base => *address,
            Form::FromBasePercpu => base.wrapping_sub(1).wrapping_sub(*address),
            Form::FromBase => address - base,
            Form::FromPlace => address.wrapping_sub(image_base + image.len() as u64),
        };
        image.extend(&value.to_le_bytes()[..4]);
    }
    pad(image, layout.multiple);
    if matches!(layout.form, Form::FromBase | Form::FromBasePercpu) {
        image.extend(&base.to_le_bytes()[..pointer]);
    }
}

/// An image with `count` symbols, 64 bytes apart; `before` bytes of something are before the tables.
fn image(layout: Layout, count: usize, before: usize) -> Made {
    let (image_base, base) = bases(layout.class);
    let percpu = if layout.form == Form::FromBasePercpu { 3 } else { 0 };
    let address =
        |number: usize| if number < percpu { 8 * number as u64 } else { base + 64 * (number - percpu) as u64 };
    let addresses: Vec<u64> = (0..count).map(address).collect();
    let (names, markers) = names(count);

    // Something before, with digits in it that are no table.
    let mut image = b"\x7fELF 0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0 and more".to_vec();
    image.resize(image.len().max(before), 0xcc);
    pad(&mut image, layout.multiple);
    if layout.side == Side::BeforeCount {
        add_addresses(&mut image, layout, &addresses);
        pad(&mut image, layout.multiple);
    }
    image.extend(&(count as u64).to_le_bytes()[..layout.count_bytes]);
    pad(&mut image, layout.multiple);
    image.extend(names);
    pad(&mut image, layout.multiple);
    for marker in markers {
        image.extend(&(marker as u64).to_le_bytes()[..layout.marker_bytes]);
    }
    pad(&mut image, layout.multiple);
    if layout.sequences {
        for number in 0..count {
            image.extend(&word(number)[..3]);
        }
        pad(&mut image, layout.multiple);
    }
    add_tokens(&mut image, &tokens(), layout.multiple);
    if layout.side == Side::BehindTokens {
        add_addresses(&mut image, layout, &addresses);
        // The sequences of Linux 6.5 and later.
        for number in 0..count {
            image.extend(&word(number)[..3]);
        }
    }
    image.extend([0xcc; 100]);
    let length = image.len() as u64;
    let rodata = Mapped { offset: 0, file_bytes: length, address: image_base, memory_bytes: length };
    let text = Mapped { offset: length, file_bytes: 0, address: base, memory_bytes: 64 * count as u64 };
    let map = ImageMap { class: layout.class, read_only_data: 0, segments: vec![text, rodata] };
    Made { image, map, addresses }
}

fn assert_found(layout: Layout, made: &Made) {
    let found = find(made).unwrap_or_else(|| panic!("{layout:?}"));
    let count = made.addresses.len();
    assert!(found.symbols().iter().map(|symbol| symbol.0).eq(made.addresses.iter().copied()), "{layout:?}");
    let at = |number: usize| made.addresses[number];
    assert_eq!(found.resolve(at(42) + 63), Some(("function_42".into(), at(42))), "{layout:?}");
    assert_eq!(found.resolve(at(400)), Some(("sys_read".into(), at(400))), "{layout:?}");
    assert_eq!(found.resolve(at(count - 1)), Some((format!("function_{}", count - 1), at(count - 1))), "{layout:?}");
    let (long, _) = found.resolve(at(300)).expect("a long name");
    assert_eq!(long.len(), "function_300".len() + 130);
    assert_eq!((found.address("sys_read"), found.address("function_499")), (Some(at(400)), Some(at(499))));
    assert_eq!((found.address("sys_rea"), found.address("sys_reads")), (None, None));
}

#[test]
fn all_layouts_are_read() {
    for layout in layouts() {
        assert_found(layout, &image(layout, COUNT, 4096));
    }
}

#[test]
fn tables_without_an_elf_file_around_them_are_read_where_they_need_none() {
    for layout in layouts() {
        let found = find_raw(&image(layout, COUNT, 4096).image);
        let needs = layout.class == ElfClass::Elf32 || layout.form == Form::FromPlace;
        assert_eq!(found.is_none(), needs, "{layout:?}");
    }
}

#[test]
fn tables_are_found_in_a_large_file_wherever_they_are() {
    for before in [0, CHUNK - 4096 - 40_000, 5 * CHUNK + 8] {
        for layout in [LINUX_6_3, LINUX_6_15, LINUX_7_0] {
            let mut made = image(layout, COUNT, usize::try_from(before).expect("small"));
            assert_found(layout, &made);
            made.map.read_only_data = before / 2;
            assert_found(layout, &made);
            made.map.read_only_data = made.image.len() as u64;
            assert_found(layout, &made);
        }
    }
    assert!(Kallsyms::read(&tempfile::tempfile().expect("a file")).expect("readable").is_none());
}

/// Tables whose names are damaged near the end cost the most that a search costs without a result, in steps, which are counted
/// for reading too.
#[test]
fn a_search_without_a_result_takes_no_more_than_one_with() {
    for layout in [LINUX_5_10, LINUX_6_3, LINUX_7_0] {
        let mut made = image(layout, 20_000, 1 << 20);
        let least =
            |made: &Made| (16..).map(|bits| 1 << bits).find(|steps| search(&made.image[..], &made.map, *steps).is_ok());
        let with = least(&made).expect("enough");
        assert!(find(&made).is_some(), "{layout:?}");
        let last = memchr::memmem::rfind(&made.image, b"\x0219990").expect("a name");
        made.image[last - 1] = 0;
        let without = least(&made).expect("enough");
        assert!(find(&made).is_none(), "{layout:?}");
        assert!(without <= 4 * with, "{layout:?}: {without} steps, {with} with a result");
    }
}

/// Digits by the thousand, each within a table of tokens that is read for each of them.
#[test]
fn a_search_ends_at_its_limit() {
    let mut image = Vec::new();
    for _ in 0..3000 {
        image.extend(DIGITS);
        image.resize(image.len() + 4096, b'x');
    }
    let (steps, start) = (1 << 20, Instant::now());
    let error = search(&image[..], &ImageMap::default(), steps).err().expect("too much work");
    assert!(matches!(error, SearchError::Steps(limit) if limit == steps), "{error}");
    assert!(error.to_string().contains("1048576 steps"), "{error}");
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 40).expect("sparse");
    let sparse = search(&file, &ImageMap::default(), steps);
    assert!(matches!(sparse, Err(SearchError::Steps(_))), "a file of a terabyte is not read to its end");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn what_is_damaged_or_missing_is_no_table() {
    assert!(find_raw(&[]).is_none());
    assert!(find_raw(&[0; 10_000]).is_none());
    for layout in [LINUX_5_10, LINUX_7_0] {
        let mut made = image(layout, COUNT, 4096);
        let whole = made.image.clone();
        // What is behind the addresses is not read.
        let behind = if layout.side == Side::BehindTokens { 100 + 3 * COUNT + 8 } else { 108 };
        for cut in (0..whole.len() - behind).step_by(997) {
            made.image = whole[..cut].to_vec();
            assert!(find(&made).is_none(), "{layout:?} cut at {cut}");
        }
    }
}

proptest! {
    #[test]
    fn tables_of_any_size_and_place_are_read(
        layout in proptest::sample::select(layouts()), count in 500_usize..3000, before in 0_usize..20_000,
    ) {
        assert_found(layout, &image(layout, count, before));
    }

    #[test]
    fn any_damage_is_survived(
        layout in proptest::sample::select(layouts()), place in 0_usize..40_000, byte: u8, length in 1_usize..64,
    ) {
        let mut made = image(layout, COUNT, 4096);
        let place = place.min(made.image.len() - length);
        made.image[place..place + length].fill(byte);
        if let Some(found) = find(&made) {
            for address in &made.addresses {
                let _ = found.resolve(*address);
            }
            let _ = found.address("sys_read");
        }
    }
}
