//! Our vsock and virtiofs devices and the stock daemons, vhost-device-vsock and virtiofsd, measured by the same guest in
//! the same QEMU, in turns: `peers VHOST-DEVICE-VSOCK VIRTIOFSD GUEST-IMAGE` prints the medians and their ratios as JSON.
//! Called by `make bench`; needs root, QEMU, and what `make` built.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::time::{Duration, Instant};

use cella_tests::peers::{
    ECHO, FILES, MESSAGE, MIB, REPORT, ROUNDS, SINK, SOURCE, TAG, WRITTEN, large,
};
use cella_tests::{Host, libexec};
use serde_json::json;

/// How often each is booted.
const TURNS: usize = 3;
/// No guest takes longer.
const LIMIT: Duration = Duration::from_secs(120);
/// As `host/src/hypervisor/qemu/command.rs` has them.
const MACHINE: &str = "-nodefaults -no-user-config -no-reboot -display none \
    -M microvm,acpi=off,x-option-roms=off,isa-serial=off,memory-backend=memory -accel tcg,tb-size=20 \
    -cpu max,-erms,-fsrm -m 256M -smp 1 -object memory-backend-memfd,id=memory,size=256M,share=on \
    -global virtio-mmio.force-legacy=false";
const WORDS: &str = "reboot=t noreplace-smp rootfstype=ramfs init_on_alloc=1 no_timer_check lapic_khz=1000000 quiet loglevel=0";

/// Figures by name, each measured several times.
type Figures = BTreeMap<String, Vec<f64>>;

fn main() {
    let args: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vsock, virtiofsd, image] = args.as_slice() else {
        eprintln!("usage: peers VHOST-DEVICE-VSOCK VIRTIOFSD GUEST-IMAGE");
        std::process::exit(2);
    };
    let (mut ours, mut stock) = (Figures::new(), Figures::new());
    for _ in 0..TURNS {
        take(&mut ours, &with_ours(image));
        take(&mut stock, &with_stock(vsock, virtiofsd, image));
    }
    let rows = ours.iter().map(|(name, figures)| {
        let (ours, stock) = (median(figures), median(&stock[name]));
        // A delay is better the shorter it is, all else the more.
        let ratio = match name.ends_with("_us") {
            true => stock / ours,
            false => ours / stock,
        };
        (
            name.clone(),
            json!({ "ours": ours, "stock": stock, "ratio": ratio }),
        )
    });
    println!("{}", serde_json::Value::Object(rows.collect()));
}

fn take(figures: &mut Figures, report: &str) {
    assert!(!report.is_empty(), "the guest reported nothing");
    for line in report.lines() {
        let (name, figure) = line.split_once(' ').unwrap();
        let figure = figure.parse().unwrap_or_else(|_| panic!("{line}"));
        figures.entry(name.to_owned()).or_default().push(figure);
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// `cella run`, with the measuring guest in the place of the agent: it is never called, and ends with the guest.
fn with_ours(image: &Path) -> String {
    let host = Host::on("qemu");
    let libexec = host.path("libexec");
    fs::create_dir(&libexec).unwrap();
    for name in ["cella-vmm", "vmlinux"] {
        fs::copy(cella_tests::libexec().join(name), libexec.join(name)).unwrap();
    }
    fs::copy(image, libexec.join("initrd.cpio")).unwrap();
    let mut command = host.command(&["run", "--name", "peers", &host.busybox(), "true"]);
    command.env("CELLA_LIBEXEC_DIR", &libexec);
    // Where the guest's connections arrive, before there is a guest.
    let mut cella = Kill(command.stdout(Stdio::null()).spawn().unwrap());
    let dir = host.path("run/peers");
    let deadline = Instant::now() + LIMIT;
    let share = dir.join("share");
    let is_mounted = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(share.to_str().unwrap())
    };
    while !is_mounted() {
        assert!(Instant::now() < deadline, "cella makes no sandbox");
        std::thread::sleep(Duration::from_millis(1));
    }
    let listeners = listen(|port| dir.join("sockets").join(port.to_string()));
    fill(&share);
    // The shared directory itself is read-only to the guest.
    let written = share.join(WRITTEN);
    let mounted = Command::new("mount")
        .arg("--bind")
        .args([&written; 2])
        .status();
    assert!(mounted.unwrap().success());
    let report = serve(listeners);
    let report = report.recv_timeout(LIMIT).expect("a report");
    let _ = cella.0.wait();
    report
}

/// The stock daemons and the same QEMU.
fn with_stock(vsock: &Path, virtiofsd: &Path, image: &Path) -> String {
    let dir = tempfile::Builder::new()
        .prefix("cella-peers-")
        .tempdir()
        .unwrap();
    let path = |name: &str| dir.path().join(name);
    let share = path("share");
    fs::create_dir(&share).unwrap();
    fill(&share);
    let report = serve(listen(|port| path(&format!("uds_{port}"))));
    let option = |name: &str, value: &Path| format!("{name}={}", value.display());
    let mut files = Command::new(virtiofsd);
    files.arg(option("--socket-path", &path("fs")));
    match virtiofsd.starts_with("/usr/lib/qemu") {
        // QEMU's own, of before 8.0.
        true => files.args(["-o", &option("source", &share)]),
        false => files.arg(option("--shared-dir", &share)),
    };
    let mut connections = Command::new(vsock);
    connections.args([
        "--guest-cid=3",
        &option("--uds-path", &path("uds")),
        &option("--socket", &path("vsock")),
    ]);
    let _daemons = [start(&mut files), start(&mut connections)];
    for socket in ["fs", "vsock"] {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !path(socket).exists() {
            assert!(
                Instant::now() < deadline,
                "no socket of the {socket} daemon"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(MACHINE.split_whitespace());
    for (name, device) in [
        ("vsock", "vhost-user-vsock-device,chardev=vsock".to_owned()),
        (
            "fs",
            format!("vhost-user-fs-device,chardev=fs,tag={TAG},queue-size=512"),
        ),
    ] {
        let chardev = format!("socket,id={name},path={}", path(name).display());
        qemu.args(["-chardev", &chardev, "-device", &device]);
    }
    qemu.arg("-kernel")
        .arg(libexec().join("vmlinux"))
        .arg("-initrd")
        .arg(image);
    qemu.args(["-append", WORDS]);
    let _qemu = start(&mut qemu);
    report.recv_timeout(LIMIT).expect("a report")
}

/// A process that ends with its owner.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(command: &mut Command) -> Kill {
    let quiet = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Kill(quiet.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")))
}

/// What the guest finds in the shared directory.
fn fill(share: &Path) {
    fs::create_dir(share.join(WRITTEN)).unwrap();
    let content = vec![0x5a; MIB << 20];
    for round in 0..ROUNDS {
        let files = share.join(format!("files-{round}"));
        fs::create_dir(&files).unwrap();
        for number in 0..FILES {
            fs::write(files.join(number.to_string()), "x").unwrap();
        }
        fs::write(share.join(large(round)), &content).unwrap();
    }
}

/// Where the guest's connections arrive, by port: at the sockets that `path` names.
fn listen(path: impl Fn(u32) -> PathBuf) -> Vec<(u32, UnixListener)> {
    let bind = |port| {
        let listener = UnixListener::bind(path(port)).unwrap();
        fs::set_permissions(path(port), fs::Permissions::from_mode(0o666)).unwrap();
        (port, listener)
    };
    [ECHO, SINK, SOURCE, REPORT].map(bind).into()
}

/// Serves them. The report comes out of the channel.
fn serve(listeners: Vec<(u32, UnixListener)>) -> mpsc::Receiver<String> {
    let (sender, report) = mpsc::channel();
    for (port, listener) in listeners {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                if let Err(error) = answer(port, stream, &sender) {
                    eprintln!("port {port}: {error}");
                }
            }
        });
    }
    report
}

fn answer(port: u32, mut stream: UnixStream, report: &Sender<String>) -> io::Result<()> {
    let mut piece = vec![0x5a; 64 << 10];
    match port {
        ECHO => loop {
            let mut message = [0; MESSAGE];
            match stream.read_exact(&mut message) {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                other => other?,
            }
            stream.write_all(&message)?;
        },
        SINK => {
            let mut left = MIB << 20;
            while left > 0 {
                match stream.read(&mut piece)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    len => left -= len,
                }
            }
            stream.write_all(&[0])
        }
        SOURCE => {
            for _ in 0..(MIB << 20) / piece.len() {
                stream.write_all(&piece)?;
            }
            // The guest closes it.
            stream.read(&mut [0]).map(drop)
        }
        _ => {
            let mut text = String::new();
            // The guest waits for the end of its connection, to be sure that all arrived.
            while !text.ends_with('\0') {
                match stream.read(&mut piece)? {
                    0 => break,
                    len => text.push_str(&String::from_utf8_lossy(&piece[..len])),
                }
            }
            let _ = report.send(text.trim_end_matches('\0').to_owned());
            Ok(())
        }
    }
}
