//! A hostile layer: after each run nothing may have changed beside the directory that it is unpacked to.

#![no_main]

use std::io::{Cursor, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Once;

use cella_host::image::{Limits, Skip, unpack_stream};
use libfuzzer_sys::fuzz_target;

// OUTSIDE stands for the absolute path of what must not be touched.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "d",
    "d/a",
    "d/b/c",
    "a/b",
    "l",
    "l/x",
    "../x",
    "d/../a",
    "./",
    "..",
    ".wh.a",
    "d/.wh..wh..opq",
    "d/.wh.b",
    "OUTSIDE",
];
const KINDS: &[u8] = b"0123456gx5052LK7";
const MAX_ENTRIES: usize = 32;

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&byte, rest)) => {
                self.0 = rest;
                byte
            }
            None => 0,
        }
    }

    fn take(&mut self) -> &[u8] {
        let len = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }
}

struct Stream(Cursor<Vec<u8>>);

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Skip for Stream {}

// No file grows past a megabyte, whatever an entry says of its size.
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

// A name that means something, or any bytes.
fn name(input: &mut Input<'_>, outside: &str) -> Vec<u8> {
    match input.byte() {
        255 => input.take().to_vec(),
        choice => {
            let name = NAMES[usize::from(choice) % NAMES.len()];
            name.replace("OUTSIDE", outside).into_bytes()
        }
    }
}

fn put(field: &mut [u8], bytes: &[u8]) {
    let len = field.len().min(bytes.len());
    field[..len].copy_from_slice(&bytes[..len]);
}

// One entry with a right checksum, and a field or two that anything may be in.
fn entry(input: &mut Input<'_>, outside: &str) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    let name = name(input, outside);
    put(&mut header.as_old_mut().name, &name);
    let link = self::name(input, outside);
    put(&mut header.as_old_mut().linkname, &link);
    let kind = KINDS[usize::from(input.byte()) % KINDS.len()];
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(u32::from(input.byte()) << 4 | 0o400);
    header.set_uid(input.byte().into());
    header.set_gid(0);
    header.set_mtime(1);
    let content = match input.byte() {
        // Records of a pax header whose lengths are right.
        form @ 128..192 => {
            let key = [
                "path",
                "linkpath",
                "size",
                "mtime",
                "uid",
                "SCHILY.xattr.user.x",
            ];
            let key = key[usize::from(form) % key.len()];
            let value = match form % 2 {
                0 => self::name(input, outside),
                _ => input.take().to_vec(),
            };
            let rest = key.len() + value.len() + 3;
            let mut len = rest;
            while len != rest + len.to_string().len() {
                len = rest + len.to_string().len();
            }
            let mut record = format!("{len} {key}=").into_bytes();
            record.extend(value);
            record.push(b'\n');
            record
        }
        _ => input.take().to_vec(),
    };
    header.set_size(content.len() as u64);
    if input.byte() > 240 {
        let at = usize::from(input.byte()) * 2;
        let bytes = input.take().to_vec();
        let field = &mut header.as_mut_bytes()[at..];
        put(field, &bytes);
    }
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn stream(data: &[u8], outside: &str) -> Vec<u8> {
    let mut input = Input(data);
    if input.byte() == 255 {
        return input.0.to_vec();
    }
    let mut bytes = Vec::new();
    for _ in 0..MAX_ENTRIES {
        if input.0.is_empty() {
            break;
        }
        bytes.extend(entry(&mut input, outside));
    }
    bytes
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fuzz_target!(|data: &[u8]| {
    limit_files();
    let place = tempfile::tempdir().unwrap();
    let [fs, trash, outside] = ["fs", "trash", "outside"].map(|name| place.path().join(name));
    for dir in [&fs, &trash, &outside] {
        std::fs::create_dir(dir).unwrap();
    }
    let secret = outside.join("secret");
    std::fs::write(&secret, "untouched").unwrap();
    let before = std::fs::metadata(&secret).unwrap();

    let limits = Limits {
        layer_entries: 20,
        extension_bytes: 4096,
        ..Limits::default()
    };
    let stream = Stream(Cursor::new(stream(data, secret.to_str().unwrap())));
    if let Err(error) = unpack_stream(stream, &fs, &trash, &limits) {
        assert!(!error.chain().contains('\n'));
    }

    assert_eq!(names(place.path()), ["fs", "outside", "trash"]);
    assert_eq!(names(&outside), ["secret"]);
    let after = std::fs::metadata(&secret).unwrap();
    let told = |meta: &std::fs::Metadata| {
        (
            meta.ino(),
            meta.nlink(),
            meta.mode(),
            meta.uid(),
            meta.mtime(),
        )
    };
    assert_eq!(told(&before), told(&after), "what is outside was changed");
    assert_eq!(std::fs::read(&secret).unwrap(), b"untouched");
});
