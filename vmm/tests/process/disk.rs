//! A driver of a few instructions uses the block device of a jailed process: every kind of request passes the filters.
//!
//! The rings and requests are laid out by the test in the guest's memory, which it holds too; the guest only sets the
//! device up and kicks it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use cella_proto::vmm::{Start, Stop, request::Call};

use crate::configure::Given;
use crate::kernel::elf;
use crate::vmm::{Vmm, alone, fds};

const DESCRIPTORS: u64 = 0x190_0000;
const AVAILABLE: u64 = 0x190_1000;
const USED: u64 = 0x190_2000;
const REQUESTS: u64 = 0x191_0000;
const REQUEST_BYTES: u64 = 0x1000;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;

/// The block device is the third: its registers are at 0xd000_2000.
fn driver() -> &'static [u8] {
    guest! {
        "mov ebx, 0xd0002000",
        "mov dword ptr [rbx + 0x70], 1", "mov dword ptr [rbx + 0x70], 3",
        // VERSION_1; FLUSH, DISCARD and WRITE_ZEROES.
        "mov dword ptr [rbx + 0x24], 1", "mov dword ptr [rbx + 0x20], 1",
        "mov dword ptr [rbx + 0x24], 0", "mov dword ptr [rbx + 0x20], 0x6200",
        "mov dword ptr [rbx + 0x70], 11",
        "mov dword ptr [rbx + 0x30], 0", "mov dword ptr [rbx + 0x38], 32",
        "mov dword ptr [rbx + 0x80], 0x1900000", "mov dword ptr [rbx + 0x90], 0x1901000",
        "mov dword ptr [rbx + 0xa0], 0x1902000", "mov dword ptr [rbx + 0x44], 1",
        "mov dword ptr [rbx + 0x70], 15",
        "mov dword ptr [rbx + 0x50], 0",
        "2: hlt", "jmp 2b",
    }
}

/// A request: its type, its sector, and its data, which the device reads or fills.
struct Asked {
    kind: u32,
    sector: u64,
    data: Vec<u8>,
    filled: bool,
}

fn asked(kind: u32, sector: u64, data: &[u8], filled: bool) -> Asked {
    Asked {
        kind,
        sector,
        data: data.to_vec(),
        filled,
    }
}

/// Sectors from `sector` on, for a discard or write-zeroes request.
fn range(sector: u64, sectors: u32, unmap: u32) -> Vec<u8> {
    let words = [sectors.to_le_bytes(), unmap.to_le_bytes()].concat();
    [sector.to_le_bytes().to_vec(), words].concat()
}

/// Where request `index` has its data; its header is 16 bytes before, its status byte at the end of its page.
fn data_at(index: usize) -> u64 {
    REQUESTS + index as u64 * REQUEST_BYTES + 16
}

fn status_at(index: usize) -> u64 {
    REQUESTS + (index as u64 + 1) * REQUEST_BYTES - 1
}

/// Lays the requests out, each a chain of at most three descriptors.
fn offer(memory: &File, requests: &[Asked]) {
    let mut ring = vec![0, 0];
    ring.extend((requests.len() as u16).to_le_bytes());
    for (index, request) in requests.iter().enumerate() {
        let mut header = request.kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(request.sector.to_le_bytes());
        memory.write_all_at(&header, data_at(index) - 16).unwrap();
        memory.write_all_at(&request.data, data_at(index)).unwrap();
        memory.write_all_at(&[0xff], status_at(index)).unwrap();
        let data_flags = if request.filled { WRITABLE } else { 0 };
        let chain = [
            (data_at(index) - 16, 16, 0),
            (data_at(index), request.data.len() as u32, data_flags),
            (status_at(index), 1, WRITABLE),
        ];
        let chain: Vec<_> = chain.into_iter().filter(|(_, len, _)| *len > 0).collect();
        let first = index as u16 * 3;
        for (place, (address, len, flags)) in (0..).zip(&chain) {
            let last = usize::from(place) + 1 == chain.len();
            let flags = flags | if last { 0 } else { NEXT };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(flags.to_le_bytes());
            descriptor.extend((first + place + 1).to_le_bytes());
            let at = DESCRIPTORS + u64::from(first + place) * 16;
            memory.write_all_at(&descriptor, at).unwrap();
        }
        ring.extend(first.to_le_bytes());
    }
    memory.write_all_at(&ring, AVAILABLE).unwrap();
}

/// The boot page tables end at one GiB: adds the device window.
fn map_devices(memory: &File) {
    memory
        .write_all_at(&0x50_0003_u64.to_le_bytes(), 0xa000 + 3 * 8)
        .unwrap();
    let window = 0xd000_0083_u64.to_le_bytes();
    memory.write_all_at(&window, 0x50_0000 + 128 * 8).unwrap();
}

fn used(memory: &File) -> u16 {
    let mut index = [0; 2];
    memory.read_exact_at(&mut index, USED + 2).unwrap();
    u16::from_le_bytes(index)
}

#[test]
fn every_request_of_a_disk_passes_the_filters() {
    let _alone = alone();
    let Some(mut vmm) = Vmm::start() else { return };
    let Some(mut given) = Given::new(elf(driver(), 0x1000)) else {
        return;
    };
    given.add_devices(vmm.sockets.path(), 64);
    let memory = File::from(given.files[1].try_clone().unwrap());
    let image = File::from(given.files.last().unwrap().try_clone().unwrap());
    image.write_all_at(&[0x77; 64 * 512], 0).unwrap();
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    let requests = [
        asked(1, 1, &[0x5a; 512], false),
        asked(4, 0, &[], false),
        asked(0, 1, &[0; 512], true),
        asked(11, 0, &range(8, 8, 0), false),
        asked(13, 0, &range(16, 8, 0), false),
        asked(13, 0, &range(24, 8, 1), false),
        asked(8, 0, &[0; 20], true),
        // Past the end: refused, and nothing else happens.
        asked(1, 64, &[0x5a; 512], false),
    ];
    offer(&memory, &requests);
    map_devices(&memory);
    vmm.done(Call::Start(Start::default()), &[]);
    let end = Instant::now() + Duration::from_secs(10);
    while used(&memory) < requests.len() as u16 {
        assert!(
            Instant::now() < end,
            "{} done; {}",
            used(&memory),
            vmm.log()
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    let read = |file: &File, at: u64, len: usize| {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    };
    let status: Vec<u8> = (0..requests.len())
        .map(|index| read(&memory, status_at(index), 1)[0])
        .collect();
    assert_eq!(status, [0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(read(&memory, data_at(2), 512), [0x5a; 512]);
    assert_eq!(read(&memory, data_at(6), 7), b"a disk\0");
    assert_eq!(read(&image, 512, 512), [0x5a; 512]);
    assert_eq!(read(&image, 16 * 512, 16 * 512), [0; 16 * 512]);
    assert_eq!(read(&image, 32 * 512, 32 * 512), [0x77; 32 * 512]);
    vmm.done(Call::Stop(Stop::default()), &[]);
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
    assert_eq!(vmm.log(), "");
}
