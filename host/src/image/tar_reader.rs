//! A reader of tar streams that trusts nothing.
//!
//! The `tar` crate's own iteration holds extended headers of any size in memory, so only its view of
//! the header block is used. Formats: v7, ustar, GNU long names and numbers, pax. Where writers
//! disagree, this reads what Go's `archive/tar` reads, since images are written and read with that.

use std::io::{self, Read};

use super::limits::Limits;
use super::tar_fields::{self, Extension};

const BLOCK: usize = 512;

/// Why a tar stream cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream ends within a header or an entry's content.
    #[error("the archive is truncated")]
    Truncated,
    /// A header is not one.
    #[error("{0}")]
    Malformed(String),
    /// One of [`Limits`] was passed.
    #[error("more than {0}")]
    Limit(String),
    /// The stream could not be read (its compression included).
    #[error("{0}")]
    Read(#[source] io::Error),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Read(error),
        }
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// Another name of an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
    /// A type that this reader does not know, by its type flag.
    Other(u8),
}

/// Seconds since the epoch, and nanoseconds (less than a thousand million) after that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Time {
    /// Seconds; negative before 1970.
    pub seconds: i64,
    /// Nanoseconds to add.
    pub nanoseconds: u32,
}

/// One entry's header, extended headers applied.
#[derive(Clone, Debug)]
pub struct TarEntry {
    /// The name's bytes, as written: may be absolute, may have `..`.
    pub name: Vec<u8>,
    /// The target of a link; empty for others.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 07777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Time,
    /// Bytes of content in the stream; 0 for what has none.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes: name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the content begins in the stream, in bytes.
    pub offset: u64,
}

/// A stream that may know a cheaper way to pass over bytes than reading them.
pub trait Skip: Read + Sized {
    /// Passes over `count` bytes. Fails with `UnexpectedEof` if there are fewer.
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let passed = io::copy(&mut self.by_ref().take(count), &mut io::sink())?;
        if passed < count {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(())
        }
    }
}

/// Reads a stream's entries in turn; as [`Read`] it is the content of the entry last returned.
pub struct TarReader<'a, R> {
    inner: R,
    limits: &'a Limits,
    /// Bytes of the stream consumed so far.
    offset: u64,
    /// Bytes of the current entry's content not read yet, and of the padding after it.
    left: u64,
    padding: u64,
    /// What the headers before the next entry said about it.
    extension: Extension,
}

impl<'a, R: Skip> TarReader<'a, R> {
    /// Reads `inner` from its beginning.
    pub fn new(inner: R, limits: &'a Limits) -> Self {
        Self {
            inner,
            limits,
            offset: 0,
            left: 0,
            padding: 0,
            extension: Extension::default(),
        }
    }

    /// The next entry, or `None` at the archive's end. What was not read of the last one is skipped.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        self.extension = Extension::default();
        loop {
            self.finish_entry()?;
            let Some(block) = self.read_header()? else {
                return Ok(None);
            };
            let header = tar::Header::from_byte_slice(&block);
            let size = tar_fields::size(header)?;
            match header.as_old().linkflag {
                [flag @ (b'x' | b'L' | b'K' | b'g')] => {
                    let content = self.read_extension(size)?;
                    self.extension.add(flag, &content)?;
                }
                _ => return self.entry(header, size).map(Some),
            }
        }
    }

    fn entry(&mut self, header: &tar::Header, size: u64) -> Result<TarEntry, TarError> {
        let extension = std::mem::take(&mut self.extension);
        let mut entry = tar_fields::entry(header, extension, size)?;
        for (what, bytes) in [("name", &entry.name), ("link target", &entry.link)] {
            if bytes.len() > self.limits.path_bytes {
                let limit = format!("{} bytes in a {what}", self.limits.path_bytes);
                return Err(TarError::Limit(limit));
            }
            if bytes.contains(&0) {
                return Err(TarError::Malformed(format!("a {what} has a zero byte")));
            }
        }
        entry.offset = self.offset;
        self.expect_content(entry.size);
        Ok(entry)
    }

    fn expect_content(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64).wrapping_sub(size % BLOCK as u64) % BLOCK as u64;
    }

    /// Skips what is left of the current entry.
    fn finish_entry(&mut self) -> Result<(), TarError> {
        let rest = self
            .left
            .checked_add(self.padding)
            .and_then(|rest| Some((rest, self.offset.checked_add(rest)?)));
        let Some((rest, offset)) = rest else {
            return Err(TarError::Malformed(
                "an entry's size is out of range".into(),
            ));
        };
        if rest > 0 {
            self.inner.skip(rest)?;
        }
        self.offset = offset;
        self.left = 0;
        self.padding = 0;
        Ok(())
    }

    /// The next header block; `None` at the end mark, or where the stream ends without one.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while let Some(room) = block.get_mut(filled..)
            && !room.is_empty()
        {
            match self.inner.read(room) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Truncated),
                Ok(read) => filled = filled.saturating_add(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.offset = self.offset.saturating_add(BLOCK as u64);
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        tar_fields::verify_checksum(&block)?;
        Ok(Some(block))
    }

    fn read_extension(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        if size > self.limits.extension_bytes {
            let limit = format!(
                "{} bytes in an extended header",
                self.limits.extension_bytes
            );
            return Err(TarError::Limit(limit));
        }
        self.expect_content(size);
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        Ok(content)
    }
}

impl<R: Read> Read for TarReader<'_, R> {
    /// Reads content; a stream that ends before the content does is an `UnexpectedEof`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(window) = buffer.get_mut(..room).filter(|window| !window.is_empty()) else {
            return Ok(0);
        };
        let read = self.inner.read(window)?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(read as u64);
        self.offset = self.offset.saturating_add(read as u64);
        Ok(read)
    }
}

#[cfg(test)]
#[path = "tar_reader_tests.rs"]
mod tests;
