//! From a step and an errno of the child's to an [`Error`] that names things.

use std::ffi::CStr;
use std::io;
use std::path::PathBuf;

use super::Error;
use super::init::InitPlan;
use super::process::ProcessPlan;
use super::report::{Failure, Step};
use super::terminal;

/// A failure of a process's own steps.
pub(super) fn process_failure(plan: &ProcessPlan, failure: Failure) -> Error {
    let Failure { step, index, errno } = failure;
    let source: io::Error = errno.into();
    let user = |step| Error::User {
        uid: plan.uid,
        gid: plan.gid,
        step,
        source: errno.into(),
    };
    let process = |step: String| Error::Process {
        step,
        source: errno.into(),
    };
    match step {
        Step::Lookup | Step::Execute => command_failure(plan, errno.0),
        Step::WorkingDirectory => Error::WorkingDirectory {
            path: plan.cwd(),
            source,
        },
        Step::Groups => user("setting its groups"),
        Step::Gid => user("setting the group id"),
        Step::Uid => user("setting the user id"),
        Step::Seccomp => Error::Seccomp {
            step: "loading the filter".into(),
            source: Box::new(source),
        },
        Step::Terminal => Error::Terminal {
            step: terminal::STEPS
                .get(index as usize)
                .copied()
                .unwrap_or("making it"),
            source,
        },
        Step::OomScore => process("setting oomScoreAdj".into()),
        Step::Stdio => process(format!("setting up standard stream {index}")),
        Step::Rlimit => process(format!("setting rlimit number {index} of the spec")),
        Step::BoundingSet => process(format!("dropping capability {index} from the bounding set")),
        Step::Capabilities => process("setting capabilities".into()),
        Step::Ambient => process(format!("raising ambient capability {index}")),
        Step::NoNewPrivileges => process("setting no_new_privs".into()),
        Step::Attributes => process(
            match index {
                0 => "setting the personality",
                1 => "setting the I/O priority",
                2 => "making a session keyring",
                _ => "resetting signals",
            }
            .into(),
        ),
        Step::JoinNamespace => Error::Namespace {
            step: "joining the container's namespaces".into(),
            source,
        },
        other => process(format!("{other:?}")),
    }
}

/// Not found and not executable are two things to whoever runs a command.
fn command_failure(plan: &ProcessPlan, errno: i32) -> Error {
    let command = plan.command.clone();
    let source = io::Error::from_raw_os_error(errno);
    match errno {
        libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG => {
            Error::CommandNotFound { command, source }
        }
        libc::E2BIG | libc::ENOMEM | libc::EAGAIN | libc::EMFILE | libc::ENFILE => Error::Process {
            step: format!("executing {command:?}"),
            source,
        },
        _ => Error::NotExecutable { command, source },
    }
}

/// A failure of an init.
pub(super) fn init_failure(plan: &InitPlan, failure: Failure) -> Error {
    let Failure { step, index, errno } = failure;
    let source: io::Error = errno.into();
    let namespace = |step: String| Error::Namespace {
        step,
        source: errno.into(),
    };
    match step {
        Step::JoinNamespace => namespace(format!(
            "joining the {} namespace",
            plan.namespaces.join_name(index)
        )),
        Step::UnshareNamespaces => namespace("making new ones".into()),
        Step::TimeOffsets => namespace("setting linux.timeOffsets".into()),
        Step::UserNamespaceRoot => {
            namespace("becoming root of the user namespace (is container id 0 mapped?)".into())
        }
        Step::Sysctl => {
            let name = plan.sysctls.get(index as usize).map(|(path, _)| text(path));
            let step = format!("setting sysctl {}", name.unwrap_or_default());
            Error::Process { step, source }
        }
        Step::UtsName => {
            let step = if index == 0 {
                "setting the hostname"
            } else {
                "setting the domainname"
            };
            Error::Process {
                step: step.into(),
                source,
            }
        }
        Step::MountTarget | Step::MountAttach | Step::MountPropagation => {
            mount_failure(plan, failure)
        }
        Step::PrivateMounts
        | Step::AttachRoot
        | Step::Device
        | Step::DeviceLink
        | Step::MaskPath
        | Step::ReadonlyPath
        | Step::RootAttributes
        | Step::Pivot => root_failure(plan, failure),
        _ => process_failure(&plan.process, failure),
    }
}

fn mount_failure(plan: &InitPlan, failure: Failure) -> Error {
    let mount = plan
        .root
        .as_ref()
        .and_then(|root| root.mounts.get(failure.index as usize));
    Error::Mount {
        mount_source: mount.map(|mount| mount.source.clone()).unwrap_or_default(),
        destination: mount
            .map(super::mounts::MountPlan::destination)
            .unwrap_or_default(),
        step: match failure.step {
            Step::MountTarget => "making the mount point",
            Step::MountPropagation => "setting its propagation",
            _ => "mounting",
        },
        source: failure.errno.into(),
    }
}

fn root_failure(plan: &InitPlan, failure: Failure) -> Error {
    let Failure { step, index, errno } = failure;
    let root = plan.root.as_ref();
    let whole = root
        .map(|root| root.path.display().to_string())
        .unwrap_or_default();
    let of = |list: fn(&super::rootfs::RootPlan) -> &Vec<std::ffi::CString>| {
        root.and_then(|root| list(root).get(index as usize))
            .map(|path| text(path))
    };
    let (step, path) = match step {
        Step::PrivateMounts => ("making private all mounts of", "/".into()),
        Step::AttachRoot => ("attaching", whole),
        Step::Device => (
            "making device",
            root.map(|root| root.devices.name(index))
                .unwrap_or_default(),
        ),
        Step::DeviceLink => ("making the standard links in", "/dev".into()),
        Step::MaskPath => ("masking", of(|root| &root.masked).unwrap_or_default()),
        Step::ReadonlyPath => (
            "making read-only",
            of(|root| &root.readonly_paths).unwrap_or_default(),
        ),
        Step::RootAttributes => ("setting the mount options of", whole),
        _ => ("changing to", whole),
    };
    Error::Rootfs {
        step,
        path: PathBuf::from(path),
        source: errno.into(),
    }
}

fn text(path: &CStr) -> String {
    path.to_string_lossy().into_owned()
}
