//! Paths of a layer, resolved inside of the layer's directory and nowhere else.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::image::error::{Context, Result};

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);

/// The directory that a layer is unpacked to.
pub(super) struct Root {
    fd: OwnedFd,
}

/// Why a directory of a layer cannot be had.
pub(super) enum Refused {
    /// What the layer itself is at fault for.
    Layer(String),
    /// What the host failed to do.
    Host(&'static str, std::io::Error),
}

impl Refused {
    fn host(action: &'static str) -> impl Fn(Errno) -> Self {
        move |error| Self::Host(action, error.into())
    }
}

impl Root {
    /// Opens `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let fd = rustix::fs::open(dir, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
            .context("open the directory", dir)?;
        Ok(Self { fd })
    }

    /// The directory of `components`; symbolic links on the way are followed as in a chroot.
    pub fn directory(&self, components: &[&[u8]]) -> rustix::io::Result<OwnedFd> {
        let path = if components.is_empty() {
            b".".to_vec()
        } else {
            components.join(&b'/')
        };
        // No mount is beneath a layer that is being made; if there is one, it is not ours to write to.
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match rustix::fs::openat2(&self.fd, path.as_slice(), DIRECTORY, Mode::empty(), resolve)
            {
                // A rename somewhere on the host raced with `..`: the kernel asks to try again.
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return result,
            }
        }
    }

    /// As [`directory`](Self::directory); directories that are missing are made.
    pub fn make_directory(&self, components: &[&[u8]]) -> std::result::Result<OwnedFd, Refused> {
        match self.directory(components) {
            Err(Errno::NOENT) => {}
            result => return result.map_err(|error| explain(error, components)),
        }
        let mut parent = self
            .directory(&[])
            .map_err(Refused::host("open the layer's root"))?;
        for (index, component) in components.iter().enumerate() {
            let path = components.get(..=index).unwrap_or(components);
            parent = match self.directory(path) {
                Err(Errno::NOENT) => {
                    make_implicit(parent.as_fd(), component)?;
                    self.directory(path)
                }
                result => result,
            }
            .map_err(|error| explain(error, path))?;
        }
        Ok(parent)
    }
}

fn make_implicit(parent: impl AsFd, name: &[u8]) -> std::result::Result<(), Refused> {
    match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
        // mkdir does not follow a link, but the path above does.
        Err(Errno::EXIST) => {
            let name = String::from_utf8_lossy(name).into_owned();
            return Err(Refused::Layer(format!(
                "its parent {name:?} is a symbolic link that leads nowhere in the layer"
            )));
        }
        result => result.map_err(Refused::host("make its parent directory"))?,
    }
    // The process's umask must not show in an image.
    let flags = rustix::fs::AtFlags::empty();
    rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(0o755), flags)
        .map_err(Refused::host("set the mode of its parent directory"))
}

fn explain(error: Errno, path: &[&[u8]]) -> Refused {
    let path = String::from_utf8_lossy(&path.join(&b'/')).into_owned();
    match error {
        Errno::NOTDIR => Refused::Layer(format!("its parent {path:?} is not a directory")),
        Errno::LOOP => Refused::Layer(format!("its parent {path:?} is a loop of symbolic links")),
        Errno::NAMETOOLONG => Refused::Layer("a component of its path is too long".to_owned()),
        error => Refused::Host("open its parent directory", error.into()),
    }
}

/// The components of a path, taken from the layer's root; `.` and empty ones are left out, and `..`
/// takes the one before it away. `None` if that would climb above the root.
pub(super) fn components(path: &[u8]) -> Option<Vec<&[u8]>> {
    climb(Vec::new(), path)
}

/// Whether a symbolic link in the directory `from` that says `target` stays beneath the root, as far
/// as the text tells. Absolute targets do: a container's root is that of its links.
pub(super) fn stays_beneath(from: &[&[u8]], target: &[u8]) -> bool {
    target.starts_with(b"/") || climb(from.to_vec(), target).is_some()
}

fn climb<'a>(mut parts: Vec<&'a [u8]>, path: &'a [u8]) -> Option<Vec<&'a [u8]>> {
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            _ => parts.push(part),
        }
    }
    Some(parts)
}
