//! A hostile guest on the file system device. The mock's guard pages end the run if the device touches memory
//! outside of the guest; after each run nothing may have changed beside the shared directory.

#![no_main]

use std::os::unix::fs::symlink;
use std::sync::Once;

use cella_vmm::device::fs::Fs;
use cella_vmm::device::testing::MockDriver;
use cella_vmm::device::{Device, SnapshotStep};
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;

const HIPRIO: usize = 0;
const REQUEST: usize = 1;
const STEPS: usize = 24;
const NAMES: [&str; 12] = [
    "f", "d", "l", "new", "other", "..", ".", "", "../x", "/x", "d/f", "f\0d",
];

// No file grows past a megabyte: a guest's fallocate must not fill the disk of the machine that fuzzes.
fn limit_files() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let limit = libc::rlimit {
            rlim_cur: 1 << 20,
            rlim_max: 1 << 20,
        };
        // SAFETY: the limit lives through the call; ignoring a signal runs no handler.
        unsafe {
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        }
    });
}

fn header(len: u32, opcode: u32, node: u64, ids: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [len, opcode, 1, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(node.to_le_bytes());
    for word in [ids, ids, 1, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

// A request with small numbers in its fields and names that mean something, or anything at all.
fn request(input: &mut Input<'_>) -> Vec<u8> {
    let form = input.byte();
    let opcode = u32::from(input.byte() % 56);
    let node = u64::from(input.byte() % 8);
    let mut body = Vec::new();
    if form & 1 == 0 {
        let len = usize::from(input.byte());
        body.extend(input.take(len));
    } else {
        let words = input.byte() % 16;
        for _ in 0..words {
            body.extend(u32::from(input.byte()).to_le_bytes());
        }
        for _ in 0..form >> 1 & 3 {
            let name = NAMES[usize::from(input.byte()) % NAMES.len()];
            body.extend(name.as_bytes());
            body.push(0);
        }
    }
    let len = match form >> 4 {
        1 => u32::from(input.byte()) << 13,
        2 => u32::from(input.byte()),
        _ => 40 + body.len() as u32,
    };
    let ids = if form & 8 == 0 { 0 } else { 1000 };
    [header(len, opcode, node, ids), body].concat()
}

fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for word in [7_u32, 33, 0, !(1 << 30)] {
        body.extend(word.to_le_bytes());
    }
    [header(56, 26, 0, 0), body].concat()
}

// What the device saves of itself, with some bytes changed; or anything at all.
fn state(driver: &mut MockDriver<Fs>, input: &mut Input<'_>) -> Vec<u8> {
    let form = input.byte();
    if form & 1 == 0 {
        let len = usize::from(input.byte());
        return input.take(len).to_vec();
    }
    let mut own = Vec::new();
    let _ = driver.device.snapshot(SnapshotStep::Save(&mut own));
    for _ in 0..form >> 5 {
        let at = usize::from(input.byte());
        if let Some(byte) = own.get_mut(at) {
            *byte = input.byte();
        }
    }
    own
}

fn step(driver: &mut MockDriver<Fs>, input: &mut Input<'_>) -> bool {
    let queue = match input.byte() {
        255 => HIPRIO,
        254 => {
            let len = usize::from(input.byte());
            let bytes = input.take(len).to_vec();
            driver.scribble(REQUEST, &bytes);
            return driver.kick(REQUEST).is_ok();
        }
        253 => {
            let own = state(driver, input);
            // What is refused leaves the device as it was.
            let _ = driver.device.snapshot(SnapshotStep::Restore(&own));
            return driver.kick(REQUEST).is_ok();
        }
        _ => REQUEST,
    };
    let bytes = request(input);
    let room = u32::from(input.byte()) * 32;
    let cut = usize::from(input.byte()).min(bytes.len() - 1);
    driver.free_all();
    driver.request(queue, &[&bytes[..cut], &bytes[cut..]], &[room / 3, room]);
    driver.kick(queue).is_ok()
}

fuzz_target!(|data: &[u8]| {
    limit_files();
    let outer = tempfile::tempdir().unwrap();
    let share = outer.path().join("share");
    std::fs::create_dir_all(share.join("d")).unwrap();
    std::fs::write(share.join("f"), b"content").unwrap();
    std::fs::write(outer.path().join("secret"), b"secret").unwrap();
    symlink("../secret", share.join("l")).unwrap();

    let mut driver = MockDriver::new(Fs::new("share", &share).unwrap());
    driver.request(REQUEST, &[&init()], &[16, 64]);
    driver.kick(REQUEST).unwrap();
    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        if !step(&mut driver, &mut input) {
            driver.device.reset().unwrap();
            let features = driver.device.features();
            driver.activate(features).unwrap();
        }
        for queue in [HIPRIO, REQUEST] {
            let _ = driver.used(queue);
        }
    }
    let mut names: Vec<_> = std::fs::read_dir(outer.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["secret", "share"], "something was made outside");
    let secret = std::fs::read(outer.path().join("secret")).unwrap();
    assert_eq!(secret, b"secret");
});
