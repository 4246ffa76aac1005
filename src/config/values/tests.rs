use super::*;
use proptest::prelude::*;

#[test]
fn sizes() {
    assert_eq!(parse_size("512M"), Ok(512 << 20));
    assert_eq!(parse_size("5g"), Ok(5 << 30));
    assert_eq!(parse_size("64KiB"), Ok(65536));
    for bad in ["", "M", "1.5G", "-1", "1X", "99999999999T", " 1"] {
        assert_eq!(parse_size(bad), Err(ValueError::Size(bad.into())));
    }
}

#[test]
fn times() {
    assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
    assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
    assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
    assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
    for bad in ["", "0", "s", "-1s", "1d", "1e9999", "inf"] {
        assert_eq!(parse_duration(bad), Err(ValueError::Time(bad.into())));
    }
}

#[test]
fn memory() {
    let memory = Memory::parse("1G,hugepages=2M,prefault=on").expect("valid");
    assert_eq!(memory, Memory { bytes: 1 << 30, pages: Pages::Huge2M, prefault: true });
    assert_eq!(Memory::parse("16M").expect("valid").bytes, 16 << 20);
    assert_eq!(Memory::parse("1M"), Err(ValueError::MemorySize(1 << 20)));
    assert!(Memory::parse("16777217").is_err());
    assert!(Memory::parse("1G,hugepages=4M").expect_err("no").to_string().contains("2M, 1G"));
    assert!(Memory::parse("1G,huge=on").expect_err("no").to_string().contains("hugepages"));
}

#[test]
fn cpus() {
    let spread = |text: &str| Cpus::parse(text).map(|c| (c.sockets, c.cores, c.threads));
    assert_eq!(spread("4"), Ok((1, 4, 1)));
    assert_eq!(spread("4,sockets=1,cores=2,threads=2"), Ok((1, 2, 2)));
    assert_eq!(spread("8,threads=2"), Ok((1, 4, 2)));
    assert_eq!(spread("8,cores=2"), Ok((4, 2, 1)));
    assert_eq!(spread("sockets=2,cores=3"), Ok((2, 3, 1)));
    assert_eq!(spread("64"), Ok((1, 64, 1)));
    assert!(matches!(spread("4,cores=3"), Err(ValueError::Topology { .. })));
    for bad in ["0", "100000", "x", "", "4,cores=0"] {
        assert!(matches!(spread(bad), Err(ValueError::Cpus(_))), "{bad}");
    }
    assert!(matches!(spread("sockets=100,cores=100"), Err(ValueError::Cpus(_))));
}

#[test]
fn serial_ports() {
    let parse = |list: &[&str]| parse_serial(&list.iter().map(|&s| s.to_owned()).collect::<Vec<_>>(), false);
    assert_eq!(parse(&[]).expect("default")[0], Some(ConsoleTarget::Stdio));
    let two = parse(&["2=file:a=b.log"]).expect("two");
    assert_eq!(two[1], Some(ConsoleTarget::File("a=b.log".into())));
    assert_eq!(parse(&["none"]).expect("none"), [None, None, None, None]);
    for bad in ["0=stdio", "5=stdio", "1=", "1", "1=file:", "x=null"] {
        assert!(parse(&[bad]).is_err(), "{bad}");
    }
    assert_eq!(parse(&["3=stdio"]).expect_err("both").1, ValueError::TwoOnStdio(1, 3));
    assert_eq!(parse(&["1=null", "3=stdio"]).expect("moved")[2], Some(ConsoleTarget::Stdio));
}

proptest! {
    #[test]
    fn any_text_is_survived(text in ".*") {
        let _ = parse_size(&text);
        let _ = parse_duration(&text);
        let _ = Memory::parse(&text);
        let _ = Cpus::parse(&text);
        let _ = parse_serial(&[text], false);
    }

    #[test]
    fn accepted_cpus_multiply_to_what_was_asked(n in 1_u32..300, c in 1_u32..20, t in 1_u32..5) {
        if let Ok(cpus) = Cpus::parse(&format!("{n},cores={c},threads={t}")) {
            prop_assert_eq!(cpus.count(), n);
            prop_assert_eq!((cpus.cores, cpus.threads), (c, t));
        }
    }
}
