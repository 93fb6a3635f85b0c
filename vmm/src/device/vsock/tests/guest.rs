//! A guest's socket layer as far as tests need it: it keeps account of credit like any driver, and fails the
//! test when the device overdraws it.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use crate::device::testing::{Buffer, MockDriver};
use crate::device::vsock::packet::{HEADER_LEN, Header, Op, TYPE_STREAM};
use crate::device::vsock::{RX, TX, Vsock};

pub const CID: u64 = 3;
/// Room of each connection in the guest, in bytes.
pub const ROOM: u32 = 64 * 1024;

const TX_AREA: usize = HEADER_LEN + 64 * 1024;

/// Ports of a connection: the host's, the guest's.
pub type Pair = (u32, u32);

#[derive(Default)]
struct Account {
    // Bytes that came, bytes that the guest's program took.
    received: u32,
    taken: u32,
    sent: u32,
    peer_alloc: u32,
    peer_taken: u32,
}

pub struct Guest {
    pub driver: MockDriver<Vsock>,
    pub dir: TempDir,
    rx: HashMap<u16, Vec<Buffer>>,
    tx_area: u64,
    accounts: HashMap<Pair, Account>,
    /// Packets that came and nobody looked at.
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    /// Whether data is taken as it comes.
    pub reads: bool,
    /// The test has sent lies about credit: the device may send more than there is room for.
    pub lenient: bool,
}

impl Guest {
    /// A guest with `count` receive buffers, each of descriptors with these lengths.
    pub fn with_rx(count: usize, lens: &[u32]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("ports")).unwrap();
        let listener = UnixListener::bind(dir.path().join("listener")).unwrap();
        let device = Vsock::new(CID, listener, dir.path().join("ports")).unwrap();
        let mut driver = MockDriver::new(device);
        let tx_area = driver.alloc(TX_AREA);
        let mut guest = Self {
            driver,
            dir,
            rx: HashMap::new(),
            tx_area,
            accounts: HashMap::new(),
            inbox: VecDeque::new(),
            reads: true,
            lenient: false,
        };
        for _ in 0..count {
            let buffers = lens
                .iter()
                .map(|&len| Buffer {
                    address: guest.driver.alloc(len as usize),
                    len,
                    writable: true,
                })
                .collect();
            guest.offer_rx(buffers);
        }
        guest.driver.kick(RX).unwrap();
        guest
    }

    pub fn new() -> Self {
        Self::with_rx(32, &[44, 4096])
    }

    pub fn offer_rx(&mut self, buffers: Vec<Buffer>) {
        let head = self.driver.offer(RX, &buffers);
        self.rx.insert(head, buffers);
    }

    /// Connects like a host program, without a line.
    pub fn host_connects(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("listener")).unwrap()
    }

    /// A host program that listens on `port`.
    pub fn host_listens(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.socket(port)).unwrap()
    }

    pub fn socket(&self, port: u32) -> PathBuf {
        self.dir.path().join("ports").join(port.to_string())
    }

    pub fn header(&self, (host, guest): Pair, op: Op) -> Header {
        let account = self.accounts.get(&(host, guest));
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: ROOM,
            fwd_cnt: account.map_or(0, |account| account.taken),
            ..Header::default()
        }
    }

    /// Sends a packet in descriptors cut at these offsets of header and data together.
    pub fn send_cut(&mut self, header: &Header, data: &[u8], cuts: &[usize]) {
        let bytes = [&header.format()[..], data].concat();
        assert!(bytes.len() <= TX_AREA);
        self.driver.write(self.tx_area, &bytes);
        let mut buffers = Vec::new();
        let mut from = 0;
        for &to in cuts.iter().chain([&bytes.len()]) {
            buffers.push(Buffer {
                address: self.tx_area + from as u64,
                len: (to - from) as u32,
                writable: false,
            });
            from = to;
        }
        let head = self.driver.offer(TX, &buffers);
        self.driver.kick(TX).unwrap();
        let used = self.driver.used(TX);
        assert_eq!(used.len(), 1, "every packet is used up at once");
        assert_eq!((used[0].head, used[0].len), (head, 0));
    }

    pub fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_cut(header, data, &[HEADER_LEN]);
    }

    pub fn send_op(&mut self, pair: Pair, op: Op, flags: u32) {
        let header = Header {
            flags,
            ..self.header(pair, op)
        };
        self.send(&header, &[]);
    }

    /// Bytes that the host has room for.
    pub fn credit(&self, pair: Pair) -> usize {
        let account = &self.accounts[&pair];
        (account.peer_alloc - account.sent.wrapping_sub(account.peer_taken)) as usize
    }

    /// Sends data within the credit; returns how much that was.
    pub fn send_data(&mut self, pair: Pair, data: &[u8]) -> usize {
        let len = data.len().min(self.credit(pair)).min(64 * 1024);
        let header = Header {
            len: len as u32,
            ..self.header(pair, Op::ReadWrite)
        };
        self.accounts.get_mut(&pair).unwrap().sent += len as u32;
        self.send(&header, &data[..len]);
        len
    }

    /// Lets the device work and collects what it sent, until nothing more happens.
    pub fn settle(&mut self) {
        loop {
            let events = self.driver.run_events(Duration::ZERO).unwrap();
            if self.collect() == 0 && events == 0 {
                return;
            }
        }
    }

    // Takes used receive buffers and offers them again.
    fn collect(&mut self) -> usize {
        let used = self.driver.used(RX);
        for entry in &used {
            let buffers = self
                .rx
                .remove(&entry.head)
                .expect("a head that was offered");
            let mut bytes = Vec::new();
            for buffer in &buffers {
                bytes.extend(self.driver.read(buffer.address, buffer.len as usize));
            }
            assert!(entry.len as usize <= bytes.len(), "more used than offered");
            bytes.truncate(entry.len as usize);
            self.offer_rx(buffers);
            let (wire, data) = bytes.split_first_chunk::<HEADER_LEN>().expect("a header");
            let header = Header::parse(wire);
            assert_eq!(header.len as usize, data.len());
            self.account(&header);
            self.inbox.push_back((header, data.to_vec()));
        }
        if !used.is_empty() {
            self.driver.kick(RX).unwrap();
        }
        used.len()
    }

    fn account(&mut self, header: &Header) {
        let (reads, lenient) = (self.reads, self.lenient);
        let account = self
            .accounts
            .entry((header.src_port, header.dst_port))
            .or_default();
        account.received += header.len;
        assert!(
            lenient || account.received - account.taken <= ROOM,
            "the device overdrew the guest's credit"
        );
        if reads {
            account.taken = account.received;
        }
        if header.op != Op::Reset as u16 {
            account.peer_alloc = header.buf_alloc;
            account.peer_taken = header.fwd_cnt;
        }
    }

    /// The guest's program takes all that came, and says so.
    pub fn take(&mut self, pair: Pair) {
        let account = self.accounts.get_mut(&pair).unwrap();
        account.taken = account.received;
        self.send_op(pair, Op::CreditUpdate, 0);
    }

    /// The next packet, which must be an `op`.
    pub fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        self.settle();
        let (header, data) = self.inbox.pop_front().expect("a packet");
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid), (2, CID));
        (header, data)
    }

    pub fn expect_nothing(&mut self) {
        self.settle();
        assert!(self.inbox.is_empty(), "{:?}", self.inbox);
    }

    /// Opens a connection from a host program to `port`.
    pub fn accept(&mut self, port: u32) -> (UnixStream, Pair) {
        use std::io::{BufRead, BufReader, Write};
        let mut client = self.host_connects();
        writeln!(client, "CONNECT {port}").unwrap();
        let (request, _) = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        let pair = (request.src_port, port);
        self.send_op(pair, Op::Response, 0);
        let mut line = String::new();
        // One byte at a time, so that the reader takes no data off the stream.
        BufReader::with_capacity(1, &client)
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, format!("OK {}\n", pair.0));
        (client, pair)
    }

    /// Opens a connection from the guest's `pair.1` to the host program on `pair.0`.
    pub fn connect(&mut self, listener: &UnixListener, pair: Pair) -> UnixStream {
        self.send_op(pair, Op::Request, 0);
        let (response, _) = self.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), pair);
        listener.accept().unwrap().0
    }

    /// All data that came for `pair` until something else did.
    pub fn data(&mut self, pair: Pair) -> Vec<u8> {
        self.settle();
        let mut all = Vec::new();
        self.inbox.retain(|(header, data)| {
            let ours =
                header.op == Op::ReadWrite as u16 && (header.src_port, header.dst_port) == pair;
            if ours {
                all.extend(data);
            }
            !ours
        });
        all
    }
}
