//! How the agent and a process it has just made talk until `execve`: one byte for each step forward, and a failure
//! as a step, an index into what was planned, and an errno. The socket closes with `execve`, which is its success.

use std::os::fd::RawFd;

use super::sys::{self, Errno, SysResult};

/// Where in its way to `execve` a process failed. The index that goes with it counts in the plan's list of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    /// Descriptors, session, dumpable: what cannot fail on a sane kernel.
    Prepare,
    /// Joining namespace number `index` of the plan.
    JoinNamespace,
    /// Making the namespaces that cannot be made by `clone3`.
    UnshareNamespaces,
    /// Writing the time namespace's offsets.
    TimeOffsets,
    /// Becoming root of the user namespace.
    UserNamespaceRoot,
    /// Writing the out-of-memory score adjustment.
    OomScore,
    /// Setting sysctl number `index`.
    Sysctl,
    /// Setting the host name (0) or the domain name (1).
    UtsName,
    /// Making all mounts private.
    PrivateMounts,
    /// Attaching the root filesystem.
    AttachRoot,
    /// Resolving or making the destination of mount `index`.
    MountTarget,
    /// Mounting mount `index`.
    MountAttach,
    /// Setting the propagation of mount `index`.
    MountPropagation,
    /// Making device `index`.
    Device,
    /// Making the standard link `index` in /dev.
    DeviceLink,
    /// Making the terminal; `index` counts `terminal::STEPS`.
    Terminal,
    /// Masking path `index`.
    MaskPath,
    /// Making path `index` read-only.
    ReadonlyPath,
    /// Making the root read-only or setting its propagation.
    RootAttributes,
    /// Changing to the new root.
    Pivot,
    /// Setting up standard stream `index`.
    Stdio,
    /// Setting rlimit `index`.
    Rlimit,
    /// Entering the working directory.
    WorkingDirectory,
    /// Dropping capability `index` from the bounding set.
    BoundingSet,
    /// Setting the groups.
    Groups,
    /// Setting the group id.
    Gid,
    /// Setting the user id.
    Uid,
    /// Setting the capabilities.
    Capabilities,
    /// Raising ambient capability `index`.
    Ambient,
    /// no_new_privs.
    NoNewPrivileges,
    /// Loading the system call filter.
    Seccomp,
    /// Personality (0), I/O priority (1), session keyring (2), signals (3).
    Attributes,
    /// Looking the command up.
    Lookup,
    /// Executing it.
    Execute,
}

impl Step {
    const ALL: [Self; 34] = [
        Self::Prepare,
        Self::JoinNamespace,
        Self::UnshareNamespaces,
        Self::TimeOffsets,
        Self::UserNamespaceRoot,
        Self::OomScore,
        Self::Sysctl,
        Self::UtsName,
        Self::PrivateMounts,
        Self::AttachRoot,
        Self::MountTarget,
        Self::MountAttach,
        Self::MountPropagation,
        Self::Device,
        Self::DeviceLink,
        Self::Terminal,
        Self::MaskPath,
        Self::ReadonlyPath,
        Self::RootAttributes,
        Self::Pivot,
        Self::Stdio,
        Self::Rlimit,
        Self::WorkingDirectory,
        Self::BoundingSet,
        Self::Groups,
        Self::Gid,
        Self::Uid,
        Self::Capabilities,
        Self::Ambient,
        Self::NoNewPrivileges,
        Self::Seccomp,
        Self::Attributes,
        Self::Lookup,
        Self::Execute,
    ];
}

/// A failure in the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub step: Step,
    pub index: u32,
    pub errno: Errno,
}

/// Result of the child's steps.
pub(super) type ChildResult<T = ()> = Result<T, Failure>;

/// Names the step at which a system call failed.
pub(super) trait At<T> {
    /// At `step`.
    fn at(self, step: Step) -> ChildResult<T>;
    /// At entry `index` of `step`.
    fn at_index(self, step: Step, index: usize) -> ChildResult<T>;
}

impl<T> At<T> for SysResult<T> {
    fn at(self, step: Step) -> ChildResult<T> {
        self.at_index(step, 0)
    }

    fn at_index(self, step: Step, index: usize) -> ChildResult<T> {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        self.map_err(|errno| Failure { step, index, errno })
    }
}

/// What is said over the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Agent to child: go on.
    Continue,
    /// Child to agent: the mounts are there, the hooks before pivot_root may run.
    Hooks,
    /// Child to agent, with the master as ancillary data: here is the terminal.
    Terminal,
    /// Child to agent: created, waiting for the start.
    Ready,
    /// Child to agent: it failed, and ends.
    Failed(Failure),
    /// The other side closed the socket.
    Closed,
}

const LENGTH: usize = 10;

impl Message {
    /// As bytes for the socket.
    pub(super) fn encode(self) -> [u8; LENGTH] {
        let mut bytes = [0u8; LENGTH];
        let (tag, failure) = match self {
            Self::Continue => (b'C', None),
            Self::Hooks => (b'H', None),
            Self::Terminal => (b'T', None),
            Self::Ready => (b'R', None),
            Self::Closed => (b'Q', None),
            Self::Failed(failure) => (b'F', Some(failure)),
        };
        bytes[0] = tag;
        if let Some(Failure { step, index, errno }) = failure {
            bytes[1] = step as u8;
            bytes[2..6].copy_from_slice(&index.to_ne_bytes());
            bytes[6..10].copy_from_slice(&errno.0.to_ne_bytes());
        }
        bytes
    }

    /// From bytes off the socket; what nobody says counts as closed.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        match bytes {
            [b'C', ..] => Self::Continue,
            [b'H', ..] => Self::Hooks,
            [b'T', ..] => Self::Terminal,
            [b'R', ..] => Self::Ready,
            [b'F', step, a, b, c, d, e, f, g, h] => Self::Failed(Failure {
                step: Step::ALL
                    .get(usize::from(*step))
                    .copied()
                    .unwrap_or(Step::Prepare),
                index: u32::from_ne_bytes([*a, *b, *c, *d]),
                errno: Errno(i32::from_ne_bytes([*e, *f, *g, *h])),
            }),
            _ => Self::Closed,
        }
    }

    /// Sends it.
    pub(super) fn send(self, socket: RawFd) -> SysResult {
        sys::write(socket, &self.encode())
    }

    /// Waits for the next one.
    pub(super) fn receive(socket: RawFd) -> SysResult<Self> {
        let mut bytes = [0u8; LENGTH];
        let length = match sys::read(socket, &mut bytes) {
            // A peer that died with our message unread.
            Err(Errno(libc::ECONNRESET)) => 0,
            other => other?,
        };
        Ok(Self::decode(bytes.get(..length).unwrap_or_default()))
    }
}

/// In the child: waits until the agent lets it go on; ends the process if the agent is gone.
pub(super) fn wait_for_agent(socket: RawFd) {
    match Message::receive(socket) {
        Ok(Message::Continue) => {}
        _ => sys::exit(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_survives_the_socket() {
        for (position, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, position, "{step:?} is out of order");
            let failure = Failure {
                step,
                index: 7 + position as u32,
                errno: Errno(2),
            };
            let message = Message::Failed(failure);
            assert_eq!(Message::decode(&message.encode()), message);
        }
    }

    #[test]
    fn noise_counts_as_closed() {
        assert_eq!(Message::decode(&[]), Message::Closed);
        assert_eq!(Message::decode(b"F\x01\x02"), Message::Closed);
        assert_eq!(Message::decode(b"zzzzzzzzzz"), Message::Closed);
    }
}
