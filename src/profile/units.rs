//! Numbers and units, as text for people and as floating-point numbers.

use std::time::Duration;

/// Converts a count to a floating-point number, exact up to 2^53.
pub(super) fn float(value: u64) -> f64 {
    Duration::from_nanos(value).as_secs_f64() * 1e9
}

/// Converts nanoseconds to seconds.
pub(super) fn seconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64()
}

/// Converts nanoseconds to milliseconds.
pub(super) fn milliseconds(ns: u64) -> f64 {
    seconds(ns) * 1e3
}

/// Converts nanoseconds to microseconds.
pub(super) fn microseconds(ns: u64) -> f64 {
    seconds(ns) * 1e6
}

/// Formats a time with its unit, in 8 columns at most.
pub(super) fn time(ns: u64) -> String {
    let (divisor, unit) = match ns {
        0..1_000 => return format!("{ns} ns"),
        1_000..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let tenths = u128::from(ns) * 10 / divisor;
    if tenths < 1000 { format!("{}.{} {unit}", tenths / 10, tenths % 10) } else { format!("{} {unit}", tenths / 10) }
}

/// Formats a part of a whole as a percentage with one decimal; "-" where the whole is 0.
pub(super) fn share(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    let tenths = (u128::from(part) * 1000 + u128::from(whole) / 2) / u128::from(whole);
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// Formats a number with commas between thousands.
pub(super) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_for_people() {
        assert_eq!((number(999), number(1_234_567)), ("999".into(), "1,234,567".into()));
        assert_eq!(
            (time(12), time(1_500), time(123_456_789), time(u64::MAX)),
            ("12 ns".into(), "1.5 µs".into(), "123 ms".into(), "18446744073 s".into())
        );
        assert_eq!((share(1, 3), share(0, 0)), ("33.3 %".into(), "-".into()));
        assert!((float(1 << 53) - 9_007_199_254_740_992.0).abs() < 2.0);
        assert!((milliseconds(1_500_000) - 1.5).abs() < 1e-9 && (microseconds(1_500) - 1.5).abs() < 1e-9);
    }
}
