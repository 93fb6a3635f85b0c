//! The tests.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};

use rustix::mount::{MountFlags, UnmountFlags};

use crate::host::{Directories, Ended, Probe};

type Test = (&'static str, fn());

/// All of them.
pub const TESTS: &[Test] = &[
    (
        "the_host_is_out_of_reach_even_without_seccomp",
        the_host_is_out_of_reach_even_without_seccomp,
    ),
    (
        "the_process_has_given_everything_up",
        the_process_has_given_everything_up,
    ),
    (
        "refused_calls_kill_the_process",
        refused_calls_kill_the_process,
    ),
    (
        "a_debug_build_names_the_refused_call",
        a_debug_build_names_the_refused_call,
    ),
    (
        "the_file_server_acts_as_the_guests_users",
        the_file_server_acts_as_the_guests_users,
    ),
    (
        "every_request_of_the_file_server_passes_its_filter",
        every_request_of_the_file_server_passes_its_filter,
    ),
    (
        "a_mounted_directory_is_saved_and_taken_up",
        a_mounted_directory_is_saved_and_taken_up,
    ),
    (
        "the_file_server_stays_in_its_directory",
        the_file_server_stays_in_its_directory,
    ),
    ("mounts_made_later_arrive", mounts_made_later_arrive),
    ("sockets_are_connected_to", sockets_are_connected_to),
    (
        "a_jail_that_cannot_be_is_refused",
        a_jail_that_cannot_be_is_refused,
    ),
    ("closing_the_jail_is_cheap", closing_the_jail_is_cheap),
];

fn run(scenario: &str, orders: &[String]) -> Ended {
    Probe::start(scenario, orders, &[]).end()
}

/// The `name: result` lines of a probe that ended well.
fn results(ended: &Ended) -> BTreeMap<String, String> {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended
        .stdout
        .lines()
        .filter_map(|line| line.rsplit_once(": "))
        .map(|(name, result)| (name.to_owned(), result.to_owned()))
        .collect()
}

/// What a thread with the file server's capabilities, but no filter, is told: one of these errors.
const WALLS: &[(&str, &[i32])] = &[
    ("open /etc/passwd", &[libc::ENOENT]),
    ("open /share/../etc/passwd", &[libc::ENOENT]),
    ("open /share/../../../../etc/passwd", &[libc::ENOENT]),
    ("open /share/files/to-passwd", &[libc::ENOENT]),
    ("open /proc/self/fd/../../../etc/passwd", &[libc::ENOENT]),
    ("open /proc/self/root/etc/passwd", &[libc::ENOENT]),
    ("open /proc/1/status", &[libc::ENOENT]),
    ("open /proc/sys/kernel/core_pattern", &[libc::ENOENT]),
    ("open /dev/kvm", &[libc::ENOENT]),
    ("open /sys", &[libc::ENOENT]),
    ("open the device in /share", &[libc::EACCES]),
    ("create /new", &[libc::EROFS, libc::EACCES]),
    ("create /vsock/new", &[libc::EROFS, libc::EACCES]),
    ("raise admin", &[libc::EPERM]),
    ("mknod character", &[libc::EPERM]),
    ("mknod block", &[libc::EPERM, libc::EACCES]),
    ("open by handle", &[libc::EPERM]),
    ("chroot", &[libc::EPERM]),
    ("kill", &[libc::ESRCH]),
    ("ptrace", &[libc::ESRCH]),
    ("process_vm_readv", &[libc::ESRCH]),
    ("pidfd_open", &[libc::ESRCH]),
    // No interface is up; Landlock refuses before.
    ("tcp", &[libc::ENETUNREACH, libc::EACCES]),
    ("abstract socket", &[libc::ECONNREFUSED, libc::EPERM]),
    ("mount", &[libc::EPERM]),
    ("unshare mount", &[libc::EPERM]),
    ("unshare net", &[libc::EPERM]),
    ("unshare pid", &[libc::EPERM]),
    ("open a namespace", &[libc::ENOENT]),
    ("hostname", &[libc::EPERM]),
    ("read /proc/net", &[libc::ENOENT]),
];

fn the_host_is_out_of_reach_even_without_seccomp() {
    let directories = Directories::new();
    let null = rustix::fs::makedev(1, 3);
    let (kind, mode) = (
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
    );
    rustix::fs::mknodat(
        rustix::fs::CWD,
        directories.files().join("device"),
        kind,
        mode,
        null,
    )
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("cella-jail-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let mut orders = directories.orders();
    orders.push(format!("outside={}", std::process::id()));
    orders.push(format!("listener={}", listener.local_addr().unwrap()));
    orders.push(format!("abstract={name}"));
    let results = results(&run("walls", &orders));

    for (name, errors) in WALLS {
        let result = &results[*name];
        let expected = errors.iter().any(|error| error.to_string() == *result);
        assert!(expected, "{name}: {result}, not one of {errors:?}");
    }
    assert_eq!(results["root"], r#"["proc", "share", "vsock"]"#);
    assert_eq!(results["pid"], "1");
    assert_eq!(results["raise file capabilities"], "ok");
    if results["landlock"] == "Absent" {
        println!("SKIPPED: Landlock's part: this kernel has none");
    } else {
        assert_eq!(results["list /"], libc::EACCES.to_string());
        let nested = &results["mount in a nested namespace"];
        assert_eq!(*nested, libc::EPERM.to_string());
    }
}

fn the_process_has_given_everything_up() {
    let directories = Directories::new();
    let mut probe = Probe::start(
        "idle",
        &directories.orders(),
        &[("SECRET", "of the caller")],
    );
    assert_eq!(probe.outer, Some(0));
    assert_eq!(probe.line(), "ready");
    let process = format!("/proc/{}", probe.pid.unwrap());

    for name in ["user", "pid", "mnt", "ipc", "uts", "cgroup", "net"] {
        let of = |process: &str| fs::read_link(format!("{process}/ns/{name}")).unwrap();
        assert_ne!(of(&process), of("/proc/self"), "{name} namespace");
    }
    let environment = fs::read(format!("{process}/environ")).unwrap();
    assert!(environment.iter().all(|byte| *byte == 0), "{environment:?}");

    let mut threads = 0;
    for task in fs::read_dir(format!("{process}/task")).unwrap() {
        threads += 1;
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        check_status(&status);
    }
    assert_eq!(threads, 5);

    let mut open: Vec<String> = fs::read_dir(format!("{process}/fd"))
        .unwrap()
        .map(|entry| {
            fs::read_link(entry.unwrap().path())
                .unwrap()
                .display()
                .to_string()
        })
        .filter(|path| !path.starts_with("pipe:"))
        .collect();
    open.sort();
    assert_eq!(open.len(), 1, "{open:?}");
    assert!(open[0].ends_with("/smaps"), "{open:?}");
    check_mounts(&fs::read_to_string(format!("{process}/mountinfo")).unwrap());

    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    probe.go();
    assert_eq!(probe.end().code, Some(0));
}

/// What each thread has left, by its name and its `/proc/<pid>/task/<tid>/status`.
fn check_status(status: &str) {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name}"))
            .trim_start_matches(':')
            .trim()
            .replace('\t', " ")
    };
    let serves_files = field("Name") == "fs";
    let (uid, gid, capabilities) = match serves_files {
        // CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, SETFCAP 31.
        true => ("0", "0", "00000000800000db"),
        false => ("64999", "64998", "0000000000000000"),
    };
    assert_eq!(field("Uid"), [uid; 4].join(" "), "{status}");
    assert_eq!(field("Gid"), [gid; 4].join(" "), "{status}");
    assert_eq!(field("CapPrm"), capabilities, "{status}");
    assert_eq!(field("CapEff"), capabilities, "{status}");
    for name in ["CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(field(name), "0000000000000000", "{name}: {status}");
    }
    assert_eq!(field("Groups"), "");
    assert_eq!(field("NoNewPrivs"), "1");
    assert_eq!(field("Seccomp"), "2", "{status}");
    assert_eq!(
        field("NSpid").split(' ').count(),
        field("NStgid").split(' ').count()
    );
}

/// `/`, `/share` and what is mounted in it, `/vsock` and the two of `/proc`, each as restricted as it can be.
fn check_mounts(mountinfo: &str) {
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let (at, options) = (words[4], words[5]);
        found.push(at);
        let expected: &[&str] = match at {
            "/share/files" => &["nosuid", "nodev", "noexec"],
            _ => &["ro", "nosuid", "nodev", "noexec"],
        };
        for option in expected {
            assert!(options.split(',').any(|word| word == *option), "{line}");
        }
        assert!(
            !line.contains(" shared:"),
            "something would propagate to the host: {line}"
        );
        assert_eq!(
            line.contains(" master:"),
            at.starts_with("/share"),
            "{line}"
        );
    }
    found.sort_unstable();
    assert_eq!(
        found,
        [
            "/",
            "/proc/self/fd",
            "/proc/self/mountinfo",
            "/share",
            "/share/files",
            "/vsock"
        ]
    );
}

fn refused_calls_kill_the_process() {
    let directories = Directories::new();
    let every = [
        "execve",
        "inet",
        "netlink",
        "unshare",
        "setns",
        "mount",
        "ptrace",
        "kill",
        "tgkill",
        "fork",
        "handle",
        "executable",
        "protect",
        "tiocsti",
        "io_uring",
        "prctl",
        "x32",
    ];
    for (kind, own) in [
        ("main", &["open", "setresuid"][..]),
        ("vcpu", &["open", "setresuid", "unix"]),
        ("block", &["open", "setresuid", "unix"]),
        ("fs", &["unix"]),
    ] {
        for call in every.iter().chain(own) {
            let mut orders = directories.orders();
            orders.extend([format!("kind={kind}"), format!("call={call}")]);
            let ended = run("forbidden", &orders);
            assert_eq!(ended.signal, Some(libc::SIGSYS), "{kind} {call}: {ended:?}");
            assert_eq!(ended.stdout, "confined\n", "{kind} {call}");
        }
    }
}

fn a_debug_build_names_the_refused_call() {
    if !cfg!(debug_assertions) {
        println!("SKIPPED: a release build");
        return;
    }
    let orders = ["kind=vcpu".to_owned(), "call=unshare".to_owned()];
    let ended = Probe::start("forbidden", &orders, &[("CELLA_SECCOMP_REPORT", "1")]).end();
    assert_eq!(ended.code, Some(128 + libc::SIGSYS), "{ended:?}");
    let expected = format!(
        "seccomp: a Some(Vcpu) thread called {}\n",
        libc::SYS_unshare
    );
    assert_eq!(ended.stderr, expected);
    assert_eq!(ended.stdout, "confined\n");
}

fn the_file_server_acts_as_the_guests_users() {
    let directories = Directories::new();
    let ended = run("file-server", &directories.orders());
    for (name, result) in results(&ended) {
        assert_eq!(result, "ok", "{name}");
    }
    let owner = |name: &str| {
        let metadata = fs::metadata(directories.files().join(name)).unwrap();
        (metadata.uid(), metadata.gid())
    };
    assert_eq!(owner("of-1000"), (1000, 1001));
    assert_eq!(owner("private/of-1000"), (1000, 1001));
    assert_eq!(owner("of-0"), (3, 4));
    assert_eq!(owner("d/of-many"), (4_000_000_000, 0));
}

fn every_request_of_the_file_server_passes_its_filter() {
    let directories = Directories::new();
    let ended = run("passthrough", &directories.orders());
    let results = results(&ended);
    assert_eq!(results.len(), 22, "{results:?}");
    for (name, result) in results {
        assert_eq!(result, "ok", "{name}");
    }
    let link = fs::metadata(directories.files().join("directory/link")).unwrap();
    assert_eq!((link.uid(), link.gid(), link.len()), (7, 8, 5));
}

fn a_mounted_directory_is_saved_and_taken_up() {
    let directories = Directories::new();
    let results = results(&run("mounted", &directories.orders()));
    assert_eq!(results.len(), 5, "{results:?}");
    for (name, result) in results {
        assert_eq!(result, "ok", "{name}");
    }
    let file = directories.files().join("mounted/file");
    assert_eq!(fs::read(file).unwrap(), b"after");
}

fn the_file_server_stays_in_its_directory() {
    let directories = Directories::new();
    let passwd = fs::read("/etc/passwd").unwrap();
    let results = results(&run("escape-share", &directories.orders()));
    assert_eq!(results.len(), 10, "{results:?}");
    for (name, result) in &results {
        assert_ne!(result, "ok", "{name}");
    }
    assert_eq!(results["raise"], libc::EPERM.to_string());
    assert_eq!(results["device"], libc::EPERM.to_string());
    for name in ["a name of the host's", "a link for the host"] {
        assert_eq!(results[name], libc::EROFS.to_string(), "{name}");
    }
    assert_eq!(fs::read("/etc/passwd").unwrap(), passwd);
}

fn mounts_made_later_arrive() {
    let directories = Directories::new();
    let layers = tempfile::tempdir().unwrap();
    rustix::mount::mount("none", layers.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    let layer = |name: &str| {
        let path = layers.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    };
    let (lower, upper, work) = (layer("lower"), layer("upper"), layer("work"));
    fs::write(lower.join("lower"), "from below").unwrap();
    let at = directories.share().join("later");
    fs::create_dir(&at).unwrap();
    chown(&at, Some(0), Some(0)).unwrap();

    let mut probe = Probe::start("later-mount", &directories.orders(), &[]);
    assert_eq!(probe.line(), "ready");
    let data = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        upper.display(),
        work.display()
    );
    let data = std::ffi::CString::new(data).unwrap();
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount("overlay", &at, "overlay", flags, Some(data.as_c_str())).unwrap();
    probe.go();
    let results = results(&probe.end());
    let written = fs::read_to_string(upper.join("written"));
    rustix::mount::unmount(&at, UnmountFlags::DETACH).unwrap();
    rustix::mount::unmount(layers.path(), UnmountFlags::DETACH).unwrap();
    assert_eq!(results["read"], "ok");
    assert_eq!(results["write"], "ok");
    assert_eq!(written.unwrap(), "from the jail");
}

fn sockets_are_connected_to() {
    let directories = Directories::new();
    let path = directories.sockets().join("1024");
    let listener = UnixListener::bind(&path).unwrap();
    chown(&path, Some(64_999), Some(64_998)).unwrap();
    let results = results(&run("connect", &directories.orders()));
    assert_eq!(results["connect"], "ok");
    assert_eq!(results["connect to none"], libc::ENOENT.to_string());
    let mut said = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "hello");
}

fn a_jail_that_cannot_be_is_refused() {
    let directory = fs::File::open("/").unwrap();
    rustix::io::fcntl_setfd(&directory, rustix::io::FdFlags::empty()).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&directory);
    for (scenario, orders, says) in [
        ("idle", vec!["uid=0".to_owned()], "must not be root's"),
        ("idle", vec!["gid=0".to_owned()], "must not be root's"),
        ("idle", vec![format!("keep=0,1,2,{fd}")], "is a directory"),
        ("idle", vec!["keep=0,1,2,999".to_owned()], "descriptor 999"),
        ("with-thread", vec![], "a process of one thread"),
        (
            "idle",
            vec!["share=/nonexistent/share".to_owned()],
            "/nonexistent/share",
        ),
    ] {
        let mut probe = Probe::start(scenario, &orders, &[]);
        assert_eq!(probe.outer, Some(7), "{orders:?}");
        assert!(
            probe.stderr().contains(says),
            "{orders:?}: {}",
            probe.stderr()
        );
    }
}

fn closing_the_jail_is_cheap() {
    let directories = Directories::new();
    let start = std::time::Instant::now();
    let ended = run("costs", &directories.orders());
    let all = start.elapsed();
    println!(
        "from spawn to the end of the jailed process {all:?}; {}",
        ended.stdout.replace('\n', ", ")
    );
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(all < std::time::Duration::from_secs(2), "{all:?}");

    let mut probe = Probe::start("idle", &directories.orders(), &[]);
    assert_eq!(probe.line(), "ready");
    let status = fs::read_to_string(format!("/proc/{}/status", probe.pid.unwrap())).unwrap();
    for line in status
        .lines()
        .filter(|line| line.contains("Rss") || line.starts_with("VmRSS"))
    {
        println!("five confined threads: {line}");
    }
    probe.go();
    assert_eq!(probe.end().code, Some(0));
}
