//! The container's /dev: the nodes and links every container has, and the spec's devices.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use oci_spec::runtime as oci;
use oci_spec::runtime::LinuxDeviceType as Type;

use super::command::c_string;
use super::paths::{ensure_directory, ensure_file};
use super::report::{At, ChildResult, Step};
use super::sys::{self, Errno, SysResult};
use super::{Error, Result};

/// Devices that every container has, by the OCI spec: name, major, minor.
pub(super) const DEFAULTS: [(&CStr, u32, u32); 6] = [
    (c"null", 1, 3),
    (c"zero", 1, 5),
    (c"full", 1, 7),
    (c"random", 1, 8),
    (c"urandom", 1, 9),
    (c"tty", 5, 0),
];

/// Links that every container has: target, name.
const LINKS: [(&CStr, &CStr); 5] = [
    (c"/proc/self/fd", c"fd"),
    (c"/proc/self/fd/0", c"stdin"),
    (c"/proc/self/fd/1", c"stdout"),
    (c"/proc/self/fd/2", c"stderr"),
    (c"pts/ptmx", c"ptmx"),
];

#[derive(Debug)]
enum How {
    Make {
        mode: u32,
        number: u64,
        owner: Option<(u32, u32)>,
    },
    /// The guest's own node: what a user namespace, which cannot make nodes, gets.
    Tree(OwnedFd),
}

#[derive(Debug)]
struct Device {
    /// Below /dev.
    name: CString,
    how: How,
}

/// What is made in /dev.
#[derive(Debug, Default)]
pub(super) struct DevicePlan {
    devices: Vec<Device>,
    links: bool,
}

impl DevicePlan {
    /// From the spec. If /dev is bind-mounted it is somebody else's and nothing is made in it; with a new user
    /// namespace, nodes are the guest's, bound.
    pub(super) fn new(linux: &oci::Linux, dev_is_bound: bool, bind: bool) -> Result<Self> {
        if dev_is_bound {
            return Ok(Self::default());
        }
        let mut devices = Vec::new();
        let listed = linux.devices().as_deref().unwrap_or_default();
        for (name, major, minor) in DEFAULTS {
            let path = Path::new("/dev").join(std::ffi::OsStr::from_bytes(name.to_bytes()));
            if listed.iter().any(|device| device.path() == &path) {
                continue;
            }
            let how = if bind {
                How::Tree(open_node(&path)?)
            } else {
                let number = rustix::fs::makedev(major, minor);
                How::Make {
                    mode: libc::S_IFCHR | 0o666,
                    number,
                    owner: None,
                }
            };
            devices.push(Device {
                name: name.into(),
                how,
            });
        }
        for device in listed {
            devices.push(plan_listed(device, bind)?);
        }
        Ok(Self {
            devices,
            links: true,
        })
    }

    /// Descriptors that must stay open in the child.
    pub(super) fn keep(&self, keep: &mut Vec<RawFd>) {
        keep.extend(self.devices.iter().filter_map(|device| match &device.how {
            How::Tree(tree) => Some(tree.as_raw_fd()),
            How::Make { .. } => None,
        }));
    }

    /// Name of device `index`, for errors.
    pub(super) fn name(&self, index: u32) -> String {
        self.devices
            .get(index as usize)
            .map_or_else(String::new, |device| {
                format!("/dev/{}", device.name.to_string_lossy())
            })
    }

    /// In the child: makes everything in /dev under `root`. The umask is 0.
    pub(super) fn make(&self, root: RawFd) -> ChildResult {
        if !self.links {
            return Ok(());
        }
        let dev = ensure_directory(root, c"/dev").at(Step::Device)?;
        for (index, device) in self.devices.iter().enumerate() {
            device.make(dev).at_index(Step::Device, index)?;
        }
        for (index, (target, name)) in LINKS.into_iter().enumerate() {
            match sys::symlinkat(target, dev, name) {
                // An image's own /dev/ptmx would be the guest's terminals.
                Err(Errno(libc::EEXIST)) if name == c"ptmx" => sys::unlinkat(dev, name)
                    .and_then(|()| sys::symlinkat(target, dev, name))
                    .at_index(Step::DeviceLink, index)?,
                Err(Errno(libc::EEXIST)) => {}
                other => other.at_index(Step::DeviceLink, index)?,
            }
        }
        Ok(())
    }
}

impl Device {
    fn make(&self, dev: RawFd) -> SysResult {
        match &self.how {
            How::Make {
                mode,
                number,
                owner,
            } => self.make_node(dev, *mode, *number, *owner),
            How::Tree(tree) => {
                let target = ensure_file(dev, &self.name)?;
                sys::attach_tree(tree.as_raw_fd(), target, c"")
            }
        }
    }

    fn make_node(
        &self,
        dev: RawFd,
        mode: u32,
        number: u64,
        owner: Option<(u32, u32)>,
    ) -> SysResult {
        let parts = self.name.to_bytes();
        let (dir, name) = match parts.iter().rposition(|b| *b == b'/') {
            None => (dev, self.name.as_c_str()),
            Some(slash) => {
                let mut buffer = [0u8; 256];
                let parent = parts.get(..slash).unwrap_or_default();
                let place = buffer.get_mut(..slash).ok_or(Errno(libc::ENAMETOOLONG))?;
                place.copy_from_slice(parent);
                let parent =
                    CStr::from_bytes_until_nul(&buffer).map_err(|_| Errno(libc::EINVAL))?;
                let rest = self.name.to_bytes_with_nul().get(slash.saturating_add(1)..);
                let name = CStr::from_bytes_until_nul(rest.unwrap_or_default())
                    .map_err(|_| Errno(libc::EINVAL))?;
                (ensure_directory(dev, parent)?, name)
            }
        };
        match sys::mknodat(dir, name, mode, number) {
            Err(Errno(libc::EEXIST)) => {
                let stat = sys::stat_at(dir, name, libc::AT_SYMLINK_NOFOLLOW)?;
                if stat.st_mode & libc::S_IFMT == mode & libc::S_IFMT && stat.st_rdev == number {
                    return Ok(());
                }
                // Something of the image's in a device's place.
                sys::unlinkat(dir, name)?;
                sys::mknodat(dir, name, mode, number)?;
            }
            other => other?,
        }
        match owner {
            Some((uid, gid)) => sys::chown_at(dir, name, uid, gid),
            None => Ok(()),
        }
    }
}

fn plan_listed(device: &oci::LinuxDevice, bind: bool) -> Result<Device> {
    let field = "linux.devices[].path";
    let invalid =
        |reason: &str| Error::invalid(field, format!("{}: {reason}", device.path().display()));
    let below = device
        .path()
        .strip_prefix("/dev")
        .map_err(|_| invalid("is not below /dev"))?;
    let plain = below
        .components()
        .all(|c| matches!(c, std::path::Component::Normal(_)));
    if below.as_os_str().is_empty() || !plain || below.as_os_str().len() > 255 {
        return Err(invalid("is not a plain path below /dev"));
    }
    let name = c_string(field, below.as_os_str().as_bytes())?;
    if bind {
        return Ok(Device {
            name,
            how: How::Tree(open_node(device.path())?),
        });
    }
    let kind = match device.typ() {
        Type::B => libc::S_IFBLK,
        Type::C | Type::U => libc::S_IFCHR,
        Type::P => libc::S_IFIFO,
        Type::A => return Err(invalid("type 'a' is for rules, not for nodes")),
    };
    let number = |value: i64| u32::try_from(value).map_err(|_| invalid("number out of range"));
    let owner = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
    Ok(Device {
        name,
        how: How::Make {
            mode: kind | device.file_mode().unwrap_or(0o666) & 0o7777,
            number: rustix::fs::makedev(number(device.major())?, number(device.minor())?),
            owner: (owner != (0, 0)).then_some(owner),
        },
    })
}

fn open_node(path: &Path) -> Result<OwnedFd> {
    let c_path = c_string("linux.devices[].path", path.as_os_str().as_bytes())?;
    sys::clone_tree(libc::AT_FDCWD, &c_path, false)
        .map(sys::owned)
        .map_err(|errno| Error::Rootfs {
            step: "opening the guest's device",
            path: path.into(),
            source: errno.into(),
        })
}
