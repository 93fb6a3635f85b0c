//! Tar archives as sets of files: listed once, then read in place.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{Files, open_regular};
use crate::image::compression;
use crate::image::error::{Context, Error, Result};
use crate::image::limits::Limits;
use crate::image::tar_reader::{Kind, Skip, TarEntry, TarReader};

/// Links that are followed one after the other before it is called a loop.
const LINK_DEPTH: usize = 16;

/// An image archive.
pub(super) struct Archive {
    file: File,
    path: PathBuf,
    entries: HashMap<String, Member>,
}

enum Member {
    /// Offset and size in bytes.
    File(u64, u64),
    /// The name of another member. Old versions of docker save a layer that repeats as such a link.
    Link(String),
}

impl Archive {
    /// Opens the archive `path` and lists it. One that is compressed as a whole is decompressed to an
    /// unnamed file in `scratch`.
    pub fn open(path: &Path, scratch: &Path, limits: &Limits) -> Result<Self> {
        let (mut file, mut size) = open_regular(path)?;
        if compression::of(&file).context("read", path)?.is_some() {
            (file, size) = decompress(file, path, scratch, limits)?;
        }
        let entries = list(&file, size, path, limits)?;
        Ok(Self {
            file,
            path: path.to_path_buf(),
            entries,
        })
    }
}

fn decompress(file: File, path: &Path, scratch: &Path, limits: &Limits) -> Result<(File, u64)> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let plain = rustix::fs::open(scratch, flags, Mode::RUSR | Mode::WUSR)
        .context("make a temporary file in", scratch)?;
    let mut plain = File::from(plain);
    let cap = limits.archive_bytes.saturating_add(1);
    let mut reader = compression::reader(file)
        .context("decompress", path)?
        .take(cap);
    let size = io::copy(&mut reader, &mut plain).context("decompress", path)?;
    if size >= cap {
        let limit = format!("{} bytes uncompressed", limits.archive_bytes);
        return Err(Error::limit(path.display().to_string(), limit));
    }
    Ok((plain, size))
}

fn list(file: &File, size: u64, path: &Path, limits: &Limits) -> Result<HashMap<String, Member>> {
    let what = path.display().to_string();
    let stream = Section {
        file,
        offset: 0,
        end: size,
    };
    let mut reader = TarReader::new(stream, limits);
    let mut entries = HashMap::new();
    loop {
        let entry = match reader.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(entries),
            Err(error) => return Err(Error::malformed(what, error.to_string())),
        };
        if entries.len() >= limits.archive_entries {
            return Err(Error::limit(
                what,
                format!("{} entries", limits.archive_entries),
            ));
        }
        if let Some((name, member)) = member(&entry) {
            entries.insert(name, member);
        }
    }
}

fn member(entry: &TarEntry) -> Option<(String, Member)> {
    let name = normalize("", std::str::from_utf8(&entry.name).ok()?)?;
    let link = std::str::from_utf8(&entry.link).ok()?;
    let member = match entry.kind {
        Kind::File => Member::File(entry.offset, entry.size),
        Kind::HardLink => Member::Link(normalize("", link)?),
        Kind::Symlink => {
            let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
            Member::Link(normalize(parent, link)?)
        }
        _ => return None,
    };
    Some((name, member))
}

/// `path` as seen from the directory `from`, without `.` and `..`; `None` if it leaves the archive.
fn normalize(from: &str, path: &str) -> Option<String> {
    let from = if path.starts_with('/') { "" } else { from };
    let mut parts = Vec::new();
    for part in from.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

impl Files for Archive {
    fn open(&self, name: &str) -> Result<(Box<dyn Read + '_>, u64)> {
        let missing = || Error::Missing {
            what: name.to_owned(),
            place: self.place(),
        };
        let mut target = normalize("", name).ok_or_else(missing)?;
        for _ in 0..LINK_DEPTH {
            match self.entries.get(&target).ok_or_else(missing)? {
                Member::Link(next) => target.clone_from(next),
                Member::File(offset, size) => {
                    let end = offset.saturating_add(*size);
                    let section = Section {
                        file: &self.file,
                        offset: *offset,
                        end,
                    };
                    return Ok((Box::new(section), *size));
                }
            }
        }
        Err(Error::malformed(
            self.place(),
            format!("{name} is a link that leads nowhere"),
        ))
    }

    fn place(&self) -> String {
        format!("the image archive {}", self.path.display())
    }
}

/// A part of a file, read without moving the file's own position.
struct Section<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_sub(self.offset);
        let room = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(window) = buffer.get_mut(..room) else {
            return Ok(0);
        };
        let read = self.file.read_at(window, self.offset)?;
        self.offset = self.offset.saturating_add(read as u64);
        Ok(read)
    }
}

impl Skip for Section<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match self
            .offset
            .checked_add(count)
            .filter(|offset| *offset <= self.end)
        {
            Some(offset) => self.offset = offset,
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
        Ok(())
    }
}
