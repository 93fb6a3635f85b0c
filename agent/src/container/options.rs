//! Mount options: mount(8)'s words to the kernel's flags, attributes and data.

use super::sys::MountAttr;
use super::{Error, Result};

const RDONLY: u64 = 0x01;
const NOSUID: u64 = 0x02;
const NODEV: u64 = 0x04;
const NOEXEC: u64 = 0x08;
const ATIME_MASK: u64 = 0x70;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;
const MS_NOSYMFOLLOW: u64 = 0x100;

/// A propagation type and whether it goes for the whole tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Propagation {
    /// MS_SHARED, MS_SLAVE, MS_PRIVATE or MS_UNBINDABLE.
    kind: u64,
    recursive: bool,
}

impl Propagation {
    /// From the spec's words.
    pub(super) fn parse(word: &str) -> Option<Self> {
        let (word, recursive) = match word.strip_prefix('r') {
            Some(rest) => (rest, true),
            None => (word, false),
        };
        let kind = match word {
            "shared" => libc::MS_SHARED,
            "slave" => libc::MS_SLAVE,
            "private" => libc::MS_PRIVATE,
            "unbindable" => libc::MS_UNBINDABLE,
            _ => return None,
        };
        Some(Self { kind, recursive })
    }

    /// For mount(2).
    pub(super) fn mount_flags(self) -> u64 {
        self.kind | if self.recursive { libc::MS_REC } else { 0 }
    }

    /// For mount_setattr(2), and whether recursive.
    pub(super) fn attribute(self) -> (MountAttr, bool) {
        (
            MountAttr {
                propagation: self.kind,
                ..MountAttr::default()
            },
            self.recursive,
        )
    }
}

/// A mount's options.
#[derive(Clone, Debug, Default)]
pub(super) struct MountOptions {
    pub bind: bool,
    pub recursive_bind: bool,
    /// mount(2)'s flags, for a new file system.
    pub flags: u64,
    /// What the flags are to mount_setattr(2), for a bind mount.
    attributes: MountAttr,
    /// Attributes for the whole tree (`rro`...).
    pub recursive: MountAttr,
    pub propagation: Option<Propagation>,
    /// What only the file system understands, joined by commas.
    pub data: String,
}

impl MountOptions {
    /// The attribute changes of a bind mount, as few as can be: nothing is left shared with the agent's mounts unless
    /// asked for.
    pub(super) fn bind_attributes(&self) -> Vec<(MountAttr, bool)> {
        let propagation = self.propagation.unwrap_or(Propagation {
            kind: libc::MS_PRIVATE,
            recursive: true,
        });
        let (with_propagation, whole) = propagation.attribute();
        let mut changes = Vec::new();
        // In a tree of one mount, or with one reach for both, one call does all.
        if !self.recursive_bind || !whole || self.attributes.is_empty() {
            let mut attr = self.attributes;
            attr.propagation = with_propagation.propagation;
            changes.push((attr, whole && self.recursive_bind));
        } else {
            changes.push((with_propagation, whole));
            changes.push((self.attributes, false));
        }
        changes.push((self.recursive, true));
        changes.retain(|(attr, _)| !attr.is_empty());
        changes
    }

    /// The same for a whole tree of mounts.
    pub(super) fn recursively(&self) -> Self {
        Self {
            recursive_bind: true,
            ..self.clone()
        }
    }

    fn set(&mut self, flag: u64, attribute: u64) {
        self.flags |= flag;
        self.attributes.set |= attribute;
    }

    /// Negations (`rw`, `suid`...) undo an earlier word; a bind mount without the word keeps what its source has.
    fn unset(&mut self, flag: u64, attribute: u64) {
        self.flags &= !flag;
        self.attributes.set &= !attribute;
    }

    fn set_atime(&mut self, flag: u64, attribute: u64) {
        self.flags &= !(libc::MS_NOATIME | libc::MS_RELATIME | libc::MS_STRICTATIME);
        self.flags |= flag;
        self.attributes.set = self.attributes.set & !ATIME_MASK | attribute;
        self.attributes.clear |= ATIME_MASK;
    }

    /// Words of the recursive kind; false if it is none.
    fn set_recursive(&mut self, word: &str) -> bool {
        let (set, clear) = match word {
            "rro" => (RDONLY, 0),
            "rrw" => (0, RDONLY),
            "rnosuid" => (NOSUID, 0),
            "rsuid" => (0, NOSUID),
            "rnodev" => (NODEV, 0),
            "rdev" => (0, NODEV),
            "rnoexec" => (NOEXEC, 0),
            "rexec" => (0, NOEXEC),
            "rnodiratime" => (NODIRATIME, 0),
            "rdiratime" => (0, NODIRATIME),
            "rrelatime" | "ratime" => (0, ATIME_MASK),
            "rnoatime" => (NOATIME, ATIME_MASK),
            "rstrictatime" | "rnorelatime" => (STRICTATIME, ATIME_MASK),
            "rnostrictatime" => (0, ATIME_MASK),
            "rnosymfollow" => (NOSYMFOLLOW, 0),
            "rsymfollow" => (0, NOSYMFOLLOW),
            _ => return false,
        };
        self.recursive.set = self.recursive.set & !clear | set;
        self.recursive.clear = self.recursive.clear & !set | clear;
        true
    }

    /// Words that are flags of the mount itself; false if it is none.
    fn set_flag(&mut self, word: &str) -> bool {
        match word {
            "defaults" | "loud" | "nolazytime" | "noiversion" => {}
            "ro" => self.set(libc::MS_RDONLY, RDONLY),
            "rw" => self.unset(libc::MS_RDONLY, RDONLY),
            "nosuid" => self.set(libc::MS_NOSUID, NOSUID),
            "suid" => self.unset(libc::MS_NOSUID, NOSUID),
            "nodev" => self.set(libc::MS_NODEV, NODEV),
            "dev" => self.unset(libc::MS_NODEV, NODEV),
            "noexec" => self.set(libc::MS_NOEXEC, NOEXEC),
            "exec" => self.unset(libc::MS_NOEXEC, NOEXEC),
            "nosymfollow" => self.set(MS_NOSYMFOLLOW, NOSYMFOLLOW),
            "symfollow" => self.unset(MS_NOSYMFOLLOW, NOSYMFOLLOW),
            "nodiratime" => self.set(libc::MS_NODIRATIME, NODIRATIME),
            "diratime" => self.unset(libc::MS_NODIRATIME, NODIRATIME),
            "noatime" => self.set_atime(libc::MS_NOATIME, NOATIME),
            "strictatime" | "norelatime" => self.set_atime(libc::MS_STRICTATIME, STRICTATIME),
            "relatime" | "atime" | "nostrictatime" => self.set_atime(libc::MS_RELATIME, 0),
            "sync" => self.set(libc::MS_SYNCHRONOUS, 0),
            "async" => self.unset(libc::MS_SYNCHRONOUS, 0),
            "dirsync" => self.set(libc::MS_DIRSYNC, 0),
            "mand" => self.set(libc::MS_MANDLOCK, 0),
            "nomand" => self.unset(libc::MS_MANDLOCK, 0),
            "lazytime" => self.set(libc::MS_LAZYTIME, 0),
            "iversion" => self.set(libc::MS_I_VERSION, 0),
            "silent" => self.set(libc::MS_SILENT, 0),
            _ => return false,
        }
        true
    }
}

/// Parses a mount's options; what is no known word is data for the file system.
pub(super) fn parse(words: &[String]) -> Result<MountOptions> {
    let mut options = MountOptions::default();
    let refuse = |word: &str, reason: &str| {
        Error::unsupported("mounts[].options", format!("{word:?}: {reason}"))
    };
    for word in words {
        match word.as_str() {
            "bind" => options.bind = true,
            "rbind" => {
                options.bind = true;
                options.recursive_bind = true;
            }
            "remount" => return Err(refuse(word, "the container has nothing mounted yet")),
            "tmpcopyup" => {
                return Err(refuse(
                    word,
                    "copying an image's directory is for volumes to do",
                ));
            }
            "idmap" | "ridmap" => return Err(refuse(word, "id-mapped mounts are not supported")),
            "" => {}
            word => {
                if let Some(propagation) = Propagation::parse(word) {
                    options.propagation = Some(propagation);
                } else if !options.set_recursive(word) && !options.set_flag(word) {
                    if !options.data.is_empty() {
                        options.data.push(',');
                    }
                    options.data.push_str(word);
                }
            }
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> MountOptions {
        parse(&words.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn the_last_word_counts() {
        let options = parsed(&[
            "ro", "nosuid", "rw", "noatime", "relatime", "size=1m", "mode=755",
        ]);
        assert_eq!(options.flags, libc::MS_NOSUID | libc::MS_RELATIME);
        assert_eq!(options.data, "size=1m,mode=755");
        assert!(!options.bind);
    }

    #[test]
    fn a_plain_bind_is_made_private_in_one_call() {
        let private = MountAttr {
            propagation: libc::MS_PRIVATE,
            ..MountAttr::default()
        };
        assert_eq!(parsed(&["rbind"]).bind_attributes(), [(private, true)]);
        assert_eq!(parsed(&["bind"]).bind_attributes(), [(private, false)]);
        let read_only = MountAttr {
            set: RDONLY,
            ..private
        };
        assert_eq!(
            parsed(&["bind", "ro"]).bind_attributes(),
            [(read_only, false)]
        );
    }

    #[test]
    fn ro_is_for_the_top_and_rro_for_the_tree() {
        let ro = MountAttr {
            set: RDONLY,
            ..MountAttr::default()
        };
        let private = MountAttr {
            propagation: libc::MS_PRIVATE,
            ..MountAttr::default()
        };
        let slave = MountAttr {
            propagation: libc::MS_SLAVE,
            ..MountAttr::default()
        };
        assert_eq!(
            parsed(&["rbind", "ro"]).bind_attributes(),
            [(private, true), (ro, false)]
        );
        assert_eq!(
            parsed(&["rbind", "rro", "rslave"]).bind_attributes(),
            [(slave, true), (ro, true)]
        );
        assert_eq!(
            parsed(&["rbind", "ro", "slave"]).bind_attributes(),
            [(
                MountAttr {
                    propagation: libc::MS_SLAVE,
                    ..ro
                },
                false
            )]
        );
    }

    #[test]
    fn atime_words_exclude_each_other() {
        let options = parsed(&["bind", "noatime", "strictatime"]);
        assert_eq!(options.attributes.set, STRICTATIME);
        assert_eq!(options.attributes.clear, ATIME_MASK);
        assert_eq!(options.flags, libc::MS_STRICTATIME);
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        for word in ["tmpcopyup", "idmap", "ridmap", "remount"] {
            assert!(parse(&[word.to_string()]).is_err(), "{word}");
        }
    }
}
