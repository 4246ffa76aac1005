//! The state of the UART for a snapshot.

use super::receiver::{Receiver, ReceiverState};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::SerialState;

/// The registers of a UART, and the input in its FIFO.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UartState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Bytes that were sent in loopback mode.
    looped: Vec<u8>,
    receiver: ReceiverState,
    /// The last access was a byte of output.
    pub(super) in_output: bool,
}

/// A state that no UART can have.
#[derive(Debug, Error)]
pub enum UartStateError {
    /// The receive side.
    #[error("the state of a UART's receiver is none that it can have")]
    Receiver,
    /// vm-superio refuses the registers.
    #[error("the state of a UART cannot be used: {0}")]
    Model(String),
}

impl UartState {
    pub(super) fn new(model: &SerialState, receiver: &Receiver, in_output: bool) -> Self {
        Self {
            divisor: [model.baud_divisor_low, model.baud_divisor_high],
            interrupt_enable: model.interrupt_enable,
            interrupt_identification: model.interrupt_identification,
            line_control: model.line_control,
            line_status: model.line_status,
            modem_control: model.modem_control,
            modem_status: model.modem_status,
            scratch: model.scratch,
            looped: model.in_buffer.clone(),
            receiver: receiver.save(),
            in_output,
        }
    }

    pub(super) fn receiver(&self) -> Result<Receiver, UartStateError> {
        Receiver::restore(&self.receiver).ok_or(UartStateError::Receiver)
    }

    pub(super) fn model(&self) -> SerialState {
        let [baud_divisor_low, baud_divisor_high] = self.divisor;
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.looped.clone(),
        }
    }
}
