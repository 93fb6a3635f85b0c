//! Running sandboxes saved, and others that go on from there.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use cella_host::template::Shape;
use cella_tests::netns::{Netns, missing_for_networks_on};
use cella_tests::{Host, Said, skip};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::here::{Here, MEMORY, block_on};
use super::pool::wait_for;

/// Of the sandbox: more than its template's.
const MORE: u64 = MEMORY + (64 << 20);
const MORE_FLAG: &str = "320M";

/// What the container does: it counts, in its memory, to a file that it has open in a volume, to its root file system and to
/// its output. It waits by reading what never comes: a process more each time would cost a second where the kernel is emulated.
const COUNTS: &str = "mkfifo /dev/shm/f; exec 3>>/v/counted 4</v/read 5<>/dev/shm/f; cd /kept; i=0
    while :; do i=$((i+1)); echo $i >&3; echo $i > i; echo at $i; read -t 1 x <&5; done";
/// How long the container may take to its next step.
const STEP: Duration = Duration::from_secs(30);
/// How long after its beginning a `cella snapshot restore` is killed, milliseconds.
const KILLED_AFTER: [u64; 4] = [10, 40, 90, 200];

#[test]
fn a_running_sandbox_goes_on_elsewhere() {
    block_on(async {
        if let Some(missing) = missing_for_networks_on("kvm") {
            return skip(&missing);
        }
        let Some(here) = Here::with(&Shape::serving(1, MEMORY, true, "")).await else {
            return;
        };
        let saved = Saved::new(&here.host);
        saved.it_goes_on_itself();
        saved.others_go_on();
        saved.what_is_no_snapshot_is_said();
        saved.a_restore_that_is_killed_leaves_nothing();
        saved.what_cannot_be_saved_is_said();
        saved.an_owner_that_is_killed_leaves_no_snapshot();
        // The template of its size, which was missing.
        wait_for("its template", || here.templates().len() == 2);
        here.host.assert_clean();
    });
}

/// The container `one`, and a snapshot of its sandbox.
struct Saved<'a> {
    host: &'a Host,
    snapshot: PathBuf,
    image: String,
    /// For each sandbox of this test, by its name.
    networks: HashMap<&'static str, Netns>,
}

impl<'a> Saved<'a> {
    fn new(host: &'a Host) -> Self {
        let volume = host.path("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("read"), "a line\n").unwrap();
        let image = host.busybox();
        let this = Self {
            host,
            snapshot: host.path("snapshot"),
            image,
            networks: ["one", "two", "three", "four"]
                .map(|name| (name, Netns::new()))
                .into(),
        };
        let netns = this.networks["one"].path();
        let volume = format!("{}:/v", volume.display());
        let script = format!("mkdir /kept; {COUNTS}");
        let mut args = vec!["run", "-d", "--name", "one", "--memory", MORE_FLAG];
        args.extend([
            "--netns",
            &netns,
            "-v",
            &volume,
            &this.image,
            "sh",
            "-c",
            &script,
        ]);
        host.cella(&args).expect_status(0);
        this.steps("one");
        let said = host.cella(&["snapshot", "save", "one", this.path()]);
        said.expect_status(0);
        this
    }

    fn path(&self) -> &str {
        self.snapshot.to_str().unwrap()
    }

    fn sh(&self, container: &str, script: &str) -> String {
        let said = self.host.cella(&["exec", container, "sh", "-c", script]);
        said.expect_status(0).stdout
    }

    /// Where the container is in its counting; 0 while it writes that down.
    fn count(&self, container: &str) -> u32 {
        self.sh(container, "cat /kept/i")
            .trim()
            .parse()
            .unwrap_or(0)
    }

    /// Waits until its output has gone on, and says where it was.
    #[track_caller]
    fn steps(&self, container: &str) -> u32 {
        let log = || self.host.cella(&["logs", container]).stdout;
        let was = log().lines().count();
        let deadline = Instant::now() + STEP;
        while log().lines().count() <= was {
            assert!(Instant::now() < deadline, "{container} does not go on");
            std::thread::sleep(Duration::from_millis(100));
        }
        let log = log();
        let last = log.lines().last().unwrap();
        last.trim_start_matches("at ").parse().unwrap()
    }

    fn restore(&self, name: &str) {
        let said = self.try_restore(self.path(), name);
        assert_eq!(said.expect_status(0).stdout, format!("{name}\n"));
    }

    fn try_restore(&self, dir: &str, name: &str) -> Said {
        let netns = self.networks[name].path();
        let args = [
            "snapshot", "restore", dir, "--name", name, "--netns", &netns,
        ];
        self.host.cella(&args)
    }

    /// The memory that the guest of a container has, and that it reaches its own network, and it alone.
    fn memory_and_network(&self, container: &str) -> String {
        let Netns { net, net6, mac, .. } = &self.networks[container];
        let said = self.sh(
            container,
            &format!(
                "ping -c 1 -W 20 {net}.1 >/dev/null && grep MemTotal /proc/meminfo
                cat /sys/class/net/eth0/address; ip -o addr show dev eth0; ip route; ip -6 route"
            ),
        );
        for part in [
            mac,
            &format!("{net}.2/24"),
            &format!("{net6}:2/64"),
            &format!("default via {net}.1 dev eth0"),
            &format!("default via {net6}:1 dev eth0"),
        ] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
        let others = { self.networks.iter() }.filter(|(name, _)| **name != container);
        for (_, other) in others {
            assert!(!said.contains(&format!("{}.", other.net)), "{said}");
        }
        said.lines().next().unwrap().to_owned()
    }

    fn remove(&self, name: &str) {
        self.host.cella(&["kill", name]).expect_status(0);
        let deadline = Instant::now() + STEP;
        let mut removed = false;
        // Its owner removes the sandbox after the container has ended.
        while !removed || self.host.path(&format!("run/{name}")).exists() {
            assert!(Instant::now() < deadline, "{name} does not end");
            std::thread::sleep(Duration::from_millis(50));
            removed = removed || self.host.cella(&["rm", name]).status == 0;
        }
    }

    /// Kills those whose command line has every one of `words`; one may have ended by itself.
    fn kill_processes(&self, words: &[&str]) {
        for (pid, line) in self.host.processes() {
            if words.iter().all(|word| line.contains(word))
                && let Some(pid) = Pid::from_raw(pid.cast_signed())
                && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
            {
                let _ = pidfd_send_signal(&process, Signal::KILL);
                // A zombie can have threads that still hold its locks. When these have ended too, it can be read.
                let mut ended = [PollFd::new(&process, PollFlags::IN)];
                poll(&mut ended, None).unwrap();
            }
        }
    }

    fn it_goes_on_itself(&self) {
        assert!(self.steps("one") > 0);
        let memory = fs::metadata(self.snapshot.join("memory")).unwrap();
        assert_eq!(memory.len(), MORE);
        let written = memory.blocks() * 512;
        assert!(written < MEMORY / 4, "{written} bytes are written");
        assert_eq!(memory.mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(&self.snapshot).unwrap().mode() & 0o7777, 0o700);
    }

    /// Two, beside the first: from the same memory, and different from there on.
    fn others_go_on(&self) {
        let saved_at: u32 = fs::read_to_string(self.snapshot.join("rootfs/one/kept/i"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        for name in ["two", "three"] {
            self.restore(name);
        }
        let mut uuids = Vec::new();
        let memory = self.memory_and_network("one");
        for name in ["one", "two", "three"] {
            assert_eq!(self.memory_and_network(name), memory);
            let at = self.steps(name);
            assert!(at > saved_at, "{name} is at {at}, saved at {saved_at}");
            assert!([self.count(name), self.count(name)].iter().max() >= Some(&at));
            // A handle of the past on a volume, and one that is read by another process.
            assert_eq!(self.sh(name, "cat /proc/1/fd/4"), "a line\n");
            let said = self.sh(name, "cat /proc/sys/kernel/random/uuid; date +%s");
            let (uuid, seconds) = said.trim_end().split_once('\n').unwrap();
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            let late = since.as_secs().abs_diff(seconds.parse().unwrap());
            assert!(late < 30, "the clock of {name} is {late} s off");
            uuids.push(uuid.to_owned());
        }
        uuids.sort();
        uuids.dedup();
        assert_eq!(uuids.len(), 3);
        // What each has written to its root file system is its own; the volume is everybody's.
        self.sh("two", "echo two > /kept/own");
        let others = self.host.cella(&["exec", "three", "cat", "/kept/own"]);
        assert_ne!(others.status, 0);
        let counted = fs::read_to_string(self.host.path("volume/counted")).unwrap();
        assert!(counted.lines().count() as u32 > saved_at + 2, "{counted}");
        // A restored one can be saved as well.
        let again = self.host.path("again");
        let said = self
            .host
            .cella(&["snapshot", "save", "two", again.to_str().unwrap()]);
        said.expect_status(0);
        self.steps("two");
        self.remove("two");
        let restored = self.try_restore(again.to_str().unwrap(), "four");
        restored.expect_status(0);
        assert_eq!(self.memory_and_network("four"), memory);
        assert_eq!(self.sh("four", "cat /kept/own"), "two\n");
        self.steps("four");
        for name in ["three", "four"] {
            self.remove(name);
        }
    }

    fn what_is_no_snapshot_is_said(&self) {
        let restore = |dir: &str, name: &str| self.try_restore(dir, name);
        restore("/nonexistent", "two").expect_failure(&["/nonexistent", "No such file"]);
        restore(self.path(), "one").expect_failure(&["one", "exists already"]);
        let args = ["snapshot", "restore", self.path(), "--name", "two"];
        let said = self.host.cella(&args);
        said.expect_failure(&["had the interfaces eth0", "has no interfaces"]);
        let args = [&args[..], &["--netns", "/run/netns/none"]].concat();
        let said = self.host.cella(&args);
        said.expect_failure(&["/run/netns/none", "No such file"]);
        let copy = self.host.path("damaged");
        let damage = |file: &str, change: &dyn Fn(&File), word: &str| {
            let _ = fs::remove_dir_all(&copy);
            let copied = Command::new("cp")
                .arg("-a")
                .args([&self.snapshot, &copy])
                .status();
            assert!(copied.unwrap().success());
            let path = copy.join(file);
            change(&File::options().write(true).open(&path).unwrap());
            restore(copy.to_str().unwrap(), "two").expect_failure(&[word]);
        };
        damage("state", &|file| file.set_len(200).unwrap(), "truncated");
        damage(
            "state",
            &|file| file.write_all_at(b"no", 300).unwrap(),
            "altered",
        );
        damage(
            "memory",
            &|file| file.set_len(1 << 20).unwrap(),
            "memory file has",
        );
        damage(
            "about.json",
            &|file| file.set_len(40).unwrap(),
            "about.json",
        );
        damage(
            "about.json",
            &|file| file.write_all_at(b"{\"version\":9,\"x\":\"", 0).unwrap(),
            "about.json",
        );
        let volume = self.host.path("volume");
        let away = self.host.path("away");
        fs::rename(&volume, &away).unwrap();
        restore(self.path(), "two").expect_failure(&["volume", "No such file"]);
        fs::rename(&away, &volume).unwrap();
        // It is still good.
        self.restore("two");
        self.remove("two");
    }

    fn a_restore_that_is_killed_leaves_nothing(&self) {
        let records = || {
            fs::read_dir(self.host.path("lib/containers"))
                .unwrap()
                .count()
        };
        let before = (records(), self.networks["two"].state());
        for after in KILLED_AFTER {
            let netns = self.networks["two"].path();
            let mut args = vec!["snapshot", "restore", self.path(), "--name", "two"];
            args.extend(["--netns", &netns]);
            let mut child = self.host.command(&args).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(after));
            // First the one that starts the other, which may not have its own command line yet.
            let _ = child.kill();
            child.wait().unwrap();
            self.kill_processes(&[" two "]);
            self.host.cella(&["gc"]).expect_status(0);
            self.host.cella(&["rm", "two"]);
            assert_eq!((records(), self.networks["two"].state()), before);
            assert!(!self.host.path("run/two").exists());
        }
    }

    fn what_cannot_be_saved_is_said(&self) {
        let save = |id: &str, dir: &str| self.host.cella(&["snapshot", "save", id, dir]);
        save("one", self.path()).expect_failure(&["it is there"]);
        save("nobody", "/tmp/x").expect_failure(&["no sandbox nobody"]);
        save("one", "/nonexistent/x").expect_failure(&["/nonexistent/x", "No such file"]);
        let other = self.host.path("other");
        let other = other.to_str().unwrap();
        let open = "exec 5>/kept/gone; rm /kept/gone; echo ready; read x";
        let child = self.host.command(&["exec", "-i", "one", "sh", "-c", open]);
        let mut child = { child }
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        save("one", other).expect_failure(&["removed", "open"]);
        drop(child.stdin.take());
        child.wait().unwrap();
        let args = [
            "run",
            "-d",
            "--hypervisor",
            "qemu",
            "--name",
            "emulated",
            &self.image,
        ];
        if cella_tests::missing_for("qemu").is_none() {
            let args: Vec<_> = args.into_iter().chain(["sleep", "1000"]).collect();
            self.host.cella(&args).expect_status(0);
            save("emulated", other).expect_failure(&["saves no machines"]);
            self.remove("emulated");
        }
        assert!(
            !PathBuf::from(other).exists() && !PathBuf::from(format!("{other}.draft")).exists()
        );
        self.steps("one");
    }

    fn an_owner_that_is_killed_leaves_no_snapshot(&self) {
        let target = self.host.path("half");
        let args = ["snapshot", "save", "one", target.to_str().unwrap()];
        let mut child = self.host.command(&args).spawn().unwrap();
        let draft = self.host.path("half.draft");
        let deadline = Instant::now() + STEP;
        while !draft.exists() && child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "nothing is written");
        }
        self.kill_processes(&["--name one", "run -d"]);
        let said = cella_tests::finish(child, &[]);
        assert!(target.exists() == (said.status == 0), "{said:?}");
        self.host.cella(&["gc"]).expect_status(0);
        self.host.cella(&["rm", "one"]).expect_status(0);
        assert!(said.status != 0, "it was too late to kill it: {said:?}");
    }
}
