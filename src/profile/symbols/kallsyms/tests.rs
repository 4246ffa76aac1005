use super::*;

/// How a kernel's version lays the tables out.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// Up to 6.1: addresses first; per-CPU symbols by themselves.
    Before,
    /// 6.2 to 6.4: one table more before the tokens.
    BeforeWithSequences,
    /// Since 6.5: addresses behind the tokens.
    Behind,
    /// Since 6.15: no per-CPU symbols by themselves.
    BehindPlain,
}

const LAYOUTS: [Layout; 4] = [Layout::Before, Layout::BeforeWithSequences, Layout::Behind, Layout::BehindPlain];
const BASE: u64 = 0xffff_ffff_8100_0000;
const COUNT: usize = 1500;

fn pad(image: &mut Vec<u8>) {
    image.resize(align(image.len(), 8), 0);
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

/// The compressed names, and the offset of every 256th of them.
fn names() -> (Vec<u8>, Vec<u8>) {
    let (mut names, mut markers) = (Vec::new(), Vec::new());
    for number in 0..COUNT {
        if number % 256 == 0 {
            markers.extend(u32::try_from(names.len()).expect("small").to_le_bytes());
        }
        let mut name = vec![2];
        if number == 900 {
            name = b"T\x01read".to_vec();
        } else {
            name.extend(number.to_string().bytes());
        }
        if number == 700 {
            name.extend([b'y'; 130]);
        }
        match u8::try_from(name.len()) {
            Ok(length @ 0..0x80) => names.push(length),
            _ => names.extend([u8::try_from(name.len() & 0x7f).expect("small") | 0x80, 1]),
        }
        names.extend(name);
    }
    pad(&mut names);
    pad(&mut markers);
    (names, markers)
}

/// An image with `COUNT` symbols, 64 bytes apart; number 700 has a name of 130 tokens.
fn image(layout: Layout) -> Vec<u8> {
    let percpu = if layout == Layout::BehindPlain { 0 } else { 3 };
    let mut offsets = Vec::new();
    for number in 0..COUNT {
        let offset = u32::try_from((number.saturating_sub(percpu)) * 64).expect("small");
        let value = match (layout, number < percpu) {
            (Layout::BehindPlain, _) => offset,
            (_, true) => u32::try_from(number * 8).expect("small"),
            (_, false) => (-1 - i32::try_from(offset).expect("small")).cast_unsigned(),
        };
        offsets.extend(value.to_le_bytes());
    }
    pad(&mut offsets);
    offsets.extend(BASE.to_le_bytes());

    let (names, markers) = names();
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for token in tokens() {
        index.extend(u16::try_from(table.len()).expect("small").to_le_bytes());
        table.extend(&token);
        table.push(0);
    }
    pad(&mut table);

    // Something before, with digits in it that are no table.
    let mut image = b"\x7fELF 0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0 and more".to_vec();
    image.resize(4096, 0xcc);
    if matches!(layout, Layout::Before | Layout::BeforeWithSequences) {
        image.extend(&offsets);
    }
    image.extend(u64::try_from(COUNT).expect("small").to_le_bytes());
    image.extend(names);
    image.extend(markers);
    if layout == Layout::BeforeWithSequences {
        image.extend(vec![7; COUNT * 3]);
        pad(&mut image);
    }
    image.extend(table);
    image.extend(index);
    if matches!(layout, Layout::Behind | Layout::BehindPlain) {
        image.extend(offsets);
    }
    image.extend([0xcc; 100]);
    image
}

#[test]
fn all_layouts_are_read() {
    for layout in LAYOUTS {
        let found = Kallsyms::find(&image(layout)).unwrap_or_else(|| panic!("{layout:?}"));
        let first = if layout == Layout::BehindPlain { 0 } else { 3 };
        let at = |number: usize| BASE + 64 * u64::try_from(number - first).expect("small");
        assert_eq!(found.len(), COUNT);
        assert_eq!(found.resolve(at(42) + 63), Some(("function_42".into(), at(42))), "{layout:?}");
        assert_eq!(found.resolve(at(900)), Some(("sys_read".into(), at(900))), "{layout:?}");
        let (long, _) = found.resolve(at(700)).expect("a long name");
        assert_eq!(long.len(), "function_700".len() + 130);
        assert_eq!((found.address("sys_read"), found.address("function_1499")), (Some(at(900)), Some(at(1499))));
        assert_eq!((found.address("sys_rea"), found.address("sys_reads")), (None, None));
        assert_eq!(found.resolve(0).is_some(), first == 3, "a per-CPU symbol lies at 0");
    }
}

#[test]
fn tables_are_found_in_a_large_file_wherever_they_are() {
    use std::io::Write;
    for before in [0, CHUNK - 4096 - 40_000, 5 * CHUNK + 8] {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&vec![0xcc; before]).expect("written");
        file.write_all(&image(Layout::Behind)).expect("written");
        let found = Kallsyms::read(&file).expect("readable").expect("tables");
        assert_eq!(found.len(), COUNT);
    }
    assert!(Kallsyms::read(&tempfile::tempfile().expect("a file")).expect("readable").is_none());
}

#[test]
fn what_is_damaged_or_missing_is_no_table() {
    assert!(Kallsyms::find(&[]).is_none());
    assert!(Kallsyms::find(&[0; 10_000]).is_none());
    let whole = image(Layout::Before);
    for cut in (0..whole.len()).step_by(997) {
        assert!(Kallsyms::find(&whole[..cut]).is_none(), "cut at {cut}");
    }
}

proptest::proptest! {
    #[test]
    fn any_damage_is_survived(place in 0_usize..20_000, byte: u8, length in 1_usize..64) {
        let mut image = image(Layout::Behind);
        let place = place.min(image.len() - length);
        image[place..place + length].fill(byte);
        if let Some(found) = Kallsyms::find(&image) {
            for number in 0..COUNT {
                let _ = found.resolve(BASE + 64 * u64::try_from(number).expect("small"));
            }
            let _ = found.address("sys_read");
        }
    }
}
