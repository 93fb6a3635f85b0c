//! What a template is good for.

use std::arch::x86_64::__cpuid_count;
use std::fmt::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use crate::paths::Paths;

/// Raised when templates are made in another way.
const VERSION: u32 = 4;
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Characters of a key.
pub const KEY_CHARS: usize = 32;

/// What of a virtual machine its guest has seen when it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Those that it was booted with, which every clone has: 1 to 32.
    pub vcpus: u32,
    /// Those that the guest knows of; a clone has at most so many.
    pub possible_vcpus: u32,
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Network interfaces that the guest has found: a clone's first. For a driver to find one costs as much as all else that a
    /// clone's set-up does.
    pub nics: u32,
    /// The caller's words on the kernel's command line.
    pub cmdline: String,
}

/// Guest RAM of the templates that every sandbox of as much memory or more can be cloned from, bytes: a sandbox's that says
/// nothing of its memory. What a larger one has beyond it is added when it is cloned.
const COMMON_BYTES: u64 = 256 << 20;

/// The most guest RAM of a template, bytes: a sixty-fourth of it is on disk, for the guest's description of its pages.
const MAX_BYTES: u64 = 8 << 30;

/// CPUs that the guest of the template for more than one knows of: sandboxes of so many are its clones, and bring the others
/// online. As many as most pods have at most; a larger sandbox has a template of its own number, booted with all of them.
const SERVED_UP_TO: u32 = 8;

impl Shape {
    /// The shape of the template that serves sandboxes of `vcpus` CPUs and `memory_bytes`, with a `network` or without, best: its
    /// clones have nothing to take into use, up to [`MAX_BYTES`].
    pub fn serving(vcpus: u32, memory_bytes: u64, network: bool, cmdline: &str) -> Self {
        let (vcpus, possible_vcpus) = match vcpus {
            // A guest that knows of one CPU is cheaper while it is idle, by a quarter where KVM has no hardware: twenty of
            // those that know of more kept a host of two processors busy.
            2..=SERVED_UP_TO => (1, SERVED_UP_TO),
            _ => (vcpus, vcpus),
        };
        Self {
            vcpus,
            possible_vcpus,
            memory_bytes: memory_bytes.min(MAX_BYTES),
            nics: u32::from(network),
            cmdline: cmdline.to_owned(),
        }
    }

    /// The shape of the template that serves them, too, and those of every other size: the first to be built.
    pub fn common(&self) -> Self {
        Self {
            memory_bytes: self.memory_bytes.min(COMMON_BYTES),
            ..self.clone()
        }
    }
}

/// The name of a template: a hash of everything that it depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The key of the template for `shape` with the programs of `paths` on this host.
    ///
    /// The programs count by what identifies a file's content to its file system (device, inode, size, times of change): reading
    /// tens of megabytes would take longer than the start of a clone. A file that was copied or touched makes a new key; one that was
    /// changed cannot keep its time of change.
    ///
    /// # Errors
    /// A program is missing.
    pub fn of(paths: &Paths, shape: &Shape) -> Result<Self, Error> {
        let mut text = format!("cella template {VERSION}\n{}\n", env!("CARGO_PKG_VERSION"));
        for path in [paths.kernel(), paths.initrd(), paths.vmm()] {
            text.push_str(&identity(&path)?);
        }
        let _ = writeln!(
            text,
            "{} {} {} {} {:?}",
            shape.vcpus, shape.possible_vcpus, shape.memory_bytes, shape.nics, shape.cmdline
        );
        text.push_str(&processor());
        // Where KVM has no hardware the guest counts the host's time stamps, which begin anew with it.
        text.push_str(&std::fs::read_to_string(BOOT_ID).map_err(Error::file("reading", BOOT_ID))?);
        let host = rustix::system::uname();
        let _ = writeln!(text, "{:?} {:?}", host.release(), host.version());
        Ok(Self(hex(&Sha256::digest(text))))
    }

    /// A key as text, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        let valid = text.len() == KEY_CHARS
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        valid.then(|| Self(text.to_owned()))
    }

    /// The key as text: a directory's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn identity(path: &Path) -> Result<String, Error> {
    let meta = std::fs::metadata(path).map_err(Error::file("looking at", path))?;
    Ok(format!(
        "{} {} {} {}.{} {}.{}\n",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec()
    ))
}

/// Leaves that say which processor it is and what it can do. None of them differs between the processors of a host, but for the
/// fields that are masked. The VMM compares in full what KVM makes of them.
fn processor() -> String {
    let mut text = String::new();
    for (leaf, subleaf) in [(0, 0), (1, 0), (7, 0), (7, 1), (0xd, 1), (0x8000_0001, 0)] {
        let found = __cpuid_count(leaf, subleaf);
        // Leaf 1: the APIC id, and whether the system has switched XSAVE on.
        let ebx = match leaf {
            1 => found.ebx & 0x00ff_ffff,
            // The size of the state that is switched on at the moment.
            0xd => 0,
            _ => found.ebx,
        };
        let _ = writeln!(
            text,
            "{:x} {ebx:x} {:x} {:x}",
            found.eax, found.ecx, found.edx
        );
    }
    text
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes.iter().take(KEY_CHARS / 2) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::paths::testing::paths;

    fn shape() -> Shape {
        Shape {
            vcpus: 1,
            possible_vcpus: 8,
            memory_bytes: 128 << 20,
            nics: 0,
            cmdline: String::new(),
        }
    }

    #[test]
    fn everything_that_a_guest_sees_changes_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        for program in [paths.kernel(), paths.initrd(), paths.vmm()] {
            std::fs::write(program, "one").unwrap();
        }
        let key = |shape: &Shape| Key::of(&paths, shape).unwrap();
        let first = key(&shape());
        assert_eq!(first, key(&shape()), "it is not random");
        assert_eq!(Key::parse(first.as_str()), Some(first.clone()));
        let mut seen = vec![first];
        for change in [
            |shape: &mut Shape| shape.vcpus = 2,
            |shape: &mut Shape| shape.possible_vcpus = 9,
            |shape: &mut Shape| shape.memory_bytes += 1 << 20,
            |shape: &mut Shape| shape.nics = 1,
            |shape: &mut Shape| shape.cmdline.push_str("quiet"),
        ] {
            let mut other = shape();
            change(&mut other);
            seen.push(key(&other));
        }
        for program in [paths.kernel(), paths.initrd(), paths.vmm()] {
            std::fs::write(program, "another").unwrap();
            seen.push(key(&shape()));
        }
        for (index, one) in seen.iter().enumerate() {
            assert!(!seen[..index].contains(one), "{index}");
        }
    }

    #[test]
    fn each_size_has_a_template_and_one_serves_all_that_are_larger() {
        let shape = |mib: u64| Shape::serving(1, mib << 20, true, "");
        let best = |mib| shape(mib).memory_bytes >> 20;
        assert_eq!([64, 257, 8192, 8193].map(best), [64, 257, 8192, 8192]);
        let common = |mib| shape(mib).common().memory_bytes >> 20;
        assert_eq!([64, 256, 257, 8193].map(common), [64, 256, 256, 256]);
        assert_eq!(shape(8193).common(), Shape::serving(1, 256 << 20, true, ""));
    }

    #[test]
    fn one_template_serves_two_to_eight_cpus() {
        let cpus = |cpus| {
            let shape = Shape::serving(cpus, 256 << 20, false, "");
            (shape.vcpus, shape.possible_vcpus)
        };
        assert_eq!([2, 3, 8].map(cpus), [(1, 8); 3]);
        assert_eq!([1, 9, 32].map(cpus), [(1, 1), (9, 9), (32, 32)]);
    }

    #[test]
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Key::of(&paths(dir.path()), &shape()).unwrap_err();
        assert!(error.to_string().contains("vmlinux"), "{error}");
    }

    #[test]
    fn what_is_no_key_could_be_a_path() {
        for text in ["", "..", "../../etc", &"g".repeat(32), &"a".repeat(33)] {
            assert_eq!(Key::parse(text), None, "{text}");
        }
    }
}
