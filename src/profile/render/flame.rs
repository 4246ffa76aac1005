//! Flame graphs: sort of exit, reason, device or register, function, instruction.

use super::error::RenderError;
use crate::escape::is_active;
use crate::profile::data::{Cause, Profile};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// A frame's name: what separates frames and counts must not be in it.
fn frame(text: &str) -> String {
    text.chars().map(|c| if c == ';' || is_active(c) { '_' } else { c }).collect()
}

fn stack(sort: &str, cause: &Cause) -> String {
    let mut frames = vec![sort.to_owned(), frame(&cause.reason)];
    let what = cause.what();
    if !what.is_empty() {
        frames.push(frame(&what));
    }
    frames.push(frame(&cause.function()));
    if cause.function.is_some() && cause.offset.is_some() {
        frames.push(frame(&cause.place()));
    }
    frames.join(";")
}

/// Lines of `frame;frame;frame count`.
pub(super) fn folded(profile: &Profile) -> String {
    let mut stacks: BTreeMap<String, u64> = BTreeMap::new();
    let mut add = |sort: &str, causes: &[Cause]| {
        for cause in causes {
            let count = stacks.entry(stack(sort, cause)).or_default();
            *count = count.saturating_add(cause.count);
        }
    };
    // A userspace exit is a VM exit too: where VM exits are known, they are the whole.
    match &profile.vm_exits {
        Some(exits) => add("VM exits", &exits.causes),
        None => add("userspace exits", &profile.userspace_exits.causes),
    }
    stacks.iter().fold(String::new(), |mut out, (stack, count)| {
        let _ = writeln!(out, "{stack} {count}");
        out
    })
}

/// Renders the flame graph as SVG.
pub(super) fn svg(profile: &Profile) -> Result<String, RenderError> {
    let folded = folded(profile);
    if folded.is_empty() {
        return Err(RenderError::NoExits);
    }
    let mut options = inferno::flamegraph::Options::default();
    options.title = "Exits: reason, device or register, function, instruction".into();
    options.count_name = "exits".into();
    options.deterministic = true;
    options.text_truncate_direction = inferno::flamegraph::TextTruncateDirection::Right;
    options.colors = inferno::flamegraph::color::Palette::Basic(inferno::flamegraph::color::BasicPalette::Hot);
    let mut svg = Vec::new();
    inferno::flamegraph::from_lines(&mut options, folded.lines(), &mut svg).map_err(RenderError::Flame)?;
    Ok(String::from_utf8_lossy(&svg).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    #[test]
    fn stacks_go_from_reason_to_instruction() {
        let mut profile = sample();
        assert_eq!(folded(&profile), "VM exits;CPUID;leaf 0x40000000;io_serial_out;io_serial_out+0x16 300\n");
        profile.vm_exits = None;
        profile.userspace_exits.causes[0].function = Some("a;b".into());
        let text = folded(&profile);
        assert_eq!(text, "userspace exits;pio_out;UART 1 0x3f8 write;a_b;a_b+0x16 300\n");
        assert!(svg(&profile).expect("a graph").contains("UART 1 0x3f8 write"));
        profile.userspace_exits.causes.clear();
        assert!(svg(&profile).is_err());
    }
}
