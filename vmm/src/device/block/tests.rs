//! Requests of a driver that knows the device, of one that does not, and of one that means harm.

mod hostile;

use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::device::testing::{Buffer, MockDriver};

const SECTORS: u64 = 64;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A disk whose byte at `n` is `pattern(n)`, its file, and a driver.
struct Disk {
    driver: MockDriver<Block>,
    file: File,
}

fn pattern(at: u64) -> u8 {
    (at / SECTOR * 7 + at % 251) as u8
}

impl Disk {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(read_only: bool) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..SECTORS * SECTOR).map(pattern).collect();
        file.write_all(&bytes).unwrap();
        let device = Block::new(file.try_clone().unwrap(), read_only, "serial-1").unwrap();
        Self {
            driver: MockDriver::new(device),
            file,
        }
    }

    /// Sends one request, its status apart; returns the status, the used length and the data.
    fn request(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32, Vec<u8>) {
        let header = header(kind, sector);
        let room: Vec<u32> = if room > 0 { vec![room, 1] } else { vec![1] };
        let readable: Vec<&[u8]> = match data {
            [] => vec![&header],
            data => vec![&header, data],
        };
        let (head, buffers) = self.driver.request(0, &readable, &room);
        for buffer in &buffers {
            self.driver
                .write(buffer.address, &vec![0xee; buffer.len as usize]);
        }
        self.driver.kick(0).unwrap();
        let used = self.driver.used(0);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].head, head);
        let status = self.driver.read(buffers.last().unwrap().address, 1)[0];
        let data = match buffers.as_slice() {
            [data, _] => self.driver.read(data.address, data.len as usize),
            _ => Vec::new(),
        };
        (status, used[0].len, data)
    }

    fn on_disk(&self, from: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, from).unwrap();
        bytes
    }

    fn unchanged(&self) -> bool {
        (0..)
            .zip(self.on_disk(0, (SECTORS * SECTOR) as usize))
            .all(|(at, byte)| byte == pattern(at))
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn range(sector: u64, count: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&count.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

#[test]
fn images_of_odd_sizes_and_long_serials_are_refused() {
    let file = tempfile::tempfile().unwrap();
    let make = |len, serial| {
        file.set_len(len).unwrap();
        Block::new(file.try_clone().unwrap(), true, serial)
    };
    assert!(matches!(make(0, ""), Err(BlockError::Sectors(0))));
    assert!(matches!(make(513, ""), Err(BlockError::Sectors(513))));
    assert!(matches!(
        make(512, "twenty-one characters"),
        Err(BlockError::Serial(_))
    ));
    assert!(make(512, "of twenty characters").is_ok());
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    assert!(matches!(
        Block::new(pipe.into(), true, ""),
        Err(BlockError::Size(_))
    ));
}

#[test]
fn the_configuration_space_says_what_the_disk_can() {
    let disk = Disk::new();
    let device = &disk.driver.device;
    let word = |at| {
        let mut bytes = [0xaa; 4];
        device.read_config(at, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    assert_eq!((word(0), word(4)), (SECTORS as u32, 0));
    assert_eq!(word(12), 126);
    assert_eq!(word(20), 512);
    assert_eq!([word(36), word(40), word(44)], [1 << 21, 16, 1]);
    assert_eq!([word(48), word(52), word(56)], [1 << 21, 16, 1]);
    assert_eq!([word(60), word(58), word(u64::MAX)], [0, 0, 0]);
    let writable = device.features();
    let read_only = Disk::with(true).driver.device.features();
    assert_eq!(writable & 1 << VIRTIO_BLK_F_RO, 0);
    assert_ne!(read_only & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(
        read_only & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES),
        0
    );
}

#[test]
fn what_is_written_is_read() {
    let mut disk = Disk::new();
    let (status, used, data) = disk.request(IN, 3, &[], 1024);
    assert_eq!((status, used), (OK, 1025));
    assert!(
        (3 * SECTOR..)
            .zip(data)
            .all(|(at, byte)| byte == pattern(at))
    );
    let (status, used, _) = disk.request(OUT, 62, &[0x5a; 1024], 0);
    assert_eq!((status, used), (OK, 1));
    assert_eq!(disk.on_disk(62 * SECTOR, 1024), [0x5a; 1024]);
    assert_eq!(
        disk.on_disk(61 * SECTOR, 512)[511],
        pattern(62 * SECTOR - 1)
    );
    assert_eq!(disk.request(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(disk.request(IN, 63, &[], 512).2, [0x5a; 512]);
}

#[test]
fn framing_is_the_drivers_choice() {
    let mut disk = Disk::new();
    // Header in three pieces with an empty one between, data next to it, status at the end of the data's buffer.
    let header = header(OUT, 10);
    let (head, buffers) = disk.driver.request(
        0,
        &[
            &header[..5],
            &[],
            &header[5..15],
            &[&header[15..], &[7; 500]].concat(),
            &[8; 12],
        ],
        &[1],
    );
    disk.driver.kick(0).unwrap();
    assert_eq!(disk.driver.used(0)[0].head, head);
    assert_eq!(disk.driver.read(buffers[0].address, 1), [OK]);
    assert_eq!(
        disk.on_disk(10 * SECTOR, 512),
        [[7; 500].as_slice(), &[8; 12]].concat()
    );
    let (_, buffers) = disk
        .driver
        .request(0, &[&self::header(IN, 20)], &[100, 0, 412 + 512 + 1]);
    disk.driver.kick(0).unwrap();
    assert_eq!(disk.driver.used(0)[0].len, 1025);
    let second = disk.driver.read(buffers[2].address, 925);
    assert_eq!(second[924], OK);
    assert!(
        (20 * SECTOR + 100..)
            .zip(&second[..924])
            .all(|(at, &byte)| byte == pattern(at))
    );
}

#[test]
fn what_lies_beyond_the_disk_is_not_touched() {
    let mut disk = Disk::new();
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / SECTOR, 1 << 55] {
        let (status, used, data) = disk.request(IN, sector, &[], 1024);
        assert_eq!((status, used), (IOERR, 1), "{sector}");
        assert_eq!(data, [0xee; 1024]);
        assert_eq!(
            disk.request(OUT, sector, &[1; 1024], 0).0,
            IOERR,
            "{sector}"
        );
    }
    assert_eq!(disk.request(IN, 0, &[], 100).0, IOERR, "no whole sectors");
    assert_eq!(
        disk.request(OUT, 0, &[1; 511], 0).0,
        IOERR,
        "no whole sectors"
    );
    assert!(disk.unchanged());
    assert_eq!(disk.file.metadata().unwrap().size(), SECTORS * SECTOR);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut disk = Disk::with(true);
    assert_eq!(disk.request(OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(disk.request(DISCARD, 0, &range(0, 1, 0), 0).0, IOERR);
    assert_eq!(disk.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, IOERR);
    assert_eq!(disk.request(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(disk.request(IN, 0, &[], 512).0, OK);
    assert!(disk.unchanged());
}

#[test]
fn ranges_are_zeroed_and_given_back() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let mut disk = Disk::new();
        let payload = [
            range(8, 16, flags),
            range(40, 1, flags),
            range(50, 0, flags),
        ]
        .concat();
        assert_eq!(disk.request(kind, 0, &payload, 0).0, OK, "{kind} {flags}");
        let after = disk.on_disk(0, (SECTORS * SECTOR) as usize);
        for (at, byte) in (0..).zip(after) {
            let zeroed = (8..24).contains(&(at / SECTOR)) || at / SECTOR == 40;
            assert_eq!(
                byte,
                if zeroed { 0 } else { pattern(at) },
                "{kind} {flags} at {at}"
            );
        }
        assert_eq!(disk.file.metadata().unwrap().size(), SECTORS * SECTOR);
    }
}

#[test]
fn ranges_that_cannot_be_change_nothing() {
    let mut disk = Disk::new();
    let many = range(0, 1, 0).repeat(17);
    for (payload, expected) in [
        (&range(0, 1, 2)[..], UNSUPP),
        (&range(SECTORS, 1, 0), IOERR),
        (&range(SECTORS - 1, 2, 0), IOERR),
        (&range(u64::MAX, 1, 0), IOERR),
        (&range(0, (1 << 21) + 1, 0), IOERR),
        (&range(0, 1, 0)[..15], IOERR),
        (&many, IOERR),
        (&[], IOERR),
    ] {
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(
                disk.request(kind, 0, payload, 0).0,
                expected,
                "{kind} {payload:?}"
            );
        }
    }
    assert_eq!(
        disk.request(DISCARD, 0, &range(0, 1, 1), 0).0,
        UNSUPP,
        "unmap is for the other"
    );
    assert!(disk.unchanged());
}

#[test]
fn the_id_is_the_serial_number() {
    let mut disk = Disk::new();
    let (status, used, id) = disk.request(GET_ID, 0, &[], 20);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(id, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    let (status, used, id) = disk.request(GET_ID, 0, &[], 4);
    assert_eq!((status, used, id.as_slice()), (OK, 5, b"seri".as_slice()));
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut disk = Disk::new();
    for kind in [2, 3, 14, 16, u32::MAX] {
        assert_eq!(disk.request(kind, 0, &[1; 512], 512).0, UNSUPP, "{kind}");
    }
    assert!(disk.unchanged());
}

#[test]
fn an_image_that_somebody_truncates_is_an_error_of_the_request() {
    let mut disk = Disk::new();
    disk.file.set_len(10 * SECTOR).unwrap();
    assert_eq!(disk.request(IN, 9, &[], 1024).0, IOERR);
    assert_eq!(disk.request(IN, 9, &[], 512).0, OK);
}

#[test]
fn many_requests_are_answered_by_one_kick_and_one_interrupt() {
    let mut disk = Disk::new();
    let mut expected = Vec::new();
    for sector in 0..20 {
        expected.push(disk.driver.request(0, &[&header(IN, sector)], &[512, 1]).0);
    }
    disk.driver.kick(0).unwrap();
    let heads: Vec<u16> = disk.driver.used(0).iter().map(|used| used.head).collect();
    assert_eq!(heads, expected);
    assert_eq!(disk.driver.interrupt.queue_count(0), 1);
}

#[test]
fn a_device_is_reset_and_used_again() {
    let mut disk = Disk::new();
    let features = disk.driver.device.features();
    assert!(matches!(
        disk.driver.activate(features),
        Err(DeviceError::State(_))
    ));
    assert!(disk.driver.device.reset().is_some());
    assert!(disk.driver.device.reset().is_none());
    assert!(matches!(disk.driver.kick(0), Err(DeviceError::State(_))));
    disk.driver.activate(features).unwrap();
    assert_eq!(disk.request(IN, 0, &[], 512).0, OK);
}
