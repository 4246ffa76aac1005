//! The transport of virtio devices, where none is given.

use super::command::RootChoice;
use super::devices::Transport;
use super::options::RunOptions;

impl RunOptions {
    /// Returns the transport that was given, or the one that makes the fewest exits in a usual run.
    pub(super) fn transport(&self) -> Transport {
        let few_requests = self.disk.is_empty()
            && self.seed.is_none()
            && self.kernel_from.is_none()
            && self.net.is_empty()
            && self.share.is_empty()
            && self.vsock.is_none();
        // What a command works on is in a folder that it can write to: then there are many requests.
        let only_reads = self.rw.is_empty() && !matches!(self.root, Some(RootChoice::Image(_)));
        let is_command = !self.command.is_empty();
        self.transport.unwrap_or(match few_requests {
            true if is_command && only_reads => Transport::ByKernel,
            true if !is_command => Transport::Mmio,
            _ => Transport::Pci,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_writes_to_folders_has_the_bus_for_many_requests() {
        let of = |text: &str| {
            let options: RunOptions = toml::from_str(&format!("kernel = 'k'\ncommand = ['a']\n{text}")).expect("TOML");
            options.into_config().expect("valid").transport
        };
        assert_eq!([of(""), of("root = 'none'")], [Transport::ByKernel; 2]);
        for text in ["rw = ['/tmp']", "disk = ['d']", "share = ['tag=a,path=b']", "transport = 'pci'"] {
            assert_eq!(of(text), Transport::Pci, "{text}");
        }
        assert_eq!(of("transport = 'mmio'"), Transport::Mmio);
    }
}
