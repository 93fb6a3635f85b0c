//! The guest of `peers`: measures the vsock and virtiofs devices that it finds, whoever serves them, as process 1 of a
//! guest with nothing else in it. It reports by vsock, and ends the machine.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support"
)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::Instant;

use cella_tests::peers::{
    ECHO, FILES, MESSAGE, MIB, REPORT, ROUND_TRIPS, ROUNDS, SINK, SOURCE, TAG, WRITTEN, large,
};

/// Bytes written at once. A stock vhost-device-vsock takes no packet of several pieces, which larger ones become.
const WRITE: usize = 16 << 10;
const READ: usize = 64 << 10;
const SHARE: &str = "/newroot";

fn main() {
    let report = measure().unwrap_or_else(|e| format!("failed {e}\n")) + "\0";
    if let Ok(mut to) = dial(REPORT) {
        let _ = to.write_all(report.as_bytes());
        let _ = to.read(&mut [0]);
    }
    // SAFETY: has no memory operands.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
}

/// What is measured in each round, and the figure's name.
type Step = (&'static str, fn(usize) -> io::Result<f64>);

const STEPS: [Step; 6] = [
    ("vsock_round_trip_us", |_| round_trip_us()),
    ("vsock_to_host_mib_per_s", |_| to_host()),
    ("vsock_from_host_mib_per_s", |_| from_host()),
    ("fs_read_mib_per_s", read),
    ("fs_write_mib_per_s", write),
    ("fs_lookups_per_s", lookups),
];

fn measure() -> io::Result<String> {
    mount()?;
    let mut report = String::new();
    for round in 0..ROUNDS {
        for (name, step) in STEPS {
            let figure = step(round)
                .map_err(|e| io::Error::new(e.kind(), format!("{name} of round {round}: {e}")))?;
            report.push_str(&format!("{name} {figure}\n"));
        }
    }
    Ok(report)
}

fn mount() -> io::Result<()> {
    let (tag, target) = (format!("{TAG}\0"), format!("{SHARE}\0"));
    // SAFETY: the strings are terminated and outlive the call.
    let mounted = unsafe {
        libc::mount(
            tag.as_ptr().cast(),
            target.as_ptr().cast(),
            c"virtiofs".as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    match mounted {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Connects to a port of the host.
fn dial(port: u32) -> io::Result<File> {
    // SAFETY: makes a descriptor, which nothing else owns.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    use std::os::fd::AsRawFd;
    // SAFETY: the address is of the length given, and outlives the call.
    let connected = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_vm>() as libc::socklen_t,
        )
    };
    match connected {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn rate(count: f64, begin: Instant) -> f64 {
    count / begin.elapsed().as_secs_f64()
}

fn round_trip_us() -> io::Result<f64> {
    let mut echo = dial(ECHO)?;
    let sent = [0x5a; MESSAGE];
    let mut there_and_back = || {
        echo.write_all(&sent)?;
        echo.read_exact(&mut [0; MESSAGE])
    };
    // The host may not have been ready.
    there_and_back()?;
    let begin = Instant::now();
    for _ in 0..ROUND_TRIPS {
        there_and_back()?;
    }
    Ok(1e6 / rate(ROUND_TRIPS as f64, begin))
}

fn to_host() -> io::Result<f64> {
    let mut sink = dial(SINK)?;
    let piece = vec![0x5a; WRITE];
    let begin = Instant::now();
    for _ in 0..(MIB << 20) / WRITE {
        sink.write_all(&piece)?;
    }
    sink.read_exact(&mut [0])?;
    Ok(rate(MIB as f64, begin))
}

fn from_host() -> io::Result<f64> {
    let mut source = dial(SOURCE)?;
    let mut piece = vec![0; READ];
    let begin = Instant::now();
    let mut left = MIB << 20;
    while left > 0 {
        match source.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => left -= len,
        }
    }
    Ok(rate(MIB as f64, begin))
}

/// A file that the guest has not seen before.
fn read(round: usize) -> io::Result<f64> {
    let mut piece = vec![0; 1 << 20];
    let mut file = File::open(format!("{SHARE}/{}", large(round)))?;
    let begin = Instant::now();
    let mut all = 0;
    loop {
        match file.read(&mut piece)? {
            0 => break,
            len => all += len,
        }
    }
    assert_eq!(all, MIB << 20);
    Ok(rate(MIB as f64, begin))
}

fn write(round: usize) -> io::Result<f64> {
    let piece = vec![0x5a; 1 << 20];
    let mut file = File::create(format!("{SHARE}/{WRITTEN}/{round}"))?;
    let begin = Instant::now();
    for _ in 0..MIB {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    Ok(rate(MIB as f64, begin))
}

/// Names that the guest has not looked up before.
fn lookups(round: usize) -> io::Result<f64> {
    let begin = Instant::now();
    for number in 0..FILES {
        fs::metadata(format!("{SHARE}/files-{round}/{number}"))?;
    }
    Ok(rate(FILES as f64, begin))
}
