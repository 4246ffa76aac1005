//! The transport of virtio devices, where none is given.

use super::command::AgentTask;
use super::devices::Transport;
use super::options::RunOptions;

impl RunOptions {
    /// Returns the transport that was given, or the one that makes the fewest exits in a usual run.
    pub(super) fn transport(&self) -> Transport {
        // A command may move much through its streams and its root.
        let few_requests = self.task() == AgentTask::None
            && self.disk.is_empty()
            && self.seed.is_none()
            && self.kernel_from.is_none()
            && self.net.is_empty()
            && self.share.is_empty()
            && self.vsock.is_none();
        self.transport.unwrap_or(if few_requests { Transport::Mmio } else { Transport::Pci })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_many_requests_is_on_pci() {
        let of = |text: &str| {
            let options: RunOptions = toml::from_str(&format!("kernel = 'k'\n{text}")).expect("TOML");
            options.into_config().expect("valid").transport
        };
        for text in ["command = ['a']", "command = ['a']\nroot = 'none'", "disk = ['d']", "share = ['tag=a,path=b']"] {
            assert_eq!(of(text), Transport::Pci, "{text}");
        }
        for text in ["", "rng = true", "command = ['a']\ntransport = 'mmio'"] {
            assert_eq!(of(text), Transport::Mmio, "{text}");
        }
    }
}
