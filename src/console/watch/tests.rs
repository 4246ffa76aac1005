//! Tests of the lines that end a run: at times that the tests choose.

use super::*;
use proptest::prelude::*;

fn watch(pattern: Option<&str>) -> (Watch, Announcements) {
    let announcements = Announcements::default();
    let pattern = pattern.map(|p| Regex::new(p).expect("valid"));
    (Watch::new(pattern, announcements.clone()), announcements)
}

fn seen(text: &str) -> EndReason {
    EndReason::Seen(text.into())
}

/// The verdict on a whole output, fed in these pieces, for a guest that ends with `end`.
fn verdict<'a>(pattern: &str, pieces: impl IntoIterator<Item = &'a [u8]>, end: EndReason) -> EndReason {
    let (watch, announcements) = watch(Some(pattern));
    for piece in pieces {
        if let Fed::End(end) = watch.feed(piece) {
            return end;
        }
    }
    watch.finish(&end);
    announcements.explain(end)
}

#[test]
fn a_line_that_goes_on_does_not_end() {
    for pattern in ["fail=1$", r"fail=1\b", "^23", "^1", r"\b23"] {
        let (watch, _) = watch(Some(pattern));
        assert_eq!(watch.feed(b"tests: fail=1"), Fed::LineBegan);
        assert_eq!(watch.feed(b"23"), Fed::Nothing);
        assert_eq!(watch.feed(b"\r\n"), Fed::Nothing, "{pattern}");
    }
}

#[test]
fn a_line_has_an_end_with_and_without_a_carriage_return() {
    for line in ["all done\n", "all done\r\n", "all done\r", "\x1b[32mall done\x1b[0m\r\n", "\0all done\0\n"] {
        let (watch, _) = watch(Some("^all done$"));
        assert_eq!(watch.feed(line.as_bytes()), Fed::End(seen("all done")), "{line:?}");
    }
}

#[test]
fn a_prompt_is_seen_when_nothing_follows_for_a_while() {
    let (watch, _) = watch(Some("log[i]n: $"));
    let start = Instant::now();
    assert_eq!(watch.feed_at(b"Debian\r\nhost \x1b[1mlo", start), Fed::LineBegan);
    let last = start + QUIET / 2;
    assert_eq!(watch.feed_at(b"gin: \x1b[0m", last), Fed::Nothing, "the line is looked at already");
    assert_eq!(watch.look(start + QUIET), Look::Again(last + QUIET));
    assert_eq!(watch.look(last + QUIET), Look::End(seen("login: ")));
    let start = last + QUIET;
    assert_eq!(watch.feed_at(b"root", start), Fed::LineBegan, "the line is not looked at any more");
    assert_eq!(watch.look(start), Look::Again(start + QUIET));
    assert_eq!(watch.look(start + QUIET), Look::NoLine);
}

#[test]
fn a_line_that_ends_is_not_looked_at_again() {
    let (watch, _) = watch(Some("x$"));
    assert_eq!(watch.look(Instant::now()), Look::NoLine);
    assert_eq!(watch.feed(b"fail=1"), Fed::LineBegan);
    assert_eq!(watch.feed(b"23\n"), Fed::Nothing);
    assert_eq!(watch.look(Instant::now() + 2 * QUIET), Look::NoLine);
    assert_eq!(watch.feed(b"next"), Fed::LineBegan);
}

#[test]
fn a_slow_host_is_no_quiet_guest() {
    let (watch, _) = watch(Some("fail=1$"));
    let mut now = Instant::now();
    watch.feed_at(b"fail=1", now);
    now += 2 * QUIET;
    for _ in 0..MAX_AGAIN {
        let Look::Again(next) = watch.look(now) else { panic!("too late to be sure") };
        now = next + 2 * MAX_LATENESS;
    }
    assert_eq!(watch.look(now), Look::End(seen("fail=1")), "not put off for ever");
    // Output that is being written, here or on another console, may be followed by more.
    watch.feed_at(b"x\nfail=1", now);
    let writing = watch.writing();
    let Look::Again(next) = watch.look(now + QUIET) else { panic!("it is written to") };
    drop(writing);
    assert_eq!(watch.look(next), Look::End(seen("fail=1")));
}

#[test]
fn held_output_is_waited_for() {
    let (watch, _) = watch(Some("fail=1$"));
    let start = Instant::now();
    watch.note_flush(start);
    watch.feed_at(b"fail=1", start);
    // The thread that flushes waits for a processor.
    let due = start + QUIET;
    let Look::Flush(next) = watch.look(due) else { panic!("there may be held output") };
    let Look::Flush(next) = watch.look(next) else { panic!("still") };
    watch.feed_at(b"2", next);
    watch.note_flush(next);
    assert_eq!(watch.look(next), Look::Again(next + QUIET), "the guest has gone on");
    let due = next + QUIET;
    watch.note_flush(due - Duration::from_millis(1));
    assert!(matches!(watch.look(due), Look::Flush(_)), "it may have gone on since");
    watch.feed_at(b"3\nfail=1", due);
    let due = due + QUIET;
    watch.note_flush(due);
    assert_eq!(watch.look(due), Look::End(seen("fail=1")));
}

#[test]
fn output_of_another_console_puts_a_look_off() {
    let (watch, announcements) = watch(Some("fail=1$"));
    let other = Watch::new(Some(Regex::new("fail=1$").expect("valid")), announcements);
    let start = Instant::now();
    watch.feed_at(b"fail=1", start);
    let last = start + QUIET / 2;
    assert_eq!(other.feed_at(b"log\n", last), Fed::Nothing);
    assert_eq!(watch.look(start + QUIET), Look::Again(last + QUIET), "the other console was not quiet");
    assert_eq!(other.look(last + QUIET), Look::NoLine);
    assert_eq!(watch.look(last + QUIET), Look::End(seen("fail=1")));
}

#[test]
fn a_line_without_an_end_counts_where_the_guest_ended_in_an_orderly_way() {
    assert_eq!(verdict("done$", [&b"all done"[..]], EndReason::PowerOff), seen("done"));
    assert_eq!(verdict("done$", [&b"all done"[..]], EndReason::TripleFault), EndReason::TripleFault);
    let late = EndReason::TimedOut(Duration::from_secs(1));
    assert_eq!(verdict("done$", [&b"all done"[..]], late.clone()), late, "it may have gone on");
}

#[test]
fn a_line_that_is_read_after_the_end_was_written_before_it() {
    let (watch, announcements) = watch(Some("^done$"));
    assert_eq!(announcements.explain(EndReason::PowerOff), EndReason::PowerOff);
    assert_eq!(watch.feed(b"done\n"), Fed::End(seen("done")));
    assert_eq!(announcements.explain(EndReason::PowerOff), seen("done"));
    assert_eq!(announcements.explain(EndReason::Quit), EndReason::Quit);
}

#[test]
fn the_first_line_that_ends_the_run_counts() {
    let (watch, announcements) = watch(Some("^done$"));
    let panicked = EndReason::Panicked(None);
    assert_eq!(watch.feed(b"---[ end Kernel panic - not syncing\n"), Fed::End(panicked.clone()));
    watch.feed(b"done\n");
    assert_eq!(announcements.explain(panicked.clone()), panicked);
}

#[test]
fn bytes_that_are_not_utf8_match_as_themselves_and_as_a_replacement() {
    for pattern in ["^a.*b$", r"a(?-u:\xff)b", "a\u{fffd}b"] {
        let end = verdict(pattern, [&b"a\xffb\n"[..]], EndReason::PowerOff);
        assert!(matches!(end, EndReason::Seen(_)), "{pattern}: {end:?}");
    }
}

#[test]
fn a_match_in_a_long_line_does_not_depend_on_what_was_dropped() {
    use super::super::lines::LINE_BYTES;
    let long = |end: &str, more: &str| {
        let mut line = vec![b'.'; LINE_BYTES - end.len()];
        line.extend(end.bytes().chain(more.bytes()));
        line.push(b'\n');
        line
    };
    let of = |pattern: &str, line: Vec<u8>| verdict(pattern, [&line[..]], EndReason::Quit) != EndReason::Quit;
    for pattern in ["fail=1$", r"fail=1\b", r"fail=1\B"] {
        assert!(!of(pattern, long("fail=1", "23")), "{pattern}");
    }
    assert!(of("fail=1", long("fail=1", "23")) && of("=1.*", long("fail=1", "23")));
    assert!(of("fail=1$", long("fail=1", "")) && !of("fail=123", long("fail=1", "23")));
}

#[test]
fn a_pattern_does_not_reach_over_lines() {
    assert_eq!(verdict("ab", [&b"a\nb\n"[..]], EndReason::Quit), EndReason::Quit);
    assert_eq!(verdict(r"(?s)a.*b", [&b"a\r\nb\n"[..]], EndReason::Quit), EndReason::Quit);
}

#[test]
fn a_panic_explains_the_reset_that_follows() {
    let (watch, announcements) = watch(None);
    assert_eq!(watch.feed(b"[    1.234567][    T1] Kernel panic - not syncing: VFS: Unable\r\n"), Fed::Nothing);
    assert_eq!(announcements.explain(EndReason::Reset), EndReason::Panicked(Some("VFS: Unable".into())));
    assert_eq!(announcements.explain(EndReason::PowerOff), EndReason::PowerOff);
    let end = watch.feed(b"[    2.0] ---[ end Kernel panic - not syncing: VFS: Unable ]---\n");
    assert_eq!(end, Fed::End(EndReason::Panicked(Some("VFS: Unable".into()))));
}

#[test]
fn what_is_kept_of_the_output_has_no_escape_sequences_and_is_short() {
    let (watch, announcements) = watch(Some("lo[^$]*gin"));
    let end = watch.feed(b"lo\x1b[2J\xc2\x9bgin\n");
    assert_eq!(end, Fed::End(seen("lo\\u{9b}gin")));
    watch.feed(b"Kernel panic - not syncing: \x1b]0;owned\x07 \x08\xe2\x80\xae");
    watch.feed(&[b'x'; 4000]);
    watch.feed(b"\n");
    let panic = announcements.panic().expect("a panic");
    assert!(panic.starts_with(r"\x08\u{202e}xxx"), "{panic}");
    assert!(panic.len() < GUEST_BYTES + 40, "{panic}");
}

#[test]
fn talk_about_panics_is_not_a_panic() {
    let (watch, announcements) = watch(None);
    watch.feed(b"echo Kernel panic - not syncing\n");
    assert_eq!(announcements.explain(EndReason::Reset), EndReason::Reset);
}

#[test]
fn an_announced_halt_is_a_shutdown() {
    let (watch, announcements) = watch(None);
    assert_eq!(announcements.explain(EndReason::Halted), EndReason::Halted);
    watch.feed(b"[    3.1] reboot: System halted\n");
    assert_eq!(announcements.explain(EndReason::Halted), EndReason::SystemHalted);
}

proptest! {
    #[test]
    fn pieces_make_no_difference(
        output in "(fail=1|23|done|login: |\r\n|\n|\r|\x1b\\[1m|\x1b|\x00|\\[|é| ){0,30}",
        pattern in prop_oneof![
            Just("fail=1$"), Just("^done$"), Just(r"done\b"), Just("^$"), Just("login: $"), Just("."), Just("^[^ ]*$")
        ],
        cuts in proptest::collection::vec(0_usize..200, 0..30),
    ) {
        let output = output.as_bytes();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(output.len())).collect();
        cuts.extend([0, output.len()]);
        cuts.sort_unstable();
        let pieces = cuts.windows(2).map(|pair| &output[pair[0]..pair[1]]);
        let end = EndReason::PowerOff;
        prop_assert_eq!(verdict(pattern, pieces, end.clone()), verdict(pattern, [output], end));
    }
}
