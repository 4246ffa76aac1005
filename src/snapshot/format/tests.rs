use super::*;
use crate::config::Transport;
use crate::kvm::state::{Counter, Msr};
use crate::snapshot::description::{
    DiskDescription, ImageFormat, NetDescription, RngDescription, ShareDescription, SocketsDescription,
};
use hwvmm_arch::boot::{BootMethod, Decompressor, EntryProtocol};
use hwvmm_devices::irq::IrqLine;
use hwvmm_devices::legacy::SerialPort;
use hwvmm_devices::memory::Memory;
use hwvmm_devices::pci::{MsiMessage, MsiRouter, MsiVector, PciRoot, RouteError};
use hwvmm_devices::virtio::pci::PciDevice;
use hwvmm_devices::virtio::rng::Rng;
use hwvmm_devices::virtio::{
    BusState, DeviceState, FileContent, FileId, NodePlace, PortPair, PortState, PortsState, QueueState, RingAddresses,
    ShareHandle, ShareNode, ShareState, VirtioTransport as _, VsockState,
};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::SystemTime;
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

fn uart() -> UartState {
    let event = || Arc::new(EventFd::new(0).expect("eventfd"));
    SerialPort::new(IrqLine::new(event()), Box::new(std::io::sink()), event()).save()
}

fn counter(value: u64) -> Counter {
    Counter { value, at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) }
}

fn state() -> State {
    let vcpu = |id| {
        let mut vcpu = VcpuState::empty(id);
        vcpu.msrs = vec![Msr { index: 0x6e0, value: 7 }];
        vcpu.tsc = Some(counter(1 << 40));
        vcpu.tsc_khz = Some(2_000_000);
        vcpu
    };
    State {
        description: Description {
            hwvmm: "0.1.0".into(),
            state_version: STATE_VERSION,
            memory_bytes: 16 << 20,
            cpus: [1, 2, 1],
            uarts: vec![1],
            watchdog: true,
            debug_exit: false,
            irqchip: crate::snapshot::Irqchip::Split,
            transport: Transport::Pci,
            register_pages: true,
            disks: Vec::new(),
            nets: Vec::new(),
            sockets: None,
            shares: Vec::new(),
            balloon: false,
            rng: Some(RngDescription { bytes_per_second: None }),
            virtio_console: false,
            agent: None,
            boot: BootMethod { decompressor: Decompressor::None, protocol: EntryProtocol::Multiboot },
            vmgenid: true,
            cpu_vendor: "AuthenticAMD".into(),
            cpu_features: vec!["sse3".into()],
        },
        vcpus: vec![vcpu(0), vcpu(1)],
        vm: VmState { clock: counter(12), chips: None },
        io_apic: None,
        uarts: vec![uart()],
        watchdog: Some(Duration::from_secs(9)),
        post: 0x42,
        pci: pci(),
        virtio: vec![virtio()],
    }
}

fn pci() -> PciState {
    let root = PciRoot::default();
    PciState { address: 0x8000_0800, bridges: [root.save_bridge(), root.save_bridge()] }
}

struct NoRoutes;

impl MsiRouter for NoRoutes {
    fn route(&self, _gsi: u32, _message: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn unroute(&self, _gsi: u32) -> Result<(), RouteError> {
        Ok(())
    }
}

/// The state of an entropy device on PCI that a driver has told of its queue.
fn virtio() -> VirtioState {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let memory = Memory::new(memory, Arc::new(()));
    let rng = Box::new(Rng::new(None).expect("a timer"));
    let vector = |gsi| MsiVector { gsi, event: Arc::new(EventFd::new(0).expect("eventfd")) };
    let vectors = vec![vector(24), vector(25)];
    let device = PciDevice::new("rng", rng, memory, 0xc000_0000, vectors, Arc::new(NoRoutes)).expect("a device");
    let mut state = device.save().expect("a state");
    (state.status, state.driver_features) = (15, 1 << 32);
    let rings = RingAddresses { descriptor_table: 0x1000, available_ring: 0x2000, used_ring: 0x3000 };
    state.queues[0] = QueueState { size: 64, ready: true, rings, next_available: 65530, next_used: 65529 };
    state
}

#[test]
fn a_state_is_read_back() {
    let bytes = encode(&state()).expect("encoded");
    let read = decode(&bytes).expect("valid");
    assert_eq!((read.description.clone(), read.post, read.watchdog), (state().description, 0x42, state().watchdog));
    assert_eq!((read.vcpus[1].tsc, read.vcpus[1].id, read.vm.clock), (Some(counter(1 << 40)), 1, counter(12)));
    assert_eq!(encode(&read).expect("encoded"), bytes);
}

/// The state of a device of the virtio device ID `kind` on virtio-mmio, whose driver has set its `queues`.
fn connected(kind: u16, queues: usize, size: u16, device: DeviceState) -> VirtioState {
    let queue = |index: u64| {
        let base = index * 0x1_0000;
        let rings = RingAddresses { descriptor_table: base, available_ring: base + 0x4000, used_ring: base + 0x8000 };
        QueueState { size, ready: true, rings, next_available: 0, next_used: 0 }
    };
    VirtioState {
        kind,
        queues: (0..).map(queue).take(queues).collect(),
        device,
        bus: BusState::Mmio { interrupt_status: 0 },
        ..virtio()
    }
}

/// A machine with what connects a command to the host.
fn with_command() -> State {
    let mut state = state();
    state.description.rng = None;
    state.description.sockets = Some(SocketsDescription::Vsock { cid: 3 });
    state.description.shares =
        ["hwvmm-root", "x"].map(|tag| ShareDescription { tag: tag.into(), path: "/".into() }).into();
    let file = |inode, kind| FileId { device: 0xfe00, inode, kind, link_made_ns: 0 };
    let node = |number, parent, name: &str, kind| {
        let place = (parent > 0).then(|| NodePlace { parent, name: name.into() });
        ShareNode { number, lookups: 3, file: file(number, kind), place }
    };
    let share = ShareState {
        has_attributes: true,
        root: file(2, libc::S_IFDIR),
        nodes: vec![
            node(10, 1, "a", libc::S_IFDIR),
            node(1 << 47 | 11, 10, "b", libc::S_IFDIR),
            node(12, 1, "file", libc::S_IFREG),
            node(13, 0, "", libc::S_IFLNK),
        ],
        handles: vec![ShareHandle {
            number: 4,
            node: 12,
            flags: 0,
            content: FileContent { bytes: 7, modified: (1_700_000_000, 5) },
        }],
    };
    let port = PortState { is_open: true, is_told: true, has_ended: false };
    let ports = PortsState { is_ready: true, introductions: 2, ports: vec![port; 4] };
    let vsock = VsockState { cid: 3, unanswered: vec![PortPair { host: 77, guest: 1000 }] };
    state.virtio = vec![
        connected(19, 3, 256, DeviceState::Vsock(vsock)),
        connected(26, 2, 512, DeviceState::Share(share)),
        connected(3, 10, 16, DeviceState::Ports(ports)),
    ];
    state
}

/// The samples that the fuzz target starts from are of this version.
#[test]
fn the_corpus_has_states_of_this_version() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/snapshot_state");
    for (name, state) in [("two-vcpus", state()), ("command", with_command())] {
        let path = folder.join(name);
        if std::env::var_os("HWVMM_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&folder).expect("made");
            std::fs::write(&path, encode(&state).expect("encoded")).expect("written");
        }
        let read = decode(&std::fs::read(path).expect("readable"))
            .expect("of this version: HWVMM_WRITE_CORPUS=1 writes it anew");
        assert_eq!((&read.description, &read.virtio), (&state.description, &state.virtio));
    }
}

#[test]
fn every_shorter_file_is_an_error() {
    let bytes = encode(&state()).expect("encoded");
    for end in 0..bytes.len() {
        assert!(decode(&bytes[..end]).is_err(), "{end} bytes");
    }
    let longer = [&bytes[..], b"x"].concat();
    assert!(matches!(decode(&longer), Err(FormatError::Length { .. })));
    assert!(matches!(decode(&vec![0; MAX_STATE_BYTES + 1]), Err(FormatError::TooLong)));
}

#[test]
fn every_changed_bit_is_an_error() {
    let bytes = encode(&state()).expect("encoded");
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        assert!(decode(&changed).is_err(), "byte {at}");
    }
}

/// The file with another payload, and its checksum.
fn with_payload(payload: &[u8]) -> Vec<u8> {
    let header = MAGIC.into_iter().chain(STATE_VERSION.to_le_bytes()).chain(crc32fast::hash(payload).to_le_bytes());
    header.chain((payload.len() as u64).to_le_bytes()).chain(payload.iter().copied()).collect()
}

#[test]
fn contradictions_are_refused() {
    let refused = |change: &dyn Fn(&mut State)| {
        let mut state = state();
        change(&mut state);
        assert!(matches!(decode(&encode(&state).expect("encoded")), Err(FormatError::Contradiction(_))));
    };
    refused(&|state| drop(state.vcpus.pop()));
    refused(&|state| state.description.cpus = [1, 1, 0]);
    refused(&|state| state.description.cpus = [u32::MAX; 3]);
    refused(&|state| state.description.memory_bytes = (16 << 20) + 1);
    refused(&|state| state.description.memory_bytes = 1 << 63);
    refused(&|state| state.description.uarts = vec![5]);
    refused(&|state| state.description.uarts = vec![1, 1]);
    refused(&|state| state.uarts.clear());
    refused(&|state| state.description.watchdog = false);
    refused(&|state| state.watchdog = Some(Duration::from_secs(61)));
    refused(&|state| state.description.irqchip = crate::snapshot::Irqchip::Kernel);
    refused(&|state| state.virtio.clear());
    refused(&|state| state.description.rng = None);
    refused(&|state| state.description.rng = Some(RngDescription { bytes_per_second: Some(0) }));
    refused(&|state| state.virtio[0].queues = vec![state.virtio[0].queues[0]; MAX_QUEUES + 1]);
    let disk = |queues, bytes| DiskDescription {
        id: "x".repeat(bytes),
        path: String::new(),
        format: ImageFormat::Raw,
        read_only: false,
        queues,
        serial: String::new(),
    };
    let with_disks = |state: &mut State, disks: Vec<DiskDescription>| {
        (state.description.rng, state.virtio) = (None, vec![virtio(); disks.len()]);
        state.description.disks = disks;
    };
    refused(&|state| with_disks(state, vec![disk(0, 1)]));
    refused(&|state| with_disks(state, vec![disk(17, 1)]));
    refused(&|state| with_disks(state, vec![disk(1, 10_000)]));
    refused(&|state| with_disks(state, vec![disk(1, 1); 32]));
    refused(&|state| {
        let net = NetDescription { mac: String::new(), queues: 0, tap: false };
        state.description.nets = vec![net];
        state.virtio = vec![virtio(); 2];
    });
    refused(&|state| state.description.balloon = true);
    let share = |tag: &str| ShareDescription { tag: tag.into(), path: String::new() };
    let with_shares = |state: &mut State, tags: &[&str]| {
        (state.description.rng, state.virtio) = (None, vec![virtio(); tags.len()]);
        state.description.shares = tags.iter().map(|tag| share(tag)).collect();
    };
    for tags in [&["a", "a"][..], &[""], &["a\x1b"], &["1234567890123456789012345678901234567"], &["a"; 32]] {
        refused(&|state| with_shares(state, tags));
    }
    refused(&|state| state.description.sockets = Some(SocketsDescription::Ports));
    refused(&|state| {
        (state.description.rng, state.description.sockets) = (None, Some(SocketsDescription::Vsock { cid: 2 }));
    });
    refused(&|state| state.vcpus[0].msrs = vec![Msr { index: 0, value: 0 }; MAX_ITEMS + 1]);
    let mut version = encode(&state()).expect("encoded");
    version[8] = 9;
    let error = decode(&version).expect_err("refused").to_string();
    assert!(error.contains(&format!("version 9, and this hwvmm reads version {STATE_VERSION}")), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    /// With a right checksum, too, no payload makes it panic or take much memory.
    #[test]
    fn any_payload_is_survived(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), end in any::<prop::sample::Index>()
    ) {
        let state = if changes.len() % 2 == 0 { state() } else { with_command() };
        let mut payload = encode(&state).expect("encoded").split_off(HEADER);
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        let _ = decode(&with_payload(&payload));
        payload.truncate(end.index(payload.len()));
        let _ = decode(&with_payload(&payload));
    }
}
