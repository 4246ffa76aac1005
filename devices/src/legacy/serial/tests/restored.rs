//! A UART that goes on from a snapshot.

use super::*;

#[test]
fn a_restored_uart_goes_on_with_registers_and_input() {
    let old = Guest::new();
    for (register, value) in [(LCR, 0x83), (0, 12), (1, 1), (LCR, 3), (2, 0xc7), (1, 5), (MCR, 0x0b), (7, 0x5a)] {
        old.set(register, value);
    }
    let input = pattern(40);
    assert_eq!(old.port.enqueue(&input).expect("taken"), 40);
    assert_eq!(old.register(0), input[0]);
    let state = old.port.save();
    let mut new = Guest::new();
    new.port.restore(&state).expect("valid");
    assert_eq!(new.port.save(), state);
    assert!(new.line.read().is_ok(), "the driver has interrupts on, and none may be lost");
    assert!(new.wanted.read().is_ok(), "the host's input goes on");
    for register in [1, LCR, MCR, 7] {
        assert_eq!(new.register(register), old.register(register), "register {register}");
    }
    assert_eq!(new.register(2), 0xc4, "the trigger level of 14 bytes");
    new.handle_interrupt(Habit::Drain, 14);
    assert_eq!(new.read, input[1..]);
    assert_eq!(new.port.enqueue(b"more").expect("taken"), 4);
    // One with interrupts off is not interrupted.
    let quiet = Guest::new();
    quiet.port.restore(&Guest::new().port.save()).expect("valid");
    assert!(quiet.line.read().is_err());
}

#[test]
fn a_state_that_no_uart_has_is_refused() {
    let valid = serde_json::to_value(Guest::new().port.save()).expect("JSON");
    for (name, value) in [
        ("fifo", serde_json::json!(vec![0_u8; FIFO_BYTES + 1])),
        ("interrupt_enable", 0x10.into()),
        ("trigger", 3.into()),
    ] {
        let mut state = valid.clone();
        state["receiver"][name] = value;
        let state = serde_json::from_value(state).expect("a state");
        assert!(Guest::new().port.restore(&state).is_err(), "{name}");
    }
    let mut state = valid;
    state["looped"] = serde_json::json!(vec![0_u8; 1000]);
    assert!(Guest::new().port.restore(&serde_json::from_value(state).expect("a state")).is_err());
}
