//! What runs inside of the jail: a process that enters it as `cella-vmm` does and then tries things.
//!
//! Each scenario prints `name: ok` or `name: <errno>` lines, or ends by the signal that the test expects.

use std::ffi::CStr;
use std::fs;
use std::io::{self, BufRead, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::files;
use crate::mounted::{self, Guest};
use cella_vmm::jail::{self, Entered, Jail, ThreadKind};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// What the process of the test tells its probe, as `key=value` words.
struct Orders {
    words: Vec<String>,
}

impl Orders {
    fn get(&self, key: &str) -> Option<&str> {
        self.words
            .iter()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number(&self, key: &str, default: u32) -> u32 {
        self.get(key).map_or(default, |text| text.parse().unwrap())
    }
}

/// Enters the jail and plays the scenario `name`.
pub fn main(name: &str, words: Vec<String>) {
    let orders = Orders { words };
    if name == "with-thread" {
        std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
    }
    let keep_fds: Vec<RawFd> = match orders.get("keep") {
        Some(fds) => fds.split(',').map(|fd| fd.parse().unwrap()).collect(),
        None => vec![0, 1, 2],
    };
    let jail = Jail {
        share: orders.get("share").map(PathBuf::from),
        sockets: orders.get("sockets").map(PathBuf::from),
        uid: orders.number("uid", 64_999),
        gid: orders.number("gid", 64_998),
        keep_fds,
        companion: None,
        pid_fd: orders.get("pid_fd").map(|fd| fd.parse().unwrap()),
    };
    let entered = match jail::enter(&jail) {
        Ok(entered) => entered,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(7);
        }
    };
    play(name, &orders, entered);
    std::process::exit(0);
}

fn play(name: &str, orders: &Orders, entered: Entered) {
    match name {
        "walls" => walls(orders, &entered),
        "idle" => idle(entered),
        "file-server" => in_thread(ThreadKind::Fs, files::as_users),
        "escape-share" => in_thread(ThreadKind::Fs, files::escape),
        "later-mount" => in_thread(ThreadKind::Fs, files::later_mount),
        "passthrough" => {
            let server = files::server();
            in_thread(ThreadKind::Fs, move || files::serve(&server));
        }
        "mounted" => mounted::play(Guest::new(), Guest::new()),
        "connect" => connect(),
        "costs" => costs(),
        "forbidden" => forbidden(orders),
        _ => panic!("no scenario {name}"),
    }
}

pub fn say(name: &str, result: io::Result<()>) {
    let result = match result {
        Ok(()) => "ok".to_owned(),
        Err(error) => match error.raw_os_error() {
            Some(number) => number.to_string(),
            None => error.to_string(),
        },
    };
    println!("{name}: {result}");
}

pub fn call(result: libc::c_long) -> io::Result<()> {
    match result < 0 {
        true => Err(io::Error::last_os_error()),
        false => Ok(()),
    }
}

pub fn wait_for_line() {
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).unwrap();
}

pub fn in_thread<T: Send + 'static>(
    kind: ThreadKind,
    what: impl FnOnce() -> T + Send + 'static,
) -> T {
    std::thread::spawn(move || {
        jail::confine(kind).unwrap();
        what()
    })
    .join()
    .unwrap()
}

/// Everything but seccomp and the second Landlock domain, with the file server's capabilities in effect: what a
/// filter would stop first is tried against the walls behind it.
fn walls(orders: &Orders, entered: &Entered) {
    println!("landlock: {:?}", entered.landlock);
    let permitted = rustix::thread::capabilities(None).unwrap().permitted;
    let set = |effective, permitted| {
        let inheritable = CapabilitySet::empty();
        let sets = CapabilitySets {
            effective,
            permitted,
            inheritable,
        };
        rustix::thread::set_capabilities(None, sets).map_err(io::Error::from)
    };
    say(
        "raise admin",
        set(
            permitted | CapabilitySet::SYS_ADMIN,
            permitted | CapabilitySet::SYS_ADMIN,
        ),
    );
    say("raise file capabilities", set(permitted, permitted));
    walls_of_files();
    walls_of_processes(orders);
    walls_of_namespaces();
}

pub fn open(path: &str) -> io::Result<()> {
    fs::File::open(path).map(drop)
}

fn walls_of_files() {
    for path in [
        "/etc/passwd",
        "/share/../etc/passwd",
        "/share/../../../../etc/passwd",
        "/share/files/to-passwd",
        "/proc/self/fd/../../../etc/passwd",
        "/proc/self/root/etc/passwd",
        "/proc/1/status",
        "/proc/sys/kernel/core_pattern",
        "/dev/kvm",
        "/sys",
    ] {
        say(&format!("open {path}"), open(path));
    }
    let mut root: Vec<_> = ["share", "vsock", "proc", "etc", "dev", "sys", "root", "old"]
        .iter()
        .filter(|name| fs::symlink_metadata(format!("/{name}")).is_ok())
        .collect();
    root.sort();
    println!("root: {root:?}");
    say("list /", fs::read_dir("/").map(drop));
    say("create /new", fs::write("/new", ""));
    say("create /vsock/new", fs::write("/vsock/new", ""));
    let device = |path: &str, kind| {
        let null = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(CWD, path, kind, Mode::RUSR, null).map_err(io::Error::from)
    };
    say(
        "mknod character",
        device("/share/files/null", FileType::CharacterDevice),
    );
    say(
        "mknod block",
        device("/share/files/disk", FileType::BlockDevice),
    );
    say("open the device in /share", open("/share/files/device"));
    say("open by handle", open_by_handle());
    say(
        "chroot",
        rustix::process::chroot("/share").map_err(io::Error::from),
    );
}

#[repr(C)]
struct Handle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    data: [u8; 128],
}

fn open_by_handle() -> io::Result<()> {
    let mut handle = Handle {
        bytes: 128,
        kind: 0,
        data: [0; 128],
    };
    let share = rustix::fs::open("/share", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())?;
    let mut mount = 0;
    // SAFETY: all pointers are to live objects, and the handle says its room.
    call(unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            share.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    })?;
    // SAFETY: the handle was just filled in.
    call(unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            share.as_raw_fd(),
            &raw mut handle,
            libc::O_RDONLY,
        )
    })
}

fn walls_of_processes(orders: &Orders) {
    let outside = orders.number("outside", 0) as libc::pid_t;
    // SAFETY: signal 0 is none; no memory operands.
    say("kill", call(unsafe { libc::kill(outside, 0) }.into()));
    // SAFETY: asks to attach; no memory operands.
    say(
        "ptrace",
        call(unsafe { libc::ptrace(libc::PTRACE_SEIZE, outside, 0, 0) }),
    );
    let vector = libc::iovec {
        iov_base: [0_u8; 8].as_mut_ptr().cast(),
        iov_len: 8,
    };
    // SAFETY: the vectors are valid; the remote address belongs to another process.
    let read =
        unsafe { libc::process_vm_readv(outside, &raw const vector, 1, &raw const vector, 1, 0) };
    say("process_vm_readv", call(read as libc::c_long));
    // SAFETY: no memory operands.
    say(
        "pidfd_open",
        call(unsafe { libc::syscall(libc::SYS_pidfd_open, outside, 0) }),
    );
    // SAFETY: no memory operands.
    println!("pid: {}", unsafe { libc::getpid() });
    let listener: SocketAddr = orders.get("listener").unwrap().parse().unwrap();
    say(
        "tcp",
        TcpStream::connect_timeout(&listener, Duration::from_secs(1)).map(drop),
    );
    let name = orders.get("abstract").unwrap();
    say("abstract socket", connect_abstract(name));
}

fn connect_abstract(name: &str) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
    UnixStream::connect_addr(&address).map(drop)
}

fn walls_of_namespaces() {
    let mount = |at: &CStr| {
        // SAFETY: all strings are terminated.
        call(
            unsafe {
                libc::mount(
                    c"none".as_ptr(),
                    at.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    std::ptr::null(),
                )
            }
            .into(),
        )
    };
    say("mount", mount(c"/share"));
    // SAFETY: no memory operands.
    let unshare = |flags| call(unsafe { libc::unshare(flags) }.into());
    for (name, flags) in [
        ("mount", libc::CLONE_NEWNS),
        ("net", libc::CLONE_NEWNET),
        ("pid", libc::CLONE_NEWPID),
    ] {
        say(&format!("unshare {name}"), unshare(flags));
    }
    say("open a namespace", open("/proc/self/ns/mnt"));
    say(
        "hostname",
        rustix::system::sethostname(b"x").map_err(io::Error::from),
    );
    let net = fs::read_to_string("/proc/net/dev").map(drop);
    say("read /proc/net", net);
    // A thread without a filter may make a user namespace of its own; not even there may it mount.
    if unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).is_ok() {
        say("mount in a nested namespace", mount(c"/share"));
    } else {
        println!("mount in a nested namespace: 1");
    }
}

/// All kinds of threads but the file server exist, confined, until a line comes in.
fn idle(mut entered: Entered) {
    let mut text = String::new();
    entered.smaps.read_to_string(&mut text).unwrap();
    assert!(text.contains("Rss:"));
    for (name, kind) in [
        ("vcpu", ThreadKind::Vcpu),
        ("block", ThreadKind::Block),
        ("net", ThreadKind::Net),
        ("fs", ThreadKind::Fs),
    ] {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let body = move || {
            jail::confine(kind).unwrap();
            ready.send(()).unwrap();
            let (_keep, never) = std::sync::mpsc::channel::<()>();
            let _ = never.recv();
        };
        std::thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .unwrap();
        is_ready.recv().unwrap();
    }
    jail::confine(ThreadKind::Main).unwrap();
    println!("ready");
    wait_for_line();
}

fn connect() {
    jail::confine(ThreadKind::Main).unwrap();
    let stream =
        UnixStream::connect("/vsock/1024").and_then(|mut stream| stream.write_all(b"hello"));
    say("connect", stream);
    say(
        "connect to none",
        UnixStream::connect("/vsock/1025").map(drop),
    );
}

fn costs() {
    for kind in [
        ThreadKind::Vcpu,
        ThreadKind::Block,
        ThreadKind::Net,
        ThreadKind::Fs,
        ThreadKind::Main,
    ] {
        let confine = move || {
            let start = std::time::Instant::now();
            jail::confine(kind).unwrap();
            println!("{kind:?}: {} us", start.elapsed().as_micros());
        };
        match kind {
            ThreadKind::Main => confine(),
            _ => std::thread::spawn(confine).join().unwrap(),
        }
    }
}

fn forbidden(orders: &Orders) {
    let kind = match orders.get("kind").unwrap() {
        "main" => ThreadKind::Main,
        "vcpu" => ThreadKind::Vcpu,
        "block" => ThreadKind::Block,
        "net" => ThreadKind::Net,
        "fs" => ThreadKind::Fs,
        other => panic!("no kind {other}"),
    };
    let what = orders.get("call").unwrap().to_owned();
    let body = move || {
        jail::confine(kind).unwrap();
        println!("confined");
        forbidden_call(&what);
        println!("survived");
    };
    match kind {
        ThreadKind::Main => body(),
        _ => std::thread::spawn(body).join().unwrap(),
    }
}

/// Raw, so that nothing but the call itself can be what the filter stops.
fn forbidden_call(what: &str) {
    let (number, arguments): (libc::c_long, [libc::c_long; 4]) = match what {
        "execve" => (
            libc::SYS_execve,
            [c"/share/files/program".as_ptr() as libc::c_long, 0, 0, 0],
        ),
        "inet" => (
            libc::SYS_socket,
            [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0, 0],
        ),
        "netlink" => (
            libc::SYS_socket,
            [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0, 0],
        ),
        "unix" => (
            libc::SYS_socket,
            [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0],
        ),
        "unshare" => (libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0]),
        "setns" => (libc::SYS_setns, [0, 0, 0, 0]),
        "mount" => (
            libc::SYS_mount,
            [0, c"/share".as_ptr() as libc::c_long, 0, 0],
        ),
        "ptrace" => (libc::SYS_ptrace, [0, 0, 0, 0]),
        "kill" => (libc::SYS_kill, [1, 0, 0, 0]),
        "tgkill" => (libc::SYS_tgkill, [2, 2, 0, 0]),
        "fork" => (libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
        "open" => {
            let at = libc::c_long::from(libc::AT_FDCWD);
            (
                libc::SYS_openat,
                [at, c"/share/files/secret".as_ptr() as libc::c_long, 0, 0],
            )
        }
        "handle" => (libc::SYS_open_by_handle_at, [0, 0, 0, 0]),
        "executable" => {
            let access = libc::c_long::from(libc::PROT_READ | libc::PROT_EXEC);
            (
                libc::SYS_mmap,
                [
                    0,
                    4096,
                    access,
                    (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into(),
                ],
            )
        }
        "protect" => (libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC.into(), 0]),
        "tiocsti" => (libc::SYS_ioctl, [0, libc::TIOCSTI as libc::c_long, 0, 0]),
        "io_uring" => (libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        "setresuid" => (libc::SYS_setresuid, [-1, 0, -1, 0]),
        "prctl" => (libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0]),
        // The same number as read(2), as the x32 ABI has it.
        "x32" => (0x4000_0000, [0, 0, 0, 0]),
        other => panic!("no call {other}"),
    };
    let [a, b, c, d] = arguments;
    // SAFETY: the calls are refused, or fail for their null pointers, before they touch memory.
    unsafe { libc::syscall(number, a, b, c, d) };
}
