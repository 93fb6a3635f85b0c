//! A hostile guest and hasty host programs on the vsock device. The mock's guard pages end the run if the device
//! touches memory outside of the guest.

#![no_main]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use cella_vmm::device::Device;
use cella_vmm::device::testing::{Buffer, MockDriver};
use cella_vmm::device::vsock::Vsock;
use cella_vmm::device::vsock::packet::{HEADER_LEN, Header, TYPE_STREAM};
use cella_vmm_fuzz::Input;
use libfuzzer_sys::fuzz_target;

const CID: u64 = 3;
const RX: usize = 0;
const TX: usize = 1;
/// The port that a host program listens on.
const PORT: u32 = 1;
const STEPS: usize = 64;

struct Host {
    dir: PathBuf,
    listener: UnixListener,
    server: UnixListener,
}

static HOST: OnceLock<Host> = OnceLock::new();

extern "C" fn remove_dir() {
    if let Some(host) = HOST.get() {
        let _ = std::fs::remove_dir_all(&host.dir);
    }
}

fn host() -> &'static Host {
    HOST.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap().keep();
        let listener = UnixListener::bind(dir.join("listener")).unwrap();
        let server = UnixListener::bind(dir.join(PORT.to_string())).unwrap();
        server.set_nonblocking(true).unwrap();
        // SAFETY: the function takes nothing and may run at any time.
        unsafe { libc::atexit(remove_dir) };
        Host {
            dir,
            listener,
            server,
        }
    })
}

struct World {
    driver: MockDriver<Vsock>,
    streams: Vec<UnixStream>,
    rx: HashMap<u16, Buffer>,
    // Ports of the packet that came last: host's, guest's.
    last: (u32, u32),
}

impl World {
    fn packet(&mut self, input: &mut Input<'_>) {
        let kind = input.byte();
        let (host, guest) = match kind & 1 {
            0 => self.last,
            _ => (PORT, 50 + u32::from(input.byte() % 4)),
        };
        let data = usize::from(input.byte()) * 16;
        let mut header = Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            len: data as u32,
            kind: TYPE_STREAM,
            op: u16::from(input.byte() % 9),
            flags: u32::from(input.byte()),
            buf_alloc: 1 << 16,
            fwd_cnt: 0,
        };
        match kind >> 4 {
            1 => header.len = input.word(),
            2 => header.buf_alloc = input.word(),
            3 => header.fwd_cnt = input.word(),
            4 => header.kind = input.byte().into(),
            5 => header.src_cid = input.byte().into(),
            6 => header.dst_cid = input.byte().into(),
            _ => {}
        }
        let bytes = [&header.format()[..], &vec![kind; data]].concat();
        let cut = usize::from(input.byte()).min(bytes.len() - 1);
        self.driver.free_all();
        self.driver
            .request(TX, &[&bytes[..cut], &bytes[cut..]], &[]);
    }

    fn offer(&mut self, input: &mut Input<'_>) {
        // Above what requests use, so that packets are not overwritten.
        let slot = u64::from(input.byte() % 32);
        let buffer = Buffer {
            address: 0x8_0000 + slot * 0x2000,
            len: 30 + u32::from(input.byte()) * 30,
            writable: true,
        };
        let head = self.driver.offer(RX, &[buffer]);
        self.rx.insert(head, buffer);
    }

    fn collect(&mut self) {
        for used in self.driver.used(RX) {
            if let Some(buffer) = self.rx.remove(&used.head)
                && used.len as usize >= HEADER_LEN
            {
                assert!(used.len <= buffer.len, "more used than offered");
                let wire = self.driver.read(buffer.address, HEADER_LEN);
                let header = Header::parse(&wire.try_into().unwrap());
                self.last = (header.src_port, header.dst_port);
            }
        }
        let _ = self.driver.used(TX);
        while let Ok((stream, _)) = host().server.accept() {
            stream.set_nonblocking(true).unwrap();
            self.streams.push(stream);
        }
    }

    fn host_step(&mut self, input: &mut Input<'_>) {
        let at = usize::from(input.byte());
        let what = input.byte();
        if self.streams.is_empty() || what % 8 == 0 {
            let Ok(mut stream) = UnixStream::connect(host().dir.join("listener")) else {
                return;
            };
            stream.set_nonblocking(true).unwrap();
            let line = match what >> 4 {
                0 => input.take(40).to_vec(),
                _ => format!("CONNECT {}\n", what % 3).into_bytes(),
            };
            let _ = stream.write(&line);
            return self.streams.push(stream);
        }
        let at = at % self.streams.len();
        let stream = &mut self.streams[at];
        match what % 8 {
            1 | 2 => drop(stream.write(&vec![what; usize::from(what) * 100])),
            3 | 4 => drop(stream.read(&mut [0; 20_000])),
            5 => drop(stream.shutdown(Shutdown::Write)),
            6 => drop(stream.shutdown(Shutdown::Read)),
            _ => drop(self.streams.swap_remove(at)),
        }
    }

    // False if the device asks to be reset.
    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let done = match input.byte() % 12 {
            0..=3 => {
                self.packet(input);
                self.driver.kick(TX)
            }
            4..=6 => {
                self.host_step(input);
                Ok(())
            }
            7..=9 => {
                self.offer(input);
                self.driver.kick(RX)
            }
            10 => {
                let queue = usize::from(input.byte() % 3);
                let len = usize::from(input.byte());
                let bytes = input.take(len).to_vec();
                self.driver.scribble(queue, &bytes);
                self.rx.clear();
                self.driver.kick(queue)
            }
            _ => self.driver.kick(2),
        };
        let events = self.driver.run_events(Duration::ZERO);
        self.collect();
        done.is_ok() && events.is_ok()
    }
}

fuzz_target!(|data: &[u8]| {
    let host = host();
    let listener = host.listener.try_clone().unwrap();
    let device = Vsock::new(CID, listener, host.dir.clone()).unwrap();
    let mut world = World {
        driver: MockDriver::new(device),
        streams: Vec::new(),
        rx: HashMap::new(),
        last: (1 << 30, 1),
    };
    let mut input = Input(data);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        if !world.step(&mut input) {
            world.driver.device.reset().unwrap();
            let features = world.driver.device.features();
            world.driver.activate(features).unwrap();
            world.rx.clear();
        }
    }
    world.driver.device.reset();
    assert!(world.driver.watcher.watched().is_empty());
});
