//! Users and groups, by the container's own `/etc/passwd` and `/etc/group`.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::image::{Context, Error, Result};

/// Bytes of the largest `/etc/passwd` or `/etc/group` that is read.
const FILE_BYTES: u64 = 8 << 20;
/// Additional groups of one process (the kernel's NGROUPS_MAX).
const GROUPS: usize = 65536;
/// The largest id that docker and runc take.
const MAX_ID: u32 = i32::MAX as u32;

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedUser {
    /// The user's id.
    pub uid: u32,
    /// The primary group's id.
    pub gid: u32,
    /// All groups, the primary one first.
    pub groups: Vec<u32>,
    /// The home directory; `/` for a user that `/etc/passwd` does not have.
    pub home: String,
}

/// Finds `user`: nothing (which is root), `NAME`, `UID`, `NAME:GROUP`, or `UID:GID` and the like, in the
/// root file system at `rootfs`.
///
/// As docker does it: an id needs no entry; a name does. Without a group, the user's primary group and
/// all groups that list the user apply; with one, only that.
pub fn resolve(user: &str, rootfs: &Path) -> Result<ResolvedUser> {
    let passwd = read_etc(rootfs, "etc/passwd")?;
    let group = read_etc(rootfs, "etc/group")?;
    resolve_in(user, &passwd, &group)
}

/// As [`resolve`], with the files' contents.
pub fn resolve_in(user: &str, passwd: &str, group: &str) -> Result<ResolvedUser> {
    let refused = |(reason, missing): Refusal| Error::User {
        user: user.chars().take(256).collect(),
        reason,
        missing,
    };
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let name = if name.is_empty() { "0" } else { name };
    let id = id(name).map_err(refused)?;
    let accounts = || passwd.lines().filter_map(Account::parse);
    let account = accounts()
        .find(|account| account.name == name)
        .or_else(|| accounts().find(|account| Some(account.uid) == id));
    let (uid, primary, home) = match (&account, id) {
        (Some(account), _) => (account.uid, account.gid, account.home),
        (None, Some(uid)) => (uid, 0, ""),
        (None, None) => {
            let reason = "there is no such user in the image's /etc/passwd";
            return Err(refused((reason.to_owned(), true)));
        }
    };
    let groups = match group_name {
        Some(name) => find_group(name, group).map(|gid| vec![gid]),
        None => memberships(account.as_ref(), primary, group),
    };
    let groups = groups.map_err(refused)?;
    Ok(ResolvedUser {
        uid,
        gid: groups.first().copied().unwrap_or(primary),
        groups,
        home: if home.is_empty() { "/" } else { home }.to_owned(),
    })
}

/// Why a user or group was not found, and whether it just does not exist.
type Refusal = (String, bool);

/// The id of the group `name`, which may be an id itself.
fn find_group(name: &str, groups: &str) -> std::result::Result<u32, Refusal> {
    let id = id(name)?;
    let mut known = groups.lines().filter_map(Group::parse);
    let known = known.find(|group| group.name == name);
    known.map(|group| group.gid).or(id).ok_or_else(|| {
        let reason = format!("there is no group {name:?} in the image's /etc/group");
        (reason, true)
    })
}

/// The primary group, and all that list the user.
fn memberships(
    account: Option<&Account<'_>>,
    primary: u32,
    groups: &str,
) -> std::result::Result<Vec<u32>, Refusal> {
    let mut gids = vec![primary];
    let mut seen = HashSet::from([primary]);
    let Some(account) = account else {
        return Ok(gids);
    };
    let all = groups.lines().filter_map(Group::parse);
    for group in all.filter(|group| group.has(account.name)) {
        if seen.insert(group.gid) {
            if gids.len() >= GROUPS {
                return Err((format!("it is in more than {GROUPS} groups"), false));
            }
            gids.push(group.gid);
        }
    }
    Ok(gids)
}

/// `text` as an id; `None` if it is a name.
fn id(text: &str) -> std::result::Result<Option<u32>, Refusal> {
    if !text.bytes().all(|c| c.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => {
            let text: String = text.chars().take(20).collect();
            Err((format!("the id {text} is larger than {MAX_ID}"), false))
        }
    }
}

/// A line of passwd(5).
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    /// `None` for a line that is not one: what cannot be read must not become user 0.
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.trim().split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let uid = id(fields.nth(1)?.trim()).ok()??;
        let gid = id(fields.next()?.trim()).ok()??;
        let home = fields.nth(1).unwrap_or_default();
        Some(Self {
            name,
            uid,
            gid,
            home,
        })
    }
}

/// A line of group(5).
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

impl<'a> Group<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.trim().split(':');
        let name = fields
            .next()
            .filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let gid = id(fields.nth(1)?.trim()).ok()??;
        Some(Self {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    }

    fn has(&self, user: &str) -> bool {
        self.members.split(',').any(|member| member.trim() == user)
    }
}

/// Reads a text file of the container; none is as good as an empty one. Its links are followed as the
/// container would, and nothing but a regular file is opened.
fn read_etc(rootfs: &Path, name: &str) -> Result<String> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(rootfs, flags, Mode::empty())
        .context("open the root file system", rootfs)?;
    let path = rootfs.join(name);
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = loop {
        match rustix::fs::openat2(&root, name, flags, Mode::empty(), resolve) {
            Ok(found) => break found,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
            Err(error) => return Err(error).context("open", &path),
        }
    };
    let stat = rustix::fs::fstat(&found).context("look at", &path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::Malformed {
            what: path.display().to_string(),
            reason: "it is not a regular file".to_owned(),
        });
    }
    let again = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let file = File::open(again).context("open", &path)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES.saturating_add(1))
        .read_to_end(&mut bytes)
        .context("read", &path)?;
    if bytes.len() as u64 > FILE_BYTES {
        return Err(Error::Limit {
            what: path.display().to_string(),
            limit: format!("{FILE_BYTES} bytes"),
        });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
#[path = "user_tests.rs"]
mod tests;
