//! A guest and host programs that send any vsock packets and bytes in any order.

use super::Source;
use crate::virtio::features::F_VERSION_1;
use crate::virtio::mock::Driver;
use crate::virtio::vsock;
use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

const CID: u32 = 3;
const HOST_CID: u32 = 2;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// The host has programs that listen on these ports, and the guest uses one more.
const PORTS: u8 = 2;
/// How long a packet is waited for: a device that needs a reset takes none.
const PATIENCE: Duration = Duration::from_millis(2);

/// The programs of the host.
struct Host<'a> {
    folder: &'a Path,
    listeners: Vec<UnixListener>,
    sockets: Vec<UnixStream>,
}

impl<'a> Host<'a> {
    fn new(folder: &'a Path) -> io::Result<Self> {
        let mut listeners = Vec::new();
        for port in 0..PORTS {
            let path = folder.join(format!("vsock_{port}"));
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            listeners.push(listener);
        }
        Ok(Self { folder, listeners, sockets: Vec::new() })
    }

    fn step(&mut self, source: &mut Source<'_>) -> io::Result<()> {
        let chosen = usize::from(source.byte());
        match source.byte() % 5 {
            0 => {
                let accepted = self.listeners.iter().filter_map(|listener| listener.accept().ok());
                self.sockets.extend(accepted.map(|(socket, _)| socket));
            }
            1 => {
                let socket = UnixStream::connect(self.folder.join("vsock"))?;
                let line = format!("CONNECT {}\n", source.byte() % 4);
                let _ = (&socket).write(&line.as_bytes()[..line.len() - usize::from(source.byte().is_multiple_of(4))]);
                self.sockets.push(socket);
            }
            2 if !self.sockets.is_empty() => drop(self.sockets.remove(chosen % self.sockets.len())),
            action => {
                let count = self.sockets.len().max(1);
                if let Some(mut socket) = self.sockets.get(chosen % count) {
                    socket.set_nonblocking(true)?;
                    let _ = if action == 3 {
                        socket.write(&vec![source.byte(); usize::from(source.short())])
                    } else {
                        socket.read(&mut vec![0; usize::from(source.short())])
                    };
                }
            }
        }
        Ok(())
    }
}

/// A packet's header (virtio 1.3, 5.10.6) for `bytes` bytes of data: its fields are mostly valid.
fn header(source: &mut Source<'_>, bytes: u32) -> Vec<u8> {
    let odd = source.byte();
    let mut unless = |bit: u8, right: u32| if odd & 1 << bit == 0 { right } else { source.word() };
    let (guest, host) = (unless(0, CID), unless(1, HOST_CID));
    let (len, kind) = (unless(2, bytes), unless(3, 1));
    let flags = unless(4, 3);
    let fields = [source.byte() % 4, source.byte() % 4, source.byte() % 9];
    let (window, counter) = (u32::from(source.short()) << 6, u32::from(source.byte()));
    let mut header = Vec::with_capacity(44);
    header.extend(u64::from(guest).to_le_bytes());
    header.extend(u64::from(host).to_le_bytes());
    header.extend(u32::from(fields[0]).to_le_bytes());
    header.extend(u32::from(fields[1]).to_le_bytes());
    header.extend(len.to_le_bytes());
    header.extend(kind.to_le_bytes().into_iter().take(2));
    header.extend(u16::from(fields[2]).to_le_bytes());
    header.extend(flags.to_le_bytes());
    header.extend(window.to_le_bytes());
    header.extend(counter.to_le_bytes());
    header
}

/// Sends the packets that the input chooses, while the host's programs do what it chooses. Afterwards the device must be able to
/// start after a reset. `folder` is for the sockets.
///
/// # Errors
/// Returns an error where the sockets cannot be made.
///
/// # Panics
/// Panics where the device does not start again.
pub fn send_packets(bytes: &[u8], folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut source = Source(bytes);
    let mut host = Host::new(folder)?;
    let mut driver = Driver::running(Box::new(vsock::mock::device(CID, &folder.join("vsock"))?));
    while !source.0.is_empty() {
        match source.byte() % 4 {
            0 => host.step(&mut source)?,
            1 => drop(driver.submit(RECEIVE, &[], &[u32::from(source.short()) % 8192])),
            _ => {
                let data = vec![source.byte(); usize::from(source.byte()) * 16];
                let header = header(&mut source, u32::try_from(data.len())?);
                driver.submit(TRANSMIT, &[&header, &data], &[]);
                let start = Instant::now();
                while driver.poll_used(TRANSMIT).is_none() && start.elapsed() < PATIENCE {
                    std::thread::yield_now();
                }
                while driver.poll_used(RECEIVE).is_some() {}
            }
        }
    }
    driver.start(F_VERSION_1);
    assert_eq!(driver.status(), 15, "a reset and a start");
    Ok(())
}
