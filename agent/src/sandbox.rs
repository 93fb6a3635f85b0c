//! The pod: its identity, mounts, sysctls, clock and entropy, as SetUpSandbox gives them.

use std::collections::HashMap;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};

use cella_proto::agent::{Mount, RenewRequest, SetUpSandboxRequest};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::time::{ClockId, Timespec};

use crate::{cpus, memory, network};

/// Where the agent keeps what its pod's containers mount.
const RUN: &str = "/run/cella";
/// Where the host's directory is mounted, as its requests say.
const SHARE: &str = "/run/cella/share";
/// The root of the container that a template's guest rehearses; the host knows it.
const REHEARSAL: &str = "/run/cella/rehearsal";
/// Size of the pod's /dev/shm when the request does not say, as container runtimes have it.
const DEFAULT_SHM: u64 = 64 << 20;
/// Bytes of entropy taken from one request.
const MAX_ENTROPY: usize = 1024;
const NANOSECONDS: i64 = 1_000_000_000;

/// Why a sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not make sense.
    #[error("{what} {value:?}: {why}")]
    Invalid {
        /// Which part of the request.
        what: &'static str,
        /// What it says.
        value: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The kernel refuses.
    #[error("{doing} {what}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// On what.
        what: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The network.
    #[error("setting up the network")]
    Network(#[from] network::Error),
}

/// Does what every pod needs and no identity: a template does it once for all of its clones.
///
/// # Errors
///
/// The first step that failed.
pub fn prepare() -> Result<(), Error> {
    mount_shm(0)?;
    for directory in [SHARE, REHEARSAL] {
        std::fs::create_dir_all(directory).map_err(system("making directory", directory))?;
    }
    Ok(network::set_up(&[], &[], &[], "")?)
}

/// Sets the pod up. What depends on the clock or on random numbers comes after these. `prepared`: [`prepare`] was called.
///
/// # Errors
///
/// The first step that failed; what was done before it stays done.
pub fn set_up(request: &SetUpSandboxRequest, prepared: bool) -> Result<(), Error> {
    add_entropy(&request.entropy)?;
    set_clock(request.clock_ns)?;
    memory::take_into_use(request.added_memory_bytes).map_err(system(
        "taking added memory into use:",
        &format!("{} bytes", request.added_memory_bytes),
    ))?;
    cpus::take_into_use(request.vcpus)?;
    set_hostname(&request.hostname)?;
    if !prepared {
        mount_shm(request.shm_bytes)?;
        std::fs::create_dir_all(RUN).map_err(system("making directory", RUN))?;
    } else if request.shm_bytes != 0 {
        resize_shm(request.shm_bytes)?;
    }
    if !request.resolv_conf.is_empty() {
        let path = Path::new(RUN).join("resolv.conf");
        std::fs::write(&path, &request.resolv_conf)
            .map_err(system("writing", &path.to_string_lossy()))?;
    }
    for mount in &request.mounts {
        mount_in_guest(mount)?;
    }
    set_sysctls(&request.sysctls)?;
    if !prepared || !request.interfaces.is_empty() || !request.routes.is_empty() {
        network::set_up(
            &request.interfaces,
            &request.routes,
            &request.neighbors,
            &request.spare_hardware_address,
        )?;
    }
    Ok(())
}

/// What another guest that went on from the same snapshot must not have as well.
///
/// # Errors
///
/// The step that failed.
pub fn renew(request: &RenewRequest) -> Result<(), Error> {
    add_entropy(&request.entropy)?;
    set_clock(request.clock_ns)?;
    if !request.interfaces.is_empty() {
        network::renew(&request.interfaces, &request.routes, &request.neighbors)?;
    }
    Ok(())
}

fn set_hostname(hostname: &str) -> Result<(), Error> {
    if hostname.is_empty() {
        return Ok(());
    }
    rustix::system::sethostname(hostname.as_bytes())
        .map_err(io::Error::from)
        .map_err(system("setting the hostname to", hostname))
}

fn set_clock(clock_ns: i64) -> Result<(), Error> {
    if clock_ns == 0 {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: clock_ns.div_euclid(NANOSECONDS),
        tv_nsec: clock_ns.rem_euclid(NANOSECONDS),
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(io::Error::from)
        .map_err(system("setting the clock to", &clock_ns.to_string()))
}

/// struct rand_pool_info of random(4), with room for its bytes.
#[repr(C)]
struct RandomPoolInfo {
    entropy_bits: libc::c_int,
    length: libc::c_int,
    bytes: [u8; MAX_ENTROPY],
}

/// _IOW('R', 0x03, int[2])
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// _IO('R', 0x07)
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Credits the host's entropy and has the generator use it at once: a clone must not repeat its template's numbers.
fn add_entropy(entropy: &[u8]) -> Result<(), Error> {
    let entropy = entropy.get(..MAX_ENTROPY).unwrap_or(entropy);
    if entropy.is_empty() {
        return Ok(());
    }
    let failed = |error| system("adding entropy to", "/dev/random")(error);
    let random = rustix::fs::open("/dev/random", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    // At most MAX_ENTROPY, far below what an int holds.
    let length = entropy.len() as libc::c_int;
    let mut info = RandomPoolInfo {
        entropy_bits: length.saturating_mul(8),
        length,
        bytes: [0; MAX_ENTROPY],
    };
    if let Some(bytes) = info.bytes.get_mut(..entropy.len()) {
        bytes.copy_from_slice(entropy);
    }
    const { assert!(size_of::<RandomPoolInfo>() == MAX_ENTROPY + 8) };
    // SAFETY: the ioctl reads the header and as many bytes behind it as the header says, which are there.
    let added = unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY as _, &raw const info) };
    if added < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: this ioctl has no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG as _) } < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

fn mount_shm(bytes: u64) -> Result<(), Error> {
    let size = if bytes == 0 { DEFAULT_SHM } else { bytes };
    mount_in_guest(&Mount {
        source: "shm".to_owned(),
        destination: "/dev/shm".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: [
            "nosuid",
            "nodev",
            "noexec",
            "mode=1777",
            &format!("size={size}"),
        ]
        .map(str::to_owned)
        .to_vec(),
        ..Default::default()
    })
}

fn resize_shm(bytes: u64) -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let size = format!("size={bytes}\0");
    let size = std::ffi::CStr::from_bytes_until_nul(size.as_bytes()).unwrap_or_default();
    rustix::mount::mount_remount("/dev/shm", flags, size)
        .map_err(io::Error::from)
        .map_err(system("resizing", "/dev/shm"))
}

/// Mounts into the agent's own file system, making the mount point.
fn mount_in_guest(mount: &Mount) -> Result<(), Error> {
    let destination = absolute("mount destination", &mount.destination)?;
    std::fs::create_dir_all(&destination)
        .map_err(system("making mount point", &mount.destination))?;
    let (flags, data) = mount_options(&mount.options);
    let data = std::ffi::CString::new(data).map_err(|_| Error::Invalid {
        what: "options of the mount at",
        value: mount.destination.clone(),
        why: "a NUL byte in them",
    })?;
    let data = (!data.is_empty()).then_some(data.as_c_str());
    rustix::mount::mount(
        mount.source.as_str(),
        &destination,
        mount.fstype.as_str(),
        flags,
        data,
    )
    .map_err(io::Error::from)
    .map_err(system(
        "mounting",
        &format!(
            "{} ({}) on {}",
            mount.source, mount.fstype, mount.destination
        ),
    ))
}

/// The flags among mount(8)'s options, and the rest, which is the file system's.
fn mount_options(options: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MountFlags::RDONLY,
            "rw" | "defaults" => flags -= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "bind" => flags |= MountFlags::BIND,
            "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<(), Error> {
    for (name, value) in sysctls {
        let path = sysctl_path(name)?;
        std::fs::write(&path, value)
            .map_err(system("setting sysctl", &format!("{name}={value}")))?;
    }
    Ok(())
}

/// /proc/sys/net/ipv4/ip_forward for net.ipv4.ip_forward. As sysctl(8) has it, the first separator decides: with a
/// slash, the dots belong to the names (net/ipv4/conf/eth0.1/forwarding).
fn sysctl_path(name: &str) -> Result<PathBuf, Error> {
    let relative = match name.find(['.', '/']).and_then(|at| name.as_bytes().get(at)) {
        Some(b'/') => name.to_owned(),
        _ => name.replace('.', "/"),
    };
    let plain = Path::new(&relative)
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if relative.is_empty() || !plain || name.contains("..") {
        return Err(Error::Invalid {
            what: "sysctl",
            value: name.to_owned(),
            why: "not the name of one",
        });
    }
    Ok(Path::new("/proc/sys").join(relative))
}

/// `path`, which must be absolute and go straight down.
fn absolute(what: &'static str, path: &str) -> Result<PathBuf, Error> {
    let plain = Path::new(path)
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::RootDir));
    if !path.starts_with('/') || !plain {
        return Err(Error::Invalid {
            what,
            value: path.to_owned(),
            why: "not an absolute path without `..`",
        });
    }
    Ok(PathBuf::from(path))
}

fn system(doing: &'static str, what: &str) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_owned();
    move |source| Error::System {
        doing,
        what,
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names_stay_below_proc_sys() {
        let path = |name| sysctl_path(name).map(|path| path.to_string_lossy().into_owned());
        assert_eq!(
            path("net.ipv4.ip_forward").unwrap(),
            "/proc/sys/net/ipv4/ip_forward"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        for bad in [
            "",
            "../../etc/passwd",
            "/etc/passwd",
            "net/../../../etc/passwd",
            "....//etc",
        ] {
            assert!(sysctl_path(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn mount_options_are_flags_and_data() {
        let options = ["ro", "nosuid", "dax=never", "rw", "size=1"].map(str::to_owned);
        let (flags, data) = mount_options(&options);
        assert_eq!(flags, MountFlags::NOSUID);
        assert_eq!(data, "dax=never,size=1");
    }

    #[test]
    fn mount_points_are_absolute() {
        assert!(absolute("mount destination", "/run/cella/share").is_ok());
        for bad in ["", "run", "/run/../etc"] {
            assert!(absolute("mount destination", bad).is_err(), "{bad:?}");
        }
    }
}
