//! One entry of a layer, made.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::root::{Refused, Root, components, stays_beneath};
use crate::image::error::{Error, Result};
use crate::image::tar_reader::{Kind, TarEntry, Time};

/// The prefix of names that take entries of lower layers away.
const WHITEOUT: &[u8] = b".wh.";
/// The name that takes away all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The prefix of aufs's own files, which docker never meant to be unpacked.
const AUFS: &[u8] = b".wh..wh.";
/// How overlayfs knows an opaque directory, in mounts that root makes.
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";

type Made<T> = std::result::Result<T, Refused>;

/// Unpacks entries one after the other.
pub(super) struct Unpacker<'a> {
    root: Root,
    trash: Root,
    trashed: u64,
    layer: &'a str,
}

/// What is already where an entry goes, after what had to go was put away.
#[derive(PartialEq)]
enum Before {
    Nothing,
    Directory,
    /// It was a whiteout: a directory in its place must be opaque.
    Whiteout,
}

fn host<E: Into<io::Error>>(action: &'static str) -> impl Fn(E) -> Refused {
    move |error| Refused::Host(action, error.into())
}

fn refuse<T>(reason: &str) -> Made<T> {
    Err(Refused::Layer(reason.to_owned()))
}

impl<'a> Unpacker<'a> {
    /// Unpacks to the directory `fs`; replaced things go to the directory `trash`, on the same file
    /// system.
    pub fn new(fs: &Path, trash: &Path, layer: &'a str) -> Result<Self> {
        Ok(Self {
            root: Root::open(fs)?,
            trash: Root::open(trash)?,
            trashed: 0,
            layer,
        })
    }

    /// Makes `entry`, whose content `data` is.
    pub fn apply(&mut self, entry: &TarEntry, data: &mut impl Read) -> Result<()> {
        let layer = self.layer;
        self.make(entry, data).map_err(|refused| {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            match refused {
                Refused::Layer(reason) => Error::Entry {
                    layer: layer.to_owned(),
                    entry: name,
                    reason,
                },
                Refused::Host(action, source) => Error::EntryIo {
                    layer: layer.to_owned(),
                    entry: name,
                    action,
                    source,
                },
            }
        })
    }

    fn make(&mut self, entry: &TarEntry, data: &mut impl Read) -> Made<()> {
        if let Kind::Other(flag) = entry.kind {
            let flag = char::from(flag).escape_default();
            return Err(Refused::Layer(format!(
                "entries of type '{flag}' are not supported"
            )));
        }
        let Some(path) = components(&entry.name) else {
            return refuse("its name leads out of the layer");
        };
        let Some((base, parents)) = path.split_last() else {
            return self.make_root(entry);
        };
        if base.starts_with(WHITEOUT) {
            return self.whiteout(base, parents);
        }
        let parent = self.root.make_directory(parents)?;
        let times = times_of(parent.as_fd())?;
        let before = self.clear(parent.as_fd(), base, entry.kind)?;
        match entry.kind {
            Kind::Directory => make_dir(parent.as_fd(), base, entry, &before)?,
            Kind::File => make_file(parent.as_fd(), base, entry, data)?,
            Kind::HardLink => self.hard_link(parent.as_fd(), base, entry)?,
            Kind::Symlink => {
                if !stays_beneath(parents, &entry.link) {
                    return refuse("it is a symbolic link that leads out of the layer");
                }
                make_symlink(parent.as_fd(), base, entry)?;
            }
            Kind::Character | Kind::Block | Kind::Fifo => {
                make_special(parent.as_fd(), base, entry)?;
            }
            Kind::Other(_) => {}
        }
        restore(parent.as_fd(), &times)
    }

    /// The layer's own root has an entry, too: `./`.
    fn make_root(&self, entry: &TarEntry) -> Made<()> {
        if entry.kind != Kind::Directory {
            return refuse("it would replace the layer's root");
        }
        let root = self
            .root
            .directory(&[])
            .map_err(host("open the layer's root"))?;
        dress(root.as_fd(), entry)
    }

    fn whiteout(&mut self, base: &[u8], parents: &[&[u8]]) -> Made<()> {
        if base == OPAQUE {
            let dir = self.root.make_directory(parents)?;
            return set_opaque(dir.as_fd());
        }
        if base.starts_with(AUFS) {
            return Ok(());
        }
        let name = base.strip_prefix(WHITEOUT).unwrap_or_default();
        if matches!(name, b"" | b"." | b"..") {
            return refuse("it takes away nothing that can have a name");
        }
        let parent = self.root.make_directory(parents)?;
        let times = times_of(parent.as_fd())?;
        // A whiteout hides what lower layers have, not what this one has: a directory of this layer
        // stays and only stops showing theirs; anything else hides theirs anyway.
        match file_type(parent.as_fd(), name)? {
            None => {
                let (kind, mode) = (FileType::CharacterDevice, Mode::empty());
                rustix::fs::mknodat(&parent, name, kind, mode, rustix::fs::makedev(0, 0))
                    .map_err(host("make a whiteout"))?;
            }
            Some((FileType::Directory, _)) => {
                set_opaque(open_dir(parent.as_fd(), name)?.as_fd())?;
            }
            Some(_) => {}
        }
        restore(parent.as_fd(), &times)
    }

    /// Puts away what an earlier entry made at `base`. Directories stay for directories.
    fn clear(&mut self, parent: BorrowedFd<'_>, base: &[u8], kind: Kind) -> Made<Before> {
        let before = match file_type(parent, base)? {
            None => return Ok(Before::Nothing),
            Some((FileType::Directory, _)) if kind == Kind::Directory => {
                return Ok(Before::Directory);
            }
            Some((FileType::CharacterDevice, 0)) => Before::Whiteout,
            Some(_) => Before::Nothing,
        };
        let trash = self.trash.directory(&[]).map_err(host("open the trash"))?;
        let name = self.trashed.to_string();
        self.trashed = self.trashed.saturating_add(1);
        rustix::fs::renameat(parent, base, trash, name.as_bytes())
            .map_err(host("put away what it replaces"))?;
        Ok(before)
    }

    fn hard_link(&self, parent: BorrowedFd<'_>, base: &[u8], entry: &TarEntry) -> Made<()> {
        let target = String::from_utf8_lossy(&entry.link).into_owned();
        let Some(path) = components(&entry.link) else {
            return refuse("it is a hard link that leads out of the layer");
        };
        let missing = || {
            Refused::Layer(format!(
                "it is a hard link to {target:?}, which is not in the layer"
            ))
        };
        let Some((target_base, target_parents)) = path.split_last() else {
            return refuse("it is a hard link to the layer's root");
        };
        let target_parent = self
            .root
            .directory(target_parents)
            .map_err(|error| match error {
                Errno::NOENT | Errno::NOTDIR | Errno::LOOP => missing(),
                error => Refused::Host("open the directory of its target", error.into()),
            })?;
        // Without AT_SYMLINK_FOLLOW: a symbolic link gets a second name, and is not followed.
        rustix::fs::linkat(&target_parent, *target_base, parent, base, AtFlags::empty()).map_err(
            |error| match error {
                Errno::NOENT => missing(),
                Errno::PERM => {
                    Refused::Layer(format!("it is a hard link to {target:?}, a directory"))
                }
                error => Refused::Host("make the hard link", error.into()),
            },
        )
    }
}

/// The type of `name` in `dir`, links not followed, and its device number.
fn file_type(dir: BorrowedFd<'_>, name: &[u8]) -> Made<Option<(FileType, Dev)>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some((FileType::from_raw_mode(stat.st_mode), stat.st_rdev))),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NAMETOOLONG) => refuse("a component of its path is too long"),
        Err(error) => Err(Refused::Host("look at what it replaces", error.into())),
    }
}

fn open_dir(parent: BorrowedFd<'_>, name: &[u8]) -> Made<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(host("open the directory"))
}

fn set_opaque(dir: BorrowedFd<'_>) -> Made<()> {
    rustix::fs::fsetxattr(dir, OPAQUE_XATTR, b"y", XattrFlags::empty())
        .map_err(host("mark its directory as opaque"))
}

fn make_dir(parent: BorrowedFd<'_>, base: &[u8], entry: &TarEntry, before: &Before) -> Made<()> {
    if *before != Before::Directory {
        rustix::fs::mkdirat(parent, base, Mode::RWXU).map_err(host("make the directory"))?;
    }
    let dir = open_dir(parent, base)?;
    if *before == Before::Whiteout {
        set_opaque(dir.as_fd())?;
    }
    dress(dir.as_fd(), entry)
}

fn make_file(
    parent: BorrowedFd<'_>,
    base: &[u8],
    entry: &TarEntry,
    data: &mut impl Read,
) -> Made<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(parent, base, flags, Mode::RUSR | Mode::WUSR)
        .map_err(host("make the file"))?;
    let mut file = File::from(fd);
    match io::copy(data, &mut file) {
        Ok(_) => dress(file.as_fd(), entry),
        Err(error) => match error.kind() {
            io::ErrorKind::UnexpectedEof => refuse("the layer ends within its content"),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => Err(Refused::Layer(
                format!("its content cannot be decompressed: {error}"),
            )),
            _ => Err(Refused::Host("write its content", error)),
        },
    }
}

fn make_symlink(parent: BorrowedFd<'_>, base: &[u8], entry: &TarEntry) -> Made<()> {
    if entry.link.is_empty() {
        return refuse("it is a symbolic link without a target");
    }
    rustix::fs::symlinkat(entry.link.as_slice(), parent, base)
        .map_err(host("make the symbolic link"))?;
    dress_unopened(parent, base, entry)
}

fn make_special(parent: BorrowedFd<'_>, base: &[u8], entry: &TarEntry) -> Made<()> {
    let kind = match entry.kind {
        Kind::Character => FileType::CharacterDevice,
        Kind::Block => FileType::BlockDevice,
        _ => FileType::Fifo,
    };
    let (major, minor) = entry.device;
    let device = rustix::fs::makedev(major, minor);
    rustix::fs::mknodat(parent, base, kind, Mode::from_raw_mode(entry.mode), device)
        .map_err(host("make the device or pipe"))?;
    dress_unopened(parent, base, entry)
}

/// Owner, mode, attributes and times of an open file or directory. The order matters: a new owner
/// takes set-id bits and file capabilities away.
fn dress(fd: BorrowedFd<'_>, entry: &TarEntry) -> Made<()> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::fchown(fd, Some(uid), Some(gid)).map_err(host("set its owner"))?;
    rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)).map_err(host("set its mode"))?;
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_kept(name)) {
        let set = rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty());
        check_xattr(name, set)?;
    }
    rustix::fs::futimens(fd, &times(entry.mtime)).map_err(host("set its time"))
}

/// The same for what cannot be opened: links, devices, pipes. Nobody else writes here, so that `base`
/// is still what was just made.
fn dress_unopened(parent: BorrowedFd<'_>, base: &[u8], entry: &TarEntry) -> Made<()> {
    let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    let nofollow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(parent, base, Some(uid), Some(gid), nofollow)
        .map_err(host("set its owner"))?;
    if entry.kind != Kind::Symlink {
        let mode = Mode::from_raw_mode(entry.mode);
        rustix::fs::chmodat(parent, base, mode, AtFlags::empty()).map_err(host("set its mode"))?;
    }
    let path = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string());
    let path = path.join(OsStr::from_bytes(base));
    for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_kept(name)) {
        let set = rustix::fs::lsetxattr(&path, name.as_slice(), value, XattrFlags::empty());
        check_xattr(name, set)?;
    }
    rustix::fs::utimensat(parent, base, &times(entry.mtime), nofollow).map_err(host("set its time"))
}

fn is_kept(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || matches!(
            name,
            b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default"
        )
}

fn check_xattr(name: &[u8], set: rustix::io::Result<()>) -> Made<()> {
    match set {
        // A store without such attributes, or `user.*` on a link: containerd goes on without, too. A
        // program that loses its capabilities, however, is another program.
        Err(Errno::OPNOTSUPP | Errno::PERM) if name != b"security.capability" => {
            tracing::debug!(name = %name.escape_ascii(), "extended attribute not supported here");
            Ok(())
        }
        Err(Errno::INVAL | Errno::RANGE) => Err(Refused::Layer(format!(
            "its attribute {} has a bad value",
            name.escape_ascii()
        ))),
        result => result.map_err(host("set its extended attributes")),
    }
}

fn times(mtime: Time) -> Timestamps {
    let time = Timespec {
        tv_sec: mtime.seconds,
        tv_nsec: mtime.nanoseconds.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// The times of a directory in which an entry is about to be made.
fn times_of(dir: BorrowedFd<'_>) -> Made<Timestamps> {
    let stat = rustix::fs::fstat(dir).map_err(host("look at its parent directory"))?;
    let mtime = stat.st_mtime;
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    Ok(times(Time {
        seconds: mtime,
        nanoseconds,
    }))
}

/// Sets a directory's times back, so that they are what its own entry said, in whatever order.
fn restore(dir: BorrowedFd<'_>, times: &Timestamps) -> Made<()> {
    rustix::fs::futimens(dir, times).map_err(host("set the time of its parent directory"))
}
