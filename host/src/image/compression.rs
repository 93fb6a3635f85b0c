//! Decompression by what a stream's first bytes say, as docker and containerd do it.

use std::fs::File;
use std::io::{self, BufReader, Chain, Cursor, Read};
use std::os::unix::fs::FileExt;

use super::tar_reader::Skip;

/// How a stream is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
}

const MAGIC_BYTES: usize = 4;

fn detect(magic: &[u8]) -> Option<Compression> {
    match magic {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd] => Some(Compression::Zstd),
        // A zstd skippable frame, which some writers put first.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Some(Compression::Zstd),
        _ => None,
    }
}

/// How a file is compressed, or `None`; the file's position stays.
pub(crate) fn of(file: &File) -> io::Result<Option<Compression>> {
    let mut magic = [0; MAGIC_BYTES];
    let mut filled = 0;
    while let Some(room) = magic.get_mut(filled..)
        && !room.is_empty()
    {
        match file.read_at(room, filled as u64)? {
            0 => break,
            read => filled = filled.saturating_add(read),
        }
    }
    Ok(detect(magic.get(..filled).unwrap_or_default()))
}

type Restored<R> = Chain<Cursor<Vec<u8>>, R>;

/// The uncompressed form of a stream. Memory is bounded: gzip's window is 32 KiB, and zstd refuses
/// windows above 128 MiB unless told otherwise.
pub(crate) enum Decompressed<R: Read> {
    /// Not compressed.
    Plain(Restored<R>),
    /// Gzip, of one or more members.
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<Restored<R>>>>),
    /// Zstd, of one or more frames.
    Zstd(zstd::stream::read::Decoder<'static, BufReader<Restored<R>>>),
}

/// Looks at a stream's beginning and decompresses it.
pub(crate) fn reader<R: Read>(mut inner: R) -> io::Result<Decompressed<R>> {
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    inner
        .by_ref()
        .take(MAGIC_BYTES as u64)
        .read_to_end(&mut magic)?;
    let compression = detect(&magic);
    let whole = Cursor::new(magic).chain(inner);
    Ok(match compression {
        None => Decompressed::Plain(whole),
        Some(Compression::Gzip) => {
            let buffered = BufReader::with_capacity(64 << 10, whole);
            Decompressed::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(buffered)))
        }
        Some(Compression::Zstd) => {
            let buffered = BufReader::with_capacity(64 << 10, whole);
            Decompressed::Zstd(zstd::stream::read::Decoder::with_buffer(buffered)?)
        }
    })
}

impl<R: Read> Decompressed<R> {
    /// The compressed stream, of which some may have been read ahead.
    pub fn into_inner(self) -> R {
        match self {
            Self::Plain(chain) => chain.into_inner().1,
            Self::Gzip(decoder) => decoder.into_inner().into_inner().into_inner().1,
            Self::Zstd(decoder) => decoder.finish().into_inner().into_inner().1,
        }
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(reader) => reader.read(buffer),
            Self::Gzip(reader) => reader.read(buffer),
            Self::Zstd(reader) => reader.read(buffer),
        }
    }
}

impl<R: Read> Skip for Decompressed<R> {}
