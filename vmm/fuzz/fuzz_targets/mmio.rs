//! A hostile driver on the registers of virtio-mmio, with the block device behind them: any access at any width, in
//! any order, and kicks in between. The memory that its rings and requests lie in is written by it, too.

#![no_main]

use std::sync::Arc;

use cella_vmm::device::GuestMemory;
use cella_vmm::device::block::Block;
use cella_vmm::device::rng::Rng;
use cella_vmm::device::testing::MockWatcher;
use cella_vmm::machine::bus::BusDevice;
use cella_vmm::transport::Transport;
use cella_vmm::transport::mmio::MmioTransport;
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

const MEMORY: usize = 1 << 20;
const SECTORS: u64 = 64;
const STATUS: u64 = 0x70;
/// Registers that set a queue up, and what a good driver writes there.
const SET_UP: [(u64, u32); 9] = [
    (0x30, 0),
    (0x38, 16),
    (0x80, 0x1000),
    (0x84, 0),
    (0x90, 0x2000),
    (0x94, 0),
    (0xa0, 0x3000),
    (0xa4, 0),
    (0x44, 1),
];

fn read(transport: &MmioTransport, register: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(register, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &MmioTransport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}

/// What a good driver does.
fn bring_up(transport: &MmioTransport) {
    write(transport, STATUS, 1);
    write(transport, STATUS, 3);
    for half in 0..2 {
        write(transport, 0x14, half);
        let offered = read(transport, 0x10);
        write(transport, 0x24, half);
        write(transport, 0x20, offered);
    }
    write(transport, STATUS, 11);
    for (register, value) in SET_UP {
        write(transport, register, value);
    }
    write(transport, STATUS, 15);
}

fn step(transport: &MmioTransport, memory: &GuestMemory, input: &mut Input<'_>) {
    let kind = input.byte();
    let offset = match kind & 1 {
        0 => u64::from(input.byte() % 0x48) * 4,
        _ => u64::from(input.word() % 0x1000),
    };
    match kind >> 1 & 7 {
        0 => {
            let width = [1, 2, 4, 8][usize::from(kind >> 6)];
            transport.read(offset, &mut [0; 8][..width]);
        }
        1 => {
            let len = usize::from(kind >> 5) + 1;
            let data = input.take(len).to_vec();
            transport.write(offset, &data);
        }
        2 => bring_up(transport),
        3 => transport.kick(usize::from(kind >> 6)),
        4 => write(transport, STATUS, u32::from(input.byte())),
        5 => {
            // Rings and requests: anything at all, near where a good driver has them.
            let at = 0x1000 + u64::from(input.byte()) * 64;
            let len = usize::from(input.byte());
            let data = input.take(len).to_vec();
            memory
                .memory()
                .write_slice(&data, GuestAddress(at))
                .unwrap();
        }
        _ => {
            let value = input.word();
            write(transport, offset, value);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let ranges = [(GuestAddress(0), MEMORY)];
    let memory = GuestMemory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let device: Box<dyn cella_vmm::device::Device> = match input.byte() & 1 {
        0 => {
            let image = tempfile::tempfile().unwrap();
            image.set_len(SECTORS * 512).unwrap();
            Box::new(Block::new(image, false, "fuzz").unwrap())
        }
        _ => Box::new(Rng::new()),
    };
    let watcher = Arc::new(MockWatcher::default());
    let transport = MmioTransport::new("fuzz", device, memory.clone(), watcher).unwrap();
    while !input.is_empty() {
        step(&transport, &memory, &mut input);
        let status = read(&transport, STATUS);
        for (bit, before) in [(2, 1), (8, 2), (4, 8)] {
            assert!(status & bit == 0 || status & before != 0, "{status:#x}");
        }
        // Registers that never change.
        assert_eq!(read(&transport, 0), u32::from_le_bytes(*b"virt"));
        assert_eq!(read(&transport, 4), 2);
    }
    transport.shut_down();
    assert_eq!(read(&transport, STATUS), 0);
});
