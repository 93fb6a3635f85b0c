//! System calls as a process between `clone3` and `execve` may make them: no allocation, no library state, errors as
//! plain numbers. The agent itself uses them too where `rustix` has no equivalent.

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// An errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Errno(pub i32);

impl From<Errno> for std::io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

pub(super) type SysResult<T = ()> = Result<T, Errno>;

/// Flags of [`mount_setattr`] and [`open_tree`] that not every libc has.
pub(super) const AT_RECURSIVE: u32 = 0x8000;
const OPEN_TREE_CLONE: u32 = 1;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: u32 = 0x40;
const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_IN_ROOT: u64 = 0x10;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MountAttr {
    pub set: u64,
    pub clear: u64,
    pub propagation: u64,
    pub userns_fd: u64,
}

impl MountAttr {
    /// Whether it would change nothing.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn last_errno() -> Errno {
    Errno(
        std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO),
    )
}

/// Checks what a system call returned.
fn check(result: libc::c_long) -> SysResult<i64> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(result)
    }
}

fn fd_of(result: libc::c_long) -> SysResult<RawFd> {
    check(result).and_then(|fd| RawFd::try_from(fd).map_err(|_| Errno(libc::EBADF)))
}

/// Takes ownership of a descriptor that one of this module's calls has just returned.
pub(super) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass descriptors they have just been given by the kernel and hold alone.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// `openat2` of a path that never leaves `root`: `..` and absolute symbolic links stay inside it.
pub(super) fn open_in_root(root: RawFd, path: &CStr, flags: i32, mode: u32) -> SysResult<RawFd> {
    let how = [
        (flags | libc::O_CLOEXEC) as u64,
        u64::from(mode),
        RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    ];
    // SAFETY: `how` has the layout and size of struct open_how; `path` is a valid C string.
    fd_of(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root,
            path.as_ptr(),
            how.as_ptr(),
            size_of_val(&how),
        )
    })
}

/// `openat`.
pub(super) fn openat(dir: RawFd, path: &CStr, flags: i32, mode: u32) -> SysResult<RawFd> {
    // SAFETY: `path` is a valid C string.
    fd_of(unsafe {
        libc::syscall(
            libc::SYS_openat,
            dir,
            path.as_ptr(),
            flags | libc::O_CLOEXEC,
            mode,
        )
    })
}

/// `close`; its errors say nothing useful about descriptors that were only looked through.
pub(super) fn close(fd: RawFd) {
    // SAFETY: the caller owns `fd`.
    unsafe { libc::syscall(libc::SYS_close, fd) };
}

/// `close_range`; a range without descriptors is fine.
pub(super) fn close_range(first: u32, last: u32) -> SysResult {
    // SAFETY: the caller owns what is in the range.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) }).map(drop)
}

/// `dup3`, without the close-on-exec flag unless asked for; a descriptor on itself only changes the flag.
pub(super) fn dup_to(from: RawFd, to: RawFd, cloexec: bool) -> SysResult {
    if from == to {
        let flags = if cloexec { libc::FD_CLOEXEC } else { 0 };
        // SAFETY: fcntl on a descriptor number.
        return check(unsafe { libc::syscall(libc::SYS_fcntl, from, libc::F_SETFD, flags) })
            .map(drop);
    }
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: plain descriptor numbers.
    check(unsafe { libc::syscall(libc::SYS_dup3, from, to, flags) }).map(drop)
}

/// `read`.
pub(super) fn read(fd: RawFd, buffer: &mut [u8]) -> SysResult<usize> {
    loop {
        // SAFETY: `buffer` is valid for its length.
        let result =
            check(unsafe { libc::syscall(libc::SYS_read, fd, buffer.as_mut_ptr(), buffer.len()) });
        match result {
            Err(Errno(libc::EINTR)) => {}
            other => return other.map(|n| n as usize),
        }
    }
}

/// `write`, of messages and control files: a short write counts as success.
pub(super) fn write(fd: RawFd, buffer: &[u8]) -> SysResult {
    loop {
        // SAFETY: `buffer` is valid for its length.
        let result =
            check(unsafe { libc::syscall(libc::SYS_write, fd, buffer.as_ptr(), buffer.len()) });
        match result {
            Err(Errno(libc::EINTR)) => {}
            other => return other.map(drop),
        }
    }
}

/// Opens a control file, writes it in one call, closes it.
pub(super) fn write_file(path: &CStr, content: &[u8]) -> SysResult {
    let fd = openat(libc::AT_FDCWD, path, libc::O_WRONLY, 0)?;
    let result = write(fd, content);
    close(fd);
    result
}

/// `mkdirat`.
pub(super) fn mkdirat(dir: RawFd, path: &CStr, mode: u32) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_mkdirat, dir, path.as_ptr(), mode) }).map(drop)
}

/// `mknodat`.
pub(super) fn mknodat(dir: RawFd, path: &CStr, mode: u32, device: u64) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_mknodat, dir, path.as_ptr(), mode, device) }).map(drop)
}

/// `symlinkat`.
pub(super) fn symlinkat(target: &CStr, dir: RawFd, path: &CStr) -> SysResult {
    // SAFETY: both are valid C strings.
    check(unsafe { libc::syscall(libc::SYS_symlinkat, target.as_ptr(), dir, path.as_ptr()) })
        .map(drop)
}

/// `unlinkat` of something that is not a directory.
pub(super) fn unlinkat(dir: RawFd, path: &CStr) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_unlinkat, dir, path.as_ptr(), 0) }).map(drop)
}

/// `readlinkat`.
pub(super) fn readlinkat(dir: RawFd, path: &CStr, buffer: &mut [u8]) -> SysResult<usize> {
    // SAFETY: `path` is a valid C string and `buffer` valid for its length.
    check(unsafe {
        libc::syscall(
            libc::SYS_readlinkat,
            dir,
            path.as_ptr(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    })
    .map(|n| n as usize)
}

/// `fchownat` that follows no symbolic link; with an empty path, of `dir` itself.
pub(super) fn chown_at(dir: RawFd, path: &CStr, uid: u32, gid: u32) -> SysResult {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_fchownat, dir, path.as_ptr(), uid, gid, flags) })
        .map(drop)
}

/// `stat`, following symbolic links unless `flags` says otherwise.
pub(super) fn stat_at(dir: RawFd, path: &CStr, flags: i32) -> SysResult<libc::stat> {
    // SAFETY: all zeroes is a valid struct stat.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `path` is a valid C string and `stat` is the kernel's layout.
    check(unsafe {
        libc::syscall(
            libc::SYS_newfstatat,
            dir,
            path.as_ptr(),
            &raw mut stat,
            flags,
        )
    })?;
    Ok(stat)
}

/// Whether the process may execute `path`, by its effective ids.
pub(super) fn may_execute(path: &CStr) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::X_OK,
            libc::AT_EACCESS,
        )
    })
    .map(drop)
}

/// The magic number of the file system that `fd` is on.
pub(super) fn filesystem_type(fd: RawFd) -> SysResult<i64> {
    // SAFETY: all zeroes is a valid struct statfs.
    let mut statfs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `statfs` is the kernel's layout.
    check(unsafe { libc::syscall(libc::SYS_fstatfs, fd, &raw mut statfs) })?;
    #[allow(
        clippy::unnecessary_cast,
        reason = "the type differs between C libraries"
    )]
    Ok(statfs.f_type as i64)
}

/// `mount`.
pub(super) fn mount(
    source: &CStr,
    target: &CStr,
    fstype: &CStr,
    flags: u64,
    data: &CStr,
) -> SysResult {
    // SAFETY: all are valid C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount,
            source.as_ptr(),
            target.as_ptr(),
            fstype.as_ptr(),
            flags,
            data.as_ptr(),
        )
    })
    .map(drop)
}

/// `umount2` with MNT_DETACH.
pub(super) fn detach(path: &CStr) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_umount2, path.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// A detached copy of the mount at `path` (below `dir`, or `dir` itself if it is empty).
pub(super) fn clone_tree(dir: RawFd, path: &CStr, recursive: bool) -> SysResult<RawFd> {
    let mut flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32 | libc::AT_EMPTY_PATH as u32;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: `path` is a valid C string.
    fd_of(unsafe { libc::syscall(libc::SYS_open_tree, dir, path.as_ptr(), flags) })
}

/// Attaches the detached mount `tree` at `path` (below `dir`, or at `dir` itself if it is empty).
pub(super) fn attach_tree(tree: RawFd, dir: RawFd, path: &CStr) -> SysResult {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both are valid C strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            dir,
            path.as_ptr(),
            flags,
        )
    })
    .map(drop)
}

/// Changes the attributes of the mount that `fd` is the root of.
pub(super) fn mount_setattr(fd: RawFd, attr: &MountAttr, recursive: bool) -> SysResult {
    let flags = libc::AT_EMPTY_PATH as u32 | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: `attr` has the layout and size of struct mount_attr.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    })
    .map(drop)
}

/// `pivot_root(".", ".")`.
pub(super) fn pivot_root() -> SysResult {
    // SAFETY: valid C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) }).map(drop)
}

/// `chroot`.
pub(super) fn chroot(path: &CStr) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_chroot, path.as_ptr()) }).map(drop)
}

/// `chdir`.
pub(super) fn chdir(path: &CStr) -> SysResult {
    // SAFETY: `path` is a valid C string.
    check(unsafe { libc::syscall(libc::SYS_chdir, path.as_ptr()) }).map(drop)
}

/// `fchdir`.
pub(super) fn fchdir(fd: RawFd) -> SysResult {
    // SAFETY: a plain descriptor number.
    check(unsafe { libc::syscall(libc::SYS_fchdir, fd) }).map(drop)
}

/// Whether the working directory can be reached from the process's root.
pub(super) fn cwd_is_inside() -> SysResult<bool> {
    let mut buffer = [0u8; libc::PATH_MAX as usize];
    // SAFETY: `buffer` is valid for its length.
    check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
    // The kernel writes "(unreachable)" in front of a directory outside.
    Ok(buffer.first() == Some(&b'/'))
}

/// `setns`.
pub(super) fn setns(fd: RawFd, kinds: i32) -> SysResult {
    // SAFETY: a plain descriptor number.
    check(unsafe { libc::syscall(libc::SYS_setns, fd, kinds) }).map(drop)
}

/// `unshare`.
pub(super) fn unshare(kinds: i32) -> SysResult {
    // SAFETY: changes the calling process alone.
    check(unsafe { libc::syscall(libc::SYS_unshare, kinds) }).map(drop)
}

/// `prctl`.
pub(super) fn prctl(option: i32, a: u64, b: u64) -> SysResult {
    // SAFETY: only options with integer arguments are used.
    check(unsafe { libc::syscall(libc::SYS_prctl, option, a, b, 0u64, 0u64) }).map(drop)
}

/// `setsid`.
pub(super) fn setsid() -> SysResult {
    // SAFETY: no arguments.
    check(unsafe { libc::syscall(libc::SYS_setsid) }).map(drop)
}

/// `umask`.
pub(super) fn umask(mask: u32) {
    // SAFETY: cannot fail.
    unsafe { libc::syscall(libc::SYS_umask, mask) };
}

/// `setgroups`.
pub(super) fn setgroups(groups: &[u32]) -> SysResult {
    // SAFETY: `groups` is valid for its length.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// `setresgid`, all three.
pub(super) fn setgid(gid: u32) -> SysResult {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) }).map(drop)
}

/// `setresuid`, all three.
pub(super) fn setuid(uid: u32) -> SysResult {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }).map(drop)
}

/// `capset` of the calling thread: effective, permitted, inheritable.
pub(super) fn capset(effective: u64, permitted: u64, inheritable: u64) -> SysResult {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let low = |set: u64| (set & 0xffff_ffff) as u32;
    let high = |set: u64| (set >> 32) as u32;
    let data = [
        low(effective),
        low(permitted),
        low(inheritable),
        high(effective),
        high(permitted),
        high(inheritable),
    ];
    // SAFETY: layouts of the version 3 header and its two data structures.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

/// `setrlimit`.
pub(super) fn setrlimit(resource: i32, soft: u64, hard: u64) -> SysResult {
    let limit = [soft, hard];
    // SAFETY: the layout of struct rlimit64.
    check(unsafe {
        libc::syscall(
            libc::SYS_prlimit64,
            0,
            resource,
            limit.as_ptr(),
            std::ptr::null::<u8>(),
        )
    })
    .map(drop)
}

/// `sethostname` or `setdomainname`.
pub(super) fn set_uts_name(call: libc::c_long, name: &[u8]) -> SysResult {
    // SAFETY: `name` is valid for its length.
    check(unsafe { libc::syscall(call, name.as_ptr(), name.len()) }).map(drop)
}

/// `seccomp(SECCOMP_SET_MODE_FILTER)`.
pub(super) fn load_seccomp(program: &[libc::sock_filter], flags: u64) -> SysResult {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| Errno(libc::E2BIG))?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program and does not write to it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            std::ptr::from_ref(&program),
        )
    })
    .map(drop)
}

/// Leaves the agent's session keyring for an anonymous new one; a kernel without keys has nothing to leave.
pub(super) fn new_session_keyring() -> SysResult {
    const KEYCTL_JOIN_SESSION_KEYRING: i32 = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    let result = check(unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<u8>(),
        )
    });
    match result {
        Ok(_) | Err(Errno(libc::ENOSYS)) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Gives SIGPIPE its default action and unblocks every signal, as a program expects at its start. Handlers are
/// gone already: `clone3` was told to clear them.
pub(super) fn reset_signals() -> SysResult {
    // The kernel's struct sigaction: handler (SIG_DFL), flags, restorer, mask.
    let default = [0u64; 4];
    let none = 0u64;
    // SAFETY: the kernel's own layout (not the C library's), with 8-byte signal sets.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            libc::SIGPIPE,
            default.as_ptr(),
            std::ptr::null::<u8>(),
            size_of::<u64>(),
        )
    })?;
    // SAFETY: a signal set of 8 bytes.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            std::ptr::from_ref(&none),
            std::ptr::null::<u8>(),
            size_of::<u64>(),
        )
    })
    .map(drop)
}

/// `ioctl` with an integer argument.
pub(super) fn ioctl(fd: RawFd, request: libc::Ioctl, argument: u64) -> SysResult<i64> {
    // SAFETY: only requests that take an integer are used.
    check(unsafe { libc::syscall(libc::SYS_ioctl, fd, request, argument) })
}

/// `execve`; returns only if it failed. Both arrays end with a null pointer.
pub(super) fn execve(
    path: &CStr,
    argv: &[*const libc::c_char],
    envp: &[*const libc::c_char],
) -> Errno {
    // SAFETY: the arrays are null-terminated and point to C strings that outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execve,
            path.as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
        )
    };
    last_errno()
}

/// Ends the process.
pub(super) fn exit(status: i32) -> ! {
    loop {
        // SAFETY: ends the process without running anything else.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
}

/// "/proc/self/fd/N" without allocation: how `mount(2)` is given a place that was resolved safely before.
pub(super) struct FdPath([u8; 32]);

impl FdPath {
    /// The path of `fd`.
    pub(super) fn new(fd: RawFd) -> Self {
        use std::io::Write;
        let mut buffer = [0u8; 32];
        // 14 bytes of prefix and at most 10 digits: it always fits, and a NUL follows.
        let _ = write!(buffer.as_mut_slice(), "/proc/self/fd/{fd}");
        Self(buffer)
    }

    /// As a C string.
    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}
