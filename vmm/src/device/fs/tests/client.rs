//! The guest's side of FUSE as far as tests need it.

use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::{
    Attr, AttrOut, CreateIn, EntryOut, GetattrIn, InHeader, InitIn, InitOut, Opcode, OpenIn,
    OpenOut, OutHeader, ReadIn, ReleaseIn, Rename2In, WriteIn,
};
use tempfile::TempDir;
use vm_memory::ByteValued;

use crate::device::fs::budget::Budget;
use crate::device::fs::{Fs, HIPRIO, REQUEST};
use crate::device::testing::MockDriver;

pub const ROOT: u64 = 1;
const HEADER: usize = size_of::<InHeader>();
const REPLY: usize = size_of::<OutHeader>();

/// What the server answers: the reply's body, or an error number.
pub type Answer = Result<Vec<u8>, i32>;

pub struct Client {
    pub driver: MockDriver<Fs>,
    pub dir: Option<TempDir>,
    pub uid: u32,
    pub gid: u32,
    unique: u64,
}

impl Client {
    /// A guest that has mounted an empty directory in a directory of the test's own.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        std::fs::create_dir(&share).unwrap();
        let mut client = Self::at(&share, Budget::new(1 << 16));
        client.dir = Some(dir);
        client
    }

    pub fn at(root: &Path, budget: Budget) -> Self {
        let mut client = Self::unmounted(root, budget);
        client.init().unwrap();
        client
    }

    pub fn unmounted(root: &Path, budget: Budget) -> Self {
        let device = Fs::with_budget("share", root, budget).unwrap();
        Self {
            driver: MockDriver::new(device),
            dir: None,
            uid: 0,
            gid: 0,
            unique: 0,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.as_ref().unwrap().path().join("share")
    }

    pub fn init(&mut self) -> Result<InitOut, i32> {
        let init = InitIn {
            major: 7,
            minor: 33,
            max_readahead: 1 << 17,
            // Everything the guest could offer but the extension words.
            flags: !(1 << 30),
        };
        let answer = self.call(Opcode::Init, 0, init.as_slice(), 64)?;
        Ok(*InitOut::from_slice(&answer).unwrap())
    }

    /// The bytes of a request.
    pub fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let header = InHeader {
            len: (HEADER + body.len()) as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            padding: 0,
        };
        [header.as_slice(), body].concat()
    }

    /// Sends raw readable pieces with room for `room` bytes of reply; the reply's raw bytes.
    pub fn raw(&mut self, queue: usize, pieces: &[&[u8]], room: &[u32]) -> Vec<u8> {
        self.driver.free_all();
        let (head, buffers) = self.driver.request(queue, pieces, room);
        self.driver.kick(queue).unwrap();
        let used = self.driver.used(queue);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].head, head);
        let mut bytes = Vec::new();
        for buffer in buffers {
            bytes.extend(self.driver.read(buffer.address, buffer.len as usize));
        }
        assert!(used[0].len as usize <= bytes.len());
        bytes.truncate(used[0].len as usize);
        bytes
    }

    /// Sends a request with room for `room` bytes behind the reply's header, in several descriptors.
    pub fn call(&mut self, opcode: Opcode, node: u64, body: &[u8], room: u32) -> Answer {
        let request = self.request(opcode as u32, node, body);
        let (front, back) = request.split_at(HEADER);
        let pieces = if back.is_empty() {
            vec![front]
        } else {
            vec![front, back]
        };
        let bytes = self.raw(REQUEST, &pieces, &[REPLY as u32, room / 2, room - room / 2]);
        let (header, body) = bytes.split_at(REPLY);
        let header = OutHeader::from_slice(header).unwrap();
        assert_eq!(header.len as usize, bytes.len());
        assert_eq!(header.unique, self.unique);
        match header.error {
            0 => Ok(body.to_vec()),
            error => Err(-error),
        }
    }

    fn entry(answer: &[u8]) -> EntryOut {
        *EntryOut::from_slice(&answer[..size_of::<EntryOut>()]).unwrap()
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let answer = self.call(Opcode::Lookup, parent, &cstr(name), 256)?;
        Ok(Self::entry(&answer))
    }

    /// A request that makes something with a name and answers with its entry.
    pub fn make(
        &mut self,
        opcode: Opcode,
        parent: u64,
        arguments: &[u8],
        name: &str,
    ) -> Result<EntryOut, i32> {
        let body = [arguments, &cstr(name)].concat();
        let answer = self.call(opcode, parent, &body, 256)?;
        Ok(Self::entry(&answer))
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let words = [0o755_u32, 0o022];
        self.make(Opcode::Mkdir, parent, &words_bytes(&words), name)
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<EntryOut, i32> {
        let body = [cstr(name), cstr(target)].concat();
        let answer = self.call(Opcode::Symlink, parent, &body, 256)?;
        Ok(Self::entry(&answer))
    }

    /// Creates a file and opens it: its entry and its handle.
    pub fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(EntryOut, u64), i32> {
        let arguments = CreateIn {
            flags: flags as u32,
            mode,
            umask: 0,
            fuse_flags: 0,
        };
        let body = [arguments.as_slice(), &cstr(name)].concat();
        let answer = self.call(Opcode::Create, parent, &body, 256)?;
        let open = OpenOut::from_slice(&answer[size_of::<EntryOut>()..]).unwrap();
        Ok((Self::entry(&answer), open.fh))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.open_with(Opcode::Open, node, flags, 0)
    }

    pub fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        self.open_with(Opcode::Opendir, node, libc::O_RDONLY, 0)
    }

    pub fn open_with(
        &mut self,
        opcode: Opcode,
        node: u64,
        flags: i32,
        fuse_flags: u32,
    ) -> Result<u64, i32> {
        let arguments = OpenIn {
            flags: flags as u32,
            fuse_flags,
        };
        self.opened(opcode, node, arguments).map(|opened| opened.fh)
    }

    pub fn opened(&mut self, opcode: Opcode, node: u64, arguments: OpenIn) -> Result<OpenOut, i32> {
        let answer = self.call(opcode, node, arguments.as_slice(), 64)?;
        Ok(*OpenOut::from_slice(&answer).unwrap())
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Answer {
        self.read_with(Opcode::Read, node, fh, offset, size)
    }

    pub fn read_with(
        &mut self,
        opcode: Opcode,
        node: u64,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Answer {
        let arguments = ReadIn {
            fh,
            offset,
            size,
            ..ReadIn::default()
        };
        self.call(opcode, node, arguments.as_slice(), size)
    }

    pub fn write(
        &mut self,
        node: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        fuse_flags: u32,
    ) -> Result<u32, i32> {
        let arguments = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            fuse_flags,
            flags: libc::O_RDWR as u32,
            ..WriteIn::default()
        };
        let body = [arguments.as_slice(), data].concat();
        let answer = self.call(Opcode::Write, node, &body, 16)?;
        Ok(u32::from_le_bytes(answer[..4].try_into().unwrap()))
    }

    pub fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        let answer = self.call(Opcode::Getattr, node, GetattrIn::default().as_slice(), 128)?;
        Ok(AttrOut::from_slice(&answer).unwrap().attr)
    }

    pub fn release(&mut self, opcode: Opcode, node: u64, fh: u64) -> Answer {
        let arguments = ReleaseIn {
            fh,
            ..ReleaseIn::default()
        };
        self.call(opcode, node, arguments.as_slice(), 64)
    }

    pub fn rename(&mut self, old: (u64, &str), new: (u64, &str), flags: u32) -> Answer {
        let rename = Rename2In {
            newdir: new.0,
            flags,
            padding: 0,
        };
        let body = [rename.as_slice(), &cstr(old.1), &cstr(new.1)].concat();
        self.call(Opcode::Rename2, old.0, &body, 64)
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let request = self.request(Opcode::Forget as u32, node, &count.to_le_bytes());
        assert_eq!(self.raw(HIPRIO, &[&request], &[]), b"");
    }

    /// The names in a directory with their inode numbers, by `READDIR` or, with entries, by `READDIRPLUS`.
    pub fn list(&mut self, node: u64, plus: bool) -> Vec<(String, u64, Option<EntryOut>)> {
        let opcode = if plus {
            Opcode::Readdirplus
        } else {
            Opcode::Readdir
        };
        let handle = self.opendir(node).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let answer = self.read_with(opcode, node, handle, offset, 600).unwrap();
            if answer.is_empty() {
                return names;
            }
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                let mut entry = None;
                if plus {
                    entry = Some(Self::entry(rest));
                    rest = &rest[size_of::<EntryOut>()..];
                }
                let word = |at: usize| u64::from_le_bytes(rest[at..at + 8].try_into().unwrap());
                let len = u32::from_le_bytes(rest[16..20].try_into().unwrap()) as usize;
                let name = String::from_utf8(rest[24..24 + len].to_vec()).unwrap();
                names.push((name, word(0), entry));
                offset = word(8);
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
    }
}

// Descriptors of this process for files below `dir`; other tests run beside this one.
pub fn open_below(dir: &Path) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .filter(|file| file.starts_with(dir))
        .count()
}

pub fn cstr(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub fn words_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
