//! Containers of one pod, and what they share.

use std::fs;

use super::host;
use cella_tests::Host;

/// A pod with a container `c` that sleeps. Commands are run in it by exec.
pub struct Pod {
    pub host: Host,
}

impl Pod {
    /// Boots it with `cpus` CPUs; `None` where the machine lacks something.
    pub fn boot(cpus: &str) -> Option<Self> {
        let host = host()?;
        let image = host.busybox();
        let args = ["run", "--pod", "pod", "--cpus", cpus, "-d", "--name", "c"];
        let sleep = [
            "sh",
            "-c",
            "trap 'exit 7' TERM; while :; do sleep 1 & wait $!; done",
        ];
        let args: Vec<_> = args
            .into_iter()
            .chain([image.as_str()])
            .chain(sleep)
            .collect();
        host.cella(&args).expect_status(0);
        Some(Self { host })
    }

    /// What `sh -c script` prints in container `c`, which must succeed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let said = self
            .host
            .cella(&["exec", "c", "sh", "-c", script])
            .expect_status(0);
        said.stdout
    }

    /// Runs another container of the pod to its end.
    pub fn run(&self, options: &[&str], command: &[&str]) -> cella_tests::Said {
        let image = self.host.busybox();
        let args: Vec<_> = ["run", "--pod", "pod"]
            .into_iter()
            .chain(options.iter().copied())
            .chain([image.as_str()])
            .chain(command.iter().copied())
            .collect();
        self.host.cella(&args)
    }

    /// Stops everything and checks that nothing is left.
    pub fn end(self) {
        self.host.cella(&["stop", "c"]).expect_status(0);
        let list = self.host.cella(&["ps", "--json"]).expect_status(0);
        assert!(
            list.stdout.contains("\"code\":7"),
            "its trap's status: {list:?}"
        );
        self.host.cella(&["rm", "c"]).expect_status(0);
        self.host.cella(&["stop", "pod"]).expect_status(0);
        self.host.assert_clean();
    }
}

#[test]
fn two_containers_in_a_pod_of_two_cpus() {
    let Some(pod) = Pod::boot("2") else { return };
    assert_eq!(pod.sh("nproc").trim(), "2");

    // What the pod shares, and what each container has of its own.
    let namespaces = "for n in uts ipc net mnt pid; do readlink /proc/self/ns/$n; done; hostname";
    let of_c = pod.sh(namespaces);
    let of_other = pod
        .run(&[], &["sh", "-c", namespaces])
        .expect_status(0)
        .stdout;
    let (of_c, of_other): (Vec<_>, Vec<_>) = (of_c.lines().collect(), of_other.lines().collect());
    assert_eq!(of_c[..3], of_other[..3], "uts, ipc and net are the pod's");
    assert_ne!(of_c[3], of_other[3], "mounts are a container's own");
    assert_ne!(of_c[4], of_other[4], "pids are a container's own");
    assert_eq!(of_c[5], "pod");
    assert_eq!(of_other[5], "pod");

    // Both CPUs compute at once, with vector state that must survive each other.
    let spin = "a=$(head -c 100000 /dev/zero | sha256sum); b=$(head -c 100000 /dev/zero | sha256sum); [ \"$a\" = \"$b\" ]";
    pod.sh(&format!("({spin}) & p=$!; ({spin}) && wait $p"));

    // An id in use.
    pod.run(&["--name", "c"], &["true"])
        .expect_failure(&["c exists already"]);
    pod.end();
}

#[test]
fn volumes_and_bundles() {
    let Some(pod) = Pod::boot("1") else { return };
    let shared = pod.host.path("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("in"), "from the host").unwrap();
    let file = pod.host.path("file");
    fs::write(&file, "a file").unwrap();
    let rw = format!("{}:/rw", shared.display());
    let ro = format!("{}:/ro:ro", shared.display());
    let one = format!("{}:/one", file.display());
    let script = "cat /rw/in /one; echo out > /rw/out && chown 1000:2000 /rw/out; echo x 2>/dev/null > /ro/x && exit 9; exit 0";
    let said = pod
        .run(&["-v", &rw, "-v", &ro, "-v", &one], &["sh", "-c", script])
        .expect_status(0);
    assert_eq!(said.stdout, "from the hosta file");
    assert_eq!(fs::read_to_string(shared.join("out")).unwrap(), "out\n");
    let meta = fs::metadata(shared.join("out")).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(
        (meta.uid(), meta.gid()),
        (1000, 2000),
        "files are the guest user's"
    );
    assert!(!shared.join("x").exists(), "a read-only volume was written");
    pod.end();
}
