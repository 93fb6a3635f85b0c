//! The probe's file server: what its thread can do in the shared directory, and cannot elsewhere.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, FileSystem, FsOptions, GetxattrReply, SetattrValid,
};
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::probe::{call, open, say, wait_for_line};

/// The calls that the server makes in the name of a guest's user.
pub fn as_users() {
    let as_user = |uid: i64, gid: i64| {
        // SAFETY: no memory operands.
        call(unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) }).unwrap();
        // SAFETY: no memory operands.
        call(unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) }).unwrap();
    };
    as_user(1000, 1001);
    say("create as 1000", fs::write("/share/files/of-1000", "hello"));
    // The guest's kernel has checked; the server does not know the user's other groups.
    say(
        "create in a foreign directory",
        fs::write("/share/files/private/of-1000", "hello"),
    );
    as_user(0, 0);
    say("create as 0", fs::write("/share/files/of-0", "hello"));
    say(
        "chown",
        rustix::fs::chownat(
            CWD,
            "/share/files/of-0",
            Some(rustix::fs::Uid::from_raw(3)),
            Some(rustix::fs::Gid::from_raw(4)),
            rustix::fs::AtFlags::SYMLINK_NOFOLLOW,
        )
        .map_err(io::Error::from),
    );
    as_user(4_000_000_000, 0);
    say(
        "create as 4000000000",
        fs::write("/share/files/of-many", ""),
    );
    as_user(0, 0);
    rustix::fs::mkdirat(CWD, "/share/files/d", Mode::RWXU).unwrap();
    say("rename", move_into_directory());
    // Revision 2, effective, CAP_NET_RAW: what installing ping does.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let set = rustix::fs::setxattr(
        "/share/files/of-1000",
        "security.capability",
        &capability,
        rustix::fs::XattrFlags::empty(),
    );
    say("file capability", set.map_err(io::Error::from));
    let own = fs::File::open("/share/files/of-0").unwrap();
    say(
        "reopen by descriptor",
        open(&format!("/proc/self/fd/{}", own.as_raw_fd())),
    );
}

/// As the server does it; std and rustix use older calls.
fn move_into_directory() -> io::Result<()> {
    let (from, to) = (c"/share/files/of-many", c"/share/files/d/of-many");
    // SAFETY: both paths are terminated.
    call(unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            libc::AT_FDCWD,
            from.as_ptr(),
            libc::AT_FDCWD,
            to.as_ptr(),
            0,
        )
    })
}

/// Ways out of the shared directory.
pub fn escape() {
    say("..", fs::write("/share/../escaped", ""));
    say("../..", fs::write("/share/files/d/../../escaped", ""));
    say(
        "absolute symbolic link",
        fs::write("/share/files/to-passwd", ""),
    );
    say(
        "relative symbolic link",
        fs::write("/share/files/up/etc/passwd", ""),
    );
    say("vsock", fs::write("/vsock/escaped", ""));
    // Names that the host will make and trust.
    let next = "/share/next";
    say(
        "a name of the host's",
        rustix::fs::mkdirat(CWD, next, Mode::RWXU).map_err(io::Error::from),
    );
    say(
        "a link for the host",
        rustix::fs::symlinkat("/etc", CWD, next).map_err(io::Error::from),
    );
    say(
        "link",
        fs::hard_link("/proc/self/mountinfo", "/share/files/linked"),
    );
    let device = rustix::fs::makedev(1, 3);
    let made = rustix::fs::mknodat(
        CWD,
        "/share/files/null",
        FileType::CharacterDevice,
        Mode::RUSR,
        device,
    );
    say("device", made.map_err(io::Error::from));
    let sets = CapabilitySets {
        effective: CapabilitySet::SYS_ADMIN,
        permitted: CapabilitySet::SYS_ADMIN,
        inheritable: CapabilitySet::empty(),
    };
    say(
        "raise",
        rustix::thread::set_capabilities(None, sets).map_err(io::Error::from),
    );
}

/// Uses a file system that the host mounts after the jail was closed.
pub fn later_mount() {
    println!("ready");
    wait_for_line();
    say("read", fs::read_to_string("/share/later/lower").map(drop));
    say("write", fs::write("/share/later/written", "from the jail"));
}

/// The real server, made as the device makes it: in main, before a thread is confined.
pub fn server() -> PassthroughFs {
    let config = Config {
        root_dir: "/share/files".to_owned(),
        cache_policy: CachePolicy::Auto,
        xattr: true,
        killpriv_v2: true,
        ..Config::default()
    };
    let server = PassthroughFs::new(config).unwrap();
    server.import().unwrap();
    server
}

const ROOT: u64 = 1;
const NAME: &CStr = c"served";
const XATTR: &CStr = c"user.test";

/// One of each request: the filter must have every call that the server makes of them.
pub fn serve(server: &PassthroughFs) {
    let mut user = Context::new();
    (user.uid, user.gid) = (1000, 1001);
    let user = &user;
    server.init(FsOptions::all()).unwrap();
    let create = CreateIn {
        flags: (libc::O_CREAT | libc::O_RDWR) as u32,
        mode: libc::S_IFREG | 0o640,
        umask: 0o22,
        fuse_flags: 0,
    };
    let (file, handle, ..) = server.create(user, ROOT, NAME, create).unwrap();
    let (file, handle) = (file.inode, handle.unwrap());
    say(
        "fallocate",
        server.fallocate(user, file, handle, 0, 0, 8192),
    );
    say("fsync", server.fsync(user, file, false, handle));
    say("fdatasync", server.fsync(user, file, true, handle));
    let hole = libc::SEEK_HOLE as u32;
    say("seek", server.lseek(user, file, handle, 0, hole).map(drop));
    say("flush", server.flush(user, file, handle, 0));
    let released = server.release(user, file, 0, handle, false, false, None);
    say("release", released);
    requests_by_inode(server, user, file);
    requests_by_name(server, user);
    server.destroy();
    say("import again", server.import());
}

fn requests_by_inode(server: &PassthroughFs, user: &Context, file: u64) {
    // Attributes change hands: the guest's root does it.
    let root = &Context::new();
    let (mut attributes, _) = server.getattr(user, file, None).unwrap();
    attributes.st_size = 5;
    attributes.st_mode = libc::S_IFREG | 0o600;
    (attributes.st_uid, attributes.st_gid) = (7, 8);
    let every = SetattrValid::SIZE
        | SetattrValid::MODE
        | SetattrValid::UID
        | SetattrValid::GID
        | SetattrValid::MTIME;
    let changed = server.setattr(root, file, attributes, None, every);
    say("setattr", changed.map(drop));
    say("setxattr", server.setxattr(user, file, XATTR, b"value", 0));
    match server.getxattr(user, file, XATTR, 64) {
        Ok(GetxattrReply::Value(value)) => assert_eq!(value, b"value"),
        Ok(GetxattrReply::Count(count)) => panic!("a count of {count}"),
        Err(error) => say("getxattr", Err(error)),
    }
    say("listxattr", server.listxattr(user, file, 64).map(drop));
    say("removexattr", server.removexattr(user, file, XATTR));
    say("statfs", server.statfs(user, file).map(drop));
    let opened = server.open(user, file, libc::O_RDWR as u32, 0);
    say("open", opened.map(drop));
}

/// As the device does it: the server's own way needs `CAP_DAC_READ_SEARCH`.
fn link_by_descriptor() -> io::Result<()> {
    let served = rustix::fs::openat(CWD, "/share/files/served", OFlags::PATH, Mode::empty())?;
    let path = format!("/proc/self/fd/{}", served.as_raw_fd());
    let follow = AtFlags::SYMLINK_FOLLOW;
    Ok(rustix::fs::linkat(
        CWD,
        path,
        CWD,
        "/share/files/directory/link",
        follow,
    )?)
}

fn requests_by_name(server: &PassthroughFs, user: &Context) {
    let root = &Context::new();
    let directory = server.mkdir(root, ROOT, c"directory", 0o777, 0).unwrap();
    let directory = directory.inode;
    let symlink = server.symlink(user, c"to", directory, c"symlink").unwrap();
    let target = server.readlink(user, symlink.inode).unwrap();
    assert_eq!(target, b"to");
    let fifo = server.mknod(user, directory, c"fifo", libc::S_IFIFO | 0o600, 0, 0);
    say("fifo", fifo.map(drop));
    server.lookup(user, directory, c"fifo").unwrap();
    say("link", link_by_descriptor());
    say(
        "rename",
        server.rename(root, ROOT, NAME, directory, c"renamed", 0),
    );
    say("unlink", server.unlink(root, directory, c"renamed"));
    let (handle, _) = server.opendir(root, directory, 0).unwrap();
    let handle = handle.unwrap_or_default();
    let mut names = 0;
    let mut count = |_: DirEntry<'_>| {
        names += 1;
        Ok(1)
    };
    say(
        "readdir",
        server.readdir(root, directory, handle, 4096, 0, &mut count),
    );
    println!("names: {}", if names == 3 { "ok" } else { "missing" });
    say("fsyncdir", server.fsyncdir(root, directory, false, handle));
    say("releasedir", server.releasedir(root, directory, 0, handle));
    server.forget(user, symlink.inode, 1);
    say(
        "rmdir",
        match server.rmdir(root, ROOT, c"directory") {
            Err(error) if error.raw_os_error() == Some(libc::ENOTEMPTY) => Ok(()),
            other => other,
        },
    );
}
