//! Directories and files made inside a root whose content is hostile, without allocation.

use std::ffi::CStr;
use std::os::fd::RawFd;

use super::sys::{self, Errno, SysResult};

/// Links in links that making a missing directory follows.
const MAX_LINKS: usize = 16;

/// A path that is being made, on the stack: the child allocates nothing.
struct PathBuffer {
    bytes: [u8; libc::PATH_MAX as usize],
    length: usize,
}

impl PathBuffer {
    fn new(path: &[u8]) -> SysResult<Self> {
        let mut buffer = Self {
            bytes: [0; libc::PATH_MAX as usize],
            length: 0,
        };
        buffer.push(path)?;
        Ok(buffer)
    }

    /// Appends; there is always a NUL behind the path.
    fn push(&mut self, part: &[u8]) -> SysResult {
        let end = self
            .length
            .checked_add(part.len())
            .ok_or(Errno(libc::ENAMETOOLONG))?;
        if end >= self.bytes.len() {
            return Err(Errno(libc::ENAMETOOLONG));
        }
        let place = self
            .bytes
            .get_mut(self.length..end)
            .ok_or(Errno(libc::ENAMETOOLONG))?;
        place.copy_from_slice(part);
        self.length = end;
        Ok(())
    }

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// The prefix of `length` bytes, for as long as `f` runs.
    fn with_prefix<T>(&mut self, length: usize, f: impl FnOnce(&CStr) -> T) -> T {
        let saved = self.bytes.get(length).copied().unwrap_or(0);
        if let Some(byte) = self.bytes.get_mut(length) {
            *byte = 0;
        }
        let result = f(CStr::from_bytes_until_nul(&self.bytes).unwrap_or(c"/"));
        if let Some(byte) = self.bytes.get_mut(length) {
            *byte = saved;
        }
        result
    }
}

/// The end of the path component that starts at or after `from`, and where it starts.
fn next_component(path: &[u8], from: usize) -> Option<(usize, usize)> {
    let start = from + path.get(from..)?.iter().position(|b| *b != b'/')?;
    let rest = path.get(start..)?;
    Some((
        start,
        start + rest.iter().position(|b| *b == b'/').unwrap_or(rest.len()),
    ))
}

/// Opens the directory `path` inside `root`, making what is missing of it. Links are followed inside the root only,
/// also those whose target is yet to be made. The mode of new directories is 0755.
pub(super) fn ensure_directory(root: RawFd, path: &CStr) -> SysResult<RawFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    match sys::open_in_root(root, path, flags, 0) {
        Err(Errno(libc::ENOENT)) => {}
        other => return other,
    }
    let mut path = PathBuffer::new(path.to_bytes())?;
    if let Some(fd) = make_leaf(root, &mut path)? {
        return Ok(fd);
    }
    let mut links = 0;
    let mut parent_end = 0;
    while let Some((start, end)) = next_component(path.as_bytes(), parent_end) {
        match path.with_prefix(end, |prefix| sys::open_in_root(root, prefix, flags, 0)) {
            Ok(fd) => {
                sys::close(fd);
                parent_end = end;
                continue;
            }
            Err(Errno(libc::ENOENT)) => {}
            Err(errno) => return Err(errno),
        }
        let parent = if parent_end == 0 {
            sys::open_in_root(root, c"/", flags, 0)?
        } else {
            path.with_prefix(parent_end, |prefix| {
                sys::open_in_root(root, prefix, flags, 0)
            })?
        };
        let name = PathBuffer::new(path.as_bytes().get(start..end).unwrap_or_default())?;
        let made = make_component(parent, name, links < MAX_LINKS);
        sys::close(parent);
        match made? {
            Made::Directory => parent_end = end,
            Made::Link(target) => {
                links += 1;
                path = splice(&path, parent_end, &target, end)?;
                parent_end = 0;
            }
        }
    }
    path.with_prefix(path.length, |path| sys::open_in_root(root, path, flags, 0))
}

/// The usual case at the least cost: only the last component is missing. None if it is not that simple.
fn make_leaf(root: RawFd, path: &mut PathBuffer) -> SysResult<Option<RawFd>> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let Some(slash) = path.as_bytes().iter().rposition(|b| *b == b'/') else {
        return Ok(None);
    };
    let leaf = slash.saturating_add(1);
    if slash == 0 || leaf >= path.length {
        return Ok(None);
    }
    let Ok(parent) = path.with_prefix(slash, |dir| sys::open_in_root(root, dir, flags, 0)) else {
        return Ok(None);
    };
    let name = path
        .bytes
        .get(leaf..)
        .and_then(|rest| CStr::from_bytes_until_nul(rest).ok());
    let made = sys::mkdirat(parent, name.unwrap_or(c""), 0o755);
    sys::close(parent);
    if made.is_err() {
        return Ok(None);
    }
    path.with_prefix(path.length, |path| sys::open_in_root(root, path, flags, 0))
        .map(Some)
}

#[allow(
    clippy::large_enum_variant,
    reason = "it lives on the stack of a child that cannot allocate"
)]
enum Made {
    Directory,
    /// There is a link already, to this place, where nothing is.
    Link(PathBuffer),
}

fn make_component(parent: RawFd, mut name: PathBuffer, follow: bool) -> SysResult<Made> {
    let length = name.length;
    name.with_prefix(length, |name| match sys::mkdirat(parent, name, 0o755) {
        Ok(()) => Ok(Made::Directory),
        Err(Errno(libc::EEXIST)) if follow => {
            let mut target = PathBuffer::new(b"")?;
            target.length = sys::readlinkat(parent, name, &mut target.bytes)?;
            if target.length == 0 || target.length >= target.bytes.len() {
                return Err(Errno(libc::ENAMETOOLONG));
            }
            Ok(Made::Link(target))
        }
        Err(Errno(libc::EEXIST)) => Err(Errno(libc::ELOOP)),
        Err(errno) => Err(errno),
    })
}

/// The path with the component between `parent_end` and `end` replaced by what it links to.
fn splice(
    path: &PathBuffer,
    parent_end: usize,
    target: &PathBuffer,
    end: usize,
) -> SysResult<PathBuffer> {
    let bytes = path.as_bytes();
    let absolute = target.as_bytes().first() == Some(&b'/');
    let prefix = if absolute {
        &[]
    } else {
        bytes.get(..parent_end).unwrap_or_default()
    };
    let mut result = PathBuffer::new(prefix)?;
    result.push(b"/")?;
    result.push(target.as_bytes())?;
    result.push(bytes.get(end..).unwrap_or_default())?;
    Ok(result)
}

/// Opens the file `path` inside `root` as a mount point, making it and its directory if missing. It must not be a
/// directory.
pub(super) fn ensure_file(root: RawFd, path: &CStr) -> SysResult<RawFd> {
    match sys::open_in_root(root, path, libc::O_PATH, 0) {
        Err(Errno(libc::ENOENT)) => {}
        other => return other,
    }
    let mut buffer = PathBuffer::new(path.to_bytes())?;
    let slash = buffer
        .as_bytes()
        .iter()
        .rposition(|b| *b == b'/')
        .unwrap_or(0);
    if slash > 0 {
        let parent = buffer.with_prefix(slash, |parent| ensure_directory(root, parent))?;
        sys::close(parent);
    }
    // O_CREAT follows a dangling link of the image, but stays inside the root.
    let flags = libc::O_CREAT | libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    sys::close(sys::open_in_root(root, path, flags, 0o644)?);
    sys::open_in_root(root, path, libc::O_PATH, 0)
}

#[cfg(test)]
mod tests;
