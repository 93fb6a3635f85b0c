//! Machines saved by one process and taken up by another.

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use cella_proto::vmm::{ErrorKind, Restore, Snapshot, Start, Stop, reply, request::Call};

use crate::configure::{Given, MEMORY, memfd};
use crate::guest::{AGENT_PORT, built, connect, pause, resume};
use crate::kernel::elf;
use crate::refused;
use crate::vmm::{Vmm, alone, fds};

const INVALID: ErrorKind = ErrorKind::ERROR_KIND_INVALID_ARGUMENT;
const FAILED: ErrorKind = ErrorKind::ERROR_KIND_FAILED_PRECONDITION;

/// Where the guest counts, and where it keeps writing what a register has held since its start.
const COUNTER: u64 = 0x180_0000;
const CONSTANT: u64 = 0x1122_3344_5566_7788;

fn counting() -> File {
    elf(
        guest! {
            "mov r8d, 0x1800000", "mov rbx, 0x1122334455667788", "xor ecx, ecx",
            "2: inc rcx", "mov [r8], rcx", "mov [r8 + 8], rbx", "in al, 0x80", "jmp 2b"
        },
        0x1000,
    )
}

/// A snapshot's files.
struct Saved {
    state: File,
    memory: File,
}

impl Saved {
    fn new(bytes: u64) -> Self {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(bytes).unwrap();
        Self {
            state: tempfile::tempfile().unwrap(),
            memory,
        }
    }

    fn call(&self, vmm: &mut Vmm) -> reply::Body {
        let snapshot = Snapshot {
            state_fd: 0,
            memory_fd: 1,
            ..Snapshot::default()
        };
        let fds = [self.state.as_fd(), self.memory.as_fd()];
        vmm.call(Call::Snapshot(snapshot), &fds)
    }

    /// Saves the running machine, which is paused afterwards.
    #[track_caller]
    fn take(vmm: &mut Vmm, bytes: u64) -> Self {
        vmm.done(pause(), &[]);
        let saved = Self::new(bytes);
        match saved.call(vmm) {
            reply::Body::Done(_) => saved,
            other => panic!("{other:?}; log: {}", vmm.log()),
        }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// A copy with its own state file.
    fn with_state(&self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut bytes = vec![0; self.state.metadata().unwrap().len() as usize];
        self.state.read_exact_at(&mut bytes, 0).unwrap();
        change(&mut bytes);
        let state = tempfile::tempfile().unwrap();
        state.write_all_at(&bytes, 0).unwrap();
        Self {
            state,
            memory: self.memory.try_clone().unwrap(),
        }
    }

    /// What a machine goes on from it with, the devices of `add_devices` with it.
    fn given(&self, vmm: &Vmm) -> Given {
        let mut given = Given::new(memfd(0)).unwrap();
        given.files[1] = OwnedFd::from(self.memory.try_clone().unwrap());
        let state_fd = given.add(self.state.try_clone().unwrap());
        given.configure.restore = Some(Restore {
            state_fd,
            ..Restore::default()
        })
        .into();
        given.add_devices(vmm.sockets.path(), 64);
        given
    }
}

fn stop(mut vmm: Vmm) {
    vmm.done(Call::Stop(Stop::default()), &[]);
    vmm.stopped();
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}

/// A counting guest, running, or nothing where that cannot be.
fn counting_machine(vcpus: u32) -> Option<Vmm> {
    counting_machine_of(vcpus, 0)
}

/// The same with a guest that is told of `possible` vCPUs.
fn counting_machine_of(vcpus: u32, possible: u32) -> Option<Vmm> {
    let mut vmm = Vmm::start()?;
    let mut given = Given::new(counting())?;
    given.configure.vcpus = vcpus;
    given.configure.possible_vcpus = possible;
    given.add_devices(vmm.sockets.path(), 64);
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    Some(vmm)
}

/// Counts until the counter is beyond `past`, by what snapshots say.
#[track_caller]
fn snapshot_past(vmm: &mut Vmm, past: u64) -> Saved {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let saved = Saved::take(vmm, MEMORY);
        if saved.word(COUNTER) > past {
            return saved;
        }
        assert!(Instant::now() < end, "the guest does not count");
        vmm.done(resume(), &[]);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_machine_goes_on_in_other_processes_where_it_was_saved() {
    let _alone = alone();
    let Some(mut first) = counting_machine(2) else {
        return;
    };
    let saved = snapshot_past(&mut first, 100);
    let count = saved.word(COUNTER);
    assert_eq!(saved.word(COUNTER + 8), CONSTANT);
    let used = saved.memory.metadata().unwrap().blocks() * 512;
    assert!(used < 1 << 20, "{used} bytes written");
    // It goes on itself.
    first.done(resume(), &[]);
    assert!(snapshot_past(&mut first, count).word(COUNTER) > count);
    stop(first);
    for _ in 0..2 {
        let mut vmm = Vmm::start().unwrap();
        let mut given = saved.given(&vmm);
        given.configure.vcpus = 2;
        vmm.done(Call::Configure(given.configure), &fds(&given.files));
        // Before its first instruction it is what was saved.
        assert_eq!(refused(vmm.call(resume(), &[])), FAILED);
        vmm.done(Call::Start(Start::default()), &[]);
        let later = snapshot_past(&mut vmm, count + 100);
        assert_eq!(later.word(COUNTER + 8), CONSTANT);
        // The file is every clone's: none has written to it.
        assert_eq!(saved.word(COUNTER), count);
        stop(vmm);
    }
}

/// Goes on from `saved` with so many vCPUs; the reason if it may not.
fn with_vcpus(saved: &Saved, vcpus: u32) -> Result<Vmm, String> {
    let mut vmm = Vmm::start().unwrap();
    let mut given = saved.given(&vmm);
    given.configure.vcpus = vcpus;
    match vmm.call(Call::Configure(given.configure), &fds(&given.files)) {
        reply::Body::Error(error) => {
            stop_unconfigured(vmm);
            Err(error.message)
        }
        reply::Body::Done(_) => {
            vmm.done(Call::Start(Start::default()), &[]);
            Ok(vmm)
        }
        other => panic!("{other:?}; log: {}", vmm.log()),
    }
}

#[test]
fn a_machine_goes_on_with_more_of_the_vcpus_that_its_guest_knows_of() {
    let _alone = alone();
    let Some(mut first) = counting_machine_of(1, 4) else {
        return;
    };
    let saved = snapshot_past(&mut first, 1);
    stop(first);
    let mut second = with_vcpus(&saved, 2).unwrap();
    let later = snapshot_past(&mut second, saved.word(COUNTER) + 1);
    stop(second);
    let mut third = with_vcpus(&later, 4).unwrap();
    snapshot_past(&mut third, later.word(COUNTER) + 1);
    stop(third);
    for (saved, vcpus, why) in [
        (&saved, 5, "vCPUs 1 to 4, and this one 5"),
        (&later, 1, "vCPUs 2 to 4, and this one 1"),
        (&later, 33, "vCPUs 2 to 4, and this one 33"),
    ] {
        let refused = with_vcpus(saved, vcpus).err().unwrap();
        assert!(refused.contains(why), "{refused}");
    }
}

/// Memory that a machine gets.
const MORE: u64 = 8 << 20;

fn add_memory(given: &mut Given) {
    let fd = given.add(memfd(MORE));
    let restore = given.configure.restore.as_mut().unwrap();
    (restore.added_memory_fd, restore.added_memory_bytes) = (Some(fd), MORE);
}

/// A snapshot of a machine that goes on from `saved` with more memory: it is in the file too.
fn grown(saved: &Saved) -> Saved {
    let mut vmm = Vmm::start().unwrap();
    let mut given = saved.given(&vmm);
    add_memory(&mut given);
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    vmm.done(pause(), &[]);
    assert_eq!(refused(Saved::new(MEMORY).call(&mut vmm)), INVALID);
    vmm.done(resume(), &[]);
    let grown = Saved::take(&mut vmm, MEMORY + MORE);
    stop(vmm);
    grown
}

#[test]
fn memory_that_a_machine_got_is_saved_with_it_and_cannot_become_more() {
    let _alone = alone();
    let Some(mut first) = Vmm::start() else {
        return;
    };
    let Some(mut given) = Given::new(counting()) else {
        return;
    };
    given.add_devices(first.sockets.path(), 64);
    given.configure.spare_slots = 1;
    first.done(Call::Configure(given.configure), &fds(&given.files));
    first.done(Call::Start(Start::default()), &[]);
    let saved = snapshot_past(&mut first, 1);
    stop(first);

    let grown = grown(&saved);
    let configured = |change: &dyn Fn(&mut Given)| {
        let mut vmm = Vmm::start().unwrap();
        let mut given = grown.given(&vmm);
        given.configure.memory_bytes = MEMORY + MORE;
        change(&mut given);
        let body = vmm.call(Call::Configure(given.configure), &fds(&given.files));
        (vmm, body)
    };
    for (change, text) in [
        (&add_memory as &dyn Fn(&mut Given), "no place for more"),
        (
            &|given: &mut Given| given.configure.memory_bytes = MEMORY,
            "memory bytes",
        ),
        (
            &|given: &mut Given| given.configure.memory_bytes = 4096,
            "memory bytes",
        ),
    ] {
        let (vmm, body) = configured(change);
        match body {
            reply::Body::Error(error) => {
                assert!(error.message.contains(text), "{text}: {}", error.message);
            }
            other => panic!("{text}: {other:?}"),
        }
        stop_unconfigured(vmm);
    }
    let (mut vmm, body) = configured(&|_| {});
    assert!(matches!(body, reply::Body::Done(_)), "{body:?}");
    vmm.done(Call::Start(Start::default()), &[]);
    std::thread::sleep(Duration::from_millis(50));
    let later = Saved::take(&mut vmm, MEMORY + MORE);
    assert!(later.word(COUNTER) > grown.word(COUNTER));
    stop(vmm);
}

/// What is asked for differently.
type Change = fn(&mut Given);

/// What does not fit, with the kind and a word of the refusal.
fn misfits(saved: &Saved) -> Vec<(Saved, Change, ErrorKind, &'static str)> {
    let altered = |at: usize| saved.with_state(|bytes| bytes[at] ^= 1);
    let same = || saved.with_state(|_| {});
    vec![
        (altered(0), |_| {}, INVALID, "no state file"),
        (altered(8), |_| {}, INVALID, "format"),
        (altered(200), |_| {}, INVALID, "altered"),
        (
            saved.with_state(|bytes| bytes.truncate(300)),
            |_| {},
            INVALID,
            "truncated",
        ),
        (
            same(),
            |given| given.configure.vcpus = 2,
            INVALID,
            "vCPUs 1, and this one 2",
        ),
        (
            same(),
            |given| given.configure.memory_bytes = 2 * MEMORY,
            INVALID,
            "memory bytes",
        ),
        (
            same(),
            |given| drop(given.configure.devices.pop()),
            INVALID,
            "a number of devices of 4 with room for 0 more, and this one 3",
        ),
        (
            same(),
            |given| given.configure.devices.swap(0, 1),
            INVALID,
            "kind",
        ),
        (
            same(),
            |given| given.files[1] = memfd(MEMORY),
            INVALID,
            "another content",
        ),
        (
            same(),
            |given| given.files[1] = memfd(0x1000),
            INVALID,
            "its memory file has 4096 bytes",
        ),
        (
            same(),
            |given| given.configure.console_fd = Some(0),
            INVALID,
            "console",
        ),
    ]
}

#[test]
fn snapshots_that_do_not_fit_are_refused_with_the_reason() {
    let _alone = alone();
    let Some(mut first) = counting_machine(1) else {
        return;
    };
    let saved = snapshot_past(&mut first, 1);
    stop(first);
    let cases = misfits(&saved);
    for (saved, change, kind, text) in cases {
        let mut vmm = Vmm::start().unwrap();
        let mut given = saved.given(&vmm);
        change(&mut given);
        match vmm.call(Call::Configure(given.configure), &fds(&given.files)) {
            reply::Body::Error(error) => {
                assert!(error.message.contains(text), "{text}: {}", error.message);
                assert_eq!(error.kind.unwrap(), kind, "{}", error.message);
            }
            other => panic!("{text}: {other:?}"),
        }
        stop_unconfigured(vmm);
    }
}

fn stop_unconfigured(mut vmm: Vmm) {
    vmm.done(Call::Stop(Stop::default()), &[]);
    assert_eq!(vmm.ended(), (Some(0), None), "{}", vmm.log());
}

#[test]
fn what_cannot_be_saved_is_refused_and_goes_on() {
    let _alone = alone();
    let Some(mut vmm) = counting_machine(1) else {
        return;
    };
    let saved = Saved::new(MEMORY);
    assert_eq!(refused(saved.call(&mut vmm)), FAILED, "it runs");
    vmm.done(pause(), &[]);
    assert_eq!(refused(Saved::new(0x1000).call(&mut vmm)), INVALID);
    // Files that cannot be written: opened for reading.
    let memory = tempfile::NamedTempFile::new().unwrap();
    memory.as_file().set_len(MEMORY).unwrap();
    let unwritable = Saved {
        state: tempfile::tempfile().unwrap(),
        memory: File::open(memory.path()).unwrap(),
    };
    assert_eq!(
        refused(unwritable.call(&mut vmm)),
        ErrorKind::ERROR_KIND_INTERNAL
    );
    let snapshot = Snapshot::default();
    assert_eq!(refused(vmm.call(Call::Snapshot(snapshot), &[])), INVALID);
    vmm.done(resume(), &[]);
    snapshot_past(&mut vmm, 1);
    stop(vmm);
}

#[test]
fn the_real_guest_goes_on_and_knows_that_its_connections_are_lost() {
    let _alone = alone();
    let Some([kernel, initrd]) = built() else {
        return;
    };
    let Some(mut vmm) = Vmm::start() else { return };
    let Some(mut given) = Given::new(kernel) else {
        return;
    };
    let bytes = 128 << 20;
    given.configure.memory_bytes = bytes;
    given.files[1] = memfd(bytes);
    given.configure.initrd_fd = Some(given.add(initrd));
    given.add_devices(vmm.sockets.path(), 64);
    let door = UnixListener::bind(vmm.sockets.path().join(AGENT_PORT)).unwrap();
    let open = Permissions::from_mode(0o666);
    std::fs::set_permissions(vmm.sockets.path().join(AGENT_PORT), open).unwrap();
    vmm.done(Call::Configure(given.configure), &fds(&given.files));
    vmm.done(Call::Start(Start::default()), &[]);
    // The agent's call is held: the snapshot is of a guest with a connection.
    let (call, _) = door.accept().unwrap();
    let saved = Saved::take(&mut vmm, bytes);
    let used = saved.memory.metadata().unwrap().blocks() * 512;
    assert!((4 << 20..bytes / 2).contains(&used), "{used} bytes written");
    drop(call);
    stop(vmm);
    for _ in 0..2 {
        let mut vmm = Vmm::start().unwrap();
        let mut given = saved.given(&vmm);
        given.configure.memory_bytes = bytes;
        let begin = Instant::now();
        vmm.done(Call::Configure(given.configure), &fds(&given.files));
        vmm.done(Call::Start(Start::default()), &[]);
        let restored = begin.elapsed();
        assert_eq!(connect(&vmm, AGENT_PORT)[..3], *b"OK ");
        println!(
            "restored in {restored:?}, answered after {:?}",
            begin.elapsed()
        );
        stop(vmm);
    }
}
