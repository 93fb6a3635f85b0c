use std::os::unix::fs::symlink;

use oci_spec::runtime::LinuxSeccomp;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;
use crate::image::{ImageRef, Store};

/// An image with this `config`, and the root file system that its users are looked up in.
struct Given {
    image: Image,
    rootfs: TempDir,
}

impl Given {
    fn new(config: Value) -> Self {
        let rootfs = tempfile::tempdir().unwrap();
        std::fs::create_dir(rootfs.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/srv:/bin/sh\n";
        std::fs::write(rootfs.path().join("etc/passwd"), passwd).unwrap();
        std::fs::write(
            rootfs.path().join("etc/group"),
            "log:x:4:web\nstaff:x:50:\n",
        )
        .unwrap();
        let store = tempfile::tempdir().unwrap();
        let store = Store::open(store.path()).unwrap();
        let reference = ImageRef::Rootfs(rootfs.path().to_path_buf());
        let mut image = store.prepare(&reference).unwrap();
        image.config = serde_json::from_value(json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": [] },
        }))
        .unwrap();
        Self { image, rootfs }
    }

    fn spec(&self, options: &SpecOptions) -> Result<Spec> {
        for_image(&self.image, options, self.rootfs.path())
    }

    /// The specification's JSON.
    fn json(&self, options: &SpecOptions) -> Value {
        serde_json::to_value(self.spec(options).unwrap()).unwrap()
    }
}

/// An image as most are.
fn web() -> Given {
    Given::new(json!({
        "Entrypoint": ["/entry"], "Cmd": ["serve", "--all"], "Env": ["PATH=/opt/bin:/bin", "A=image"],
        "WorkingDir": "/srv/www", "User": "web", "StopSignal": "SIGQUIT", "Volumes": { "/data": {} },
    }))
}

fn options() -> SpecOptions {
    SpecOptions {
        root: "/guest/rootfs".into(),
        ..SpecOptions::default()
    }
}

fn strings(value: &Value) -> Vec<&str> {
    let list = value.as_array().unwrap();
    list.iter().map(|text| text.as_str().unwrap()).collect()
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Everything of the process that an image decides.
#[test]
fn an_images_own_settings() {
    let spec = web().json(&options());
    let process = &spec["process"];
    assert_eq!(strings(&process["args"]), ["/entry", "serve", "--all"]);
    assert_eq!(
        strings(&process["env"]),
        ["PATH=/opt/bin:/bin", "A=image", "HOME=/srv"]
    );
    assert_eq!(process["cwd"], "/srv/www");
    assert_eq!(
        process["user"],
        json!({ "uid": 101, "gid": 102, "additionalGids": [102, 4] })
    );
    assert_eq!(
        spec["root"],
        json!({ "path": "/guest/rootfs", "readonly": false })
    );
    assert_eq!(
        spec["annotations"],
        json!({ "org.opencontainers.image.stopSignal": "SIGQUIT" })
    );
    assert_eq!(stop_signal(&web().image).unwrap(), 3);
}

#[test]
fn an_image_that_says_nothing() {
    let given = Given::new(json!({}));
    let options = SpecOptions {
        args: words("/bin/true"),
        ..options()
    };
    let spec = given.json(&options);
    let process = &spec["process"];
    assert_eq!(process["terminal"], json!(false));
    assert_eq!(
        process["user"],
        json!({ "uid": 0, "gid": 0, "additionalGids": [0] })
    );
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(strings(&process["env"]), [path, "HOME=/root"]);
    assert_eq!(process["cwd"], "/");
    assert_eq!(process["noNewPrivileges"], json!(false));
    assert_eq!(spec.get("hostname"), None);
    assert_eq!(spec["linux"].get("cgroupsPath"), None);
    assert_eq!(stop_signal(&given.image).unwrap(), 15);
}

#[test]
fn a_caller_overrules_the_image() {
    let given = web();
    let with = |change: fn(&mut SpecOptions)| {
        let mut options = options();
        change(&mut options);
        given.json(&options)
    };
    let args = |spec: Value| strings(&spec["process"]["args"]).join(" ");
    assert_eq!(args(with(|o| o.args = words("check"))), "/entry check");
    // A new entry point drops the image's arguments, which were meant for the old one.
    assert_eq!(args(with(|o| o.entrypoint = Some(words("/sh")))), "/sh");
    let both = with(|o| (o.entrypoint, o.args) = (Some(words("/sh -c")), words("ls")));
    assert_eq!(args(both), "/sh -c ls");
    assert_eq!(
        args(with(
            |o| (o.entrypoint, o.args) = (Some(vec![]), words("ls"))
        )),
        "ls"
    );

    assert_eq!(
        with(|o| o.cwd = Some("/tmp".into()))["process"]["cwd"],
        "/tmp"
    );
    let user = with(|o| o.user = Some("7:staff".into()))["process"]["user"].take();
    assert_eq!(user, json!({ "uid": 7, "gid": 50, "additionalGids": [50] }));
    // An empty user is root, as an image's is.
    assert_eq!(
        with(|o| o.user = Some(String::new()))["process"]["user"]["uid"],
        0
    );
    assert_eq!(with(|o| o.readonly = true)["root"]["readonly"], json!(true));
    assert_eq!(
        with(|o| o.terminal = true)["process"]["terminal"],
        json!(true)
    );
    assert_eq!(with(|o| o.hostname = Some("pod".into()))["hostname"], "pod");
    let group = with(|o| o.cgroups_path = Some("/pod/x".into()));
    assert_eq!(group["linux"]["cgroupsPath"], "/pod/x");
    let annotations = with(|o| {
        o.annotations = [("a", "b"), (STOP_SIGNAL, "9")]
            .map(|(k, v)| (k.into(), v.into()))
            .into();
    });
    assert_eq!(
        annotations["annotations"],
        json!({ "a": "b", STOP_SIGNAL: "9" })
    );
}

#[test]
fn a_later_variable_takes_the_place_of_an_earlier() {
    let given = Given::new(json!({
        "Cmd": ["x"], "Env": ["A=image", "B=image", "A=again", "TERM=dumb", "AA=", "C=x=y"],
    }));
    let mut options = options();
    options.terminal = true;
    options.hostname = Some("pod".into());
    options.env = ["B=caller", "HOSTNAME=mine", "HOME=/else", "N="]
        .map(str::to_owned)
        .into();
    let env = given.json(&options)["process"]["env"].take();
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let expected = [
        path,
        "HOSTNAME=mine",
        "TERM=dumb",
        "A=again",
        "B=caller",
        "AA=",
        "C=x=y",
        "HOME=/else",
        "N=",
    ];
    assert_eq!(strings(&env), expected);
    assert!(has_env(&options.env, "N") && !has_env(&options.env, "HOM"));

    let plain = Given::new(json!({ "Cmd": ["x"] }));
    let terminal = SpecOptions {
        terminal: true,
        ..self::options()
    };
    let env = plain.json(&terminal)["process"]["env"].take();
    assert_eq!(strings(&env), [path, "TERM=xterm", "HOME=/root"]);
}

/// The kernel's numbers of capabilities (capability.h).
fn bit(name: &str) -> u32 {
    match name {
        "CAP_CHOWN" => 0,
        "CAP_DAC_OVERRIDE" => 1,
        "CAP_FOWNER" => 3,
        "CAP_FSETID" => 4,
        "CAP_KILL" => 5,
        "CAP_SETGID" => 6,
        "CAP_SETUID" => 7,
        "CAP_SETPCAP" => 8,
        "CAP_NET_BIND_SERVICE" => 10,
        "CAP_NET_RAW" => 13,
        "CAP_SYS_CHROOT" => 18,
        "CAP_MKNOD" => 27,
        "CAP_AUDIT_WRITE" => 29,
        "CAP_SETFCAP" => 31,
        other => panic!("{other} is not docker's"),
    }
}

#[test]
fn capabilities_are_dockers() {
    let capabilities = web().json(&options())["process"]["capabilities"].take();
    for set in ["bounding", "effective", "permitted"] {
        let mask = strings(&capabilities[set])
            .iter()
            .fold(0, |mask, name| mask | 1_u64 << bit(name));
        assert_eq!(format!("{mask:016x}"), "00000000a80425fb", "{set}");
    }
    // What is inheritable would survive a change to another user.
    for set in ["inheritable", "ambient"] {
        assert!(strings(&capabilities[set]).is_empty(), "{set}");
    }
}

#[test]
fn a_container_does_not_see_what_tells_of_the_machine() {
    let linux = web().json(&options())["linux"].take();
    let masked = strings(&linux["maskedPaths"]);
    for path in [
        "/proc/kcore",
        "/proc/keys",
        "/proc/timer_list",
        "/proc/acpi",
        "/sys/firmware",
    ] {
        assert!(masked.contains(&path), "{path} in {masked:?}");
    }
    let readonly = [
        "/proc/bus",
        "/proc/fs",
        "/proc/irq",
        "/proc/sys",
        "/proc/sysrq-trigger",
    ];
    assert_eq!(strings(&linux["readonlyPaths"]), readonly);
    // The agent joins the pod's namespaces; a path would be one of the guest's files.
    let namespaces = linux["namespaces"].as_array().unwrap();
    let mut types: Vec<_> = namespaces
        .iter()
        .map(|ns| ns["type"].as_str().unwrap())
        .collect();
    types.sort_unstable();
    assert_eq!(types, ["cgroup", "ipc", "mount", "network", "pid", "uts"]);
    assert!(
        namespaces
            .iter()
            .all(|namespace| namespace.get("path").is_none())
    );
    let rules = linux["resources"]["devices"].as_array().unwrap();
    assert_eq!(rules[0], json!({ "allow": false, "access": "rwm" }));
    // No other rule opens a device of just any number.
    for rule in &rules[1..] {
        assert!(
            rule.get("major").is_some() || rule["access"] == "m",
            "{rule}"
        );
    }
}

#[test]
fn the_system_call_filter_is_a_valid_one() {
    let filter = web().json(&options())["linux"]["seccomp"].take();
    let typed: LinuxSeccomp = serde_json::from_value(filter.clone()).unwrap();
    assert_eq!(serde_json::to_value(&typed).unwrap(), filter);
    assert_eq!(filter["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(filter["defaultErrnoRet"], 1);
    let rules = filter["syscalls"].as_array().unwrap();
    let mut unconditional = Vec::new();
    for rule in rules {
        let names = strings(&rule["names"]);
        assert!(!names.is_empty());
        let valid = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_';
        assert!(
            names
                .iter()
                .all(|name| !name.is_empty() && name.bytes().all(valid)),
            "{names:?}"
        );
        if rule["action"] == "SCMP_ACT_ALLOW" && rule.get("args").is_none() {
            unconditional.extend(names);
        }
    }
    let count = unconditional.len();
    unconditional.sort_unstable();
    unconditional.dedup();
    assert_eq!(unconditional.len(), count, "a call is listed twice");
    for call in ["read", "openat", "execve", "futex", "rseq", "exit_group"] {
        assert!(unconditional.contains(&call), "{call}");
    }
    for call in [
        "mount",
        "umount2",
        "unshare",
        "setns",
        "clone",
        "clone3",
        "socket",
        "bpf",
        "perf_event_open",
        "kexec_load",
        "init_module",
        "finit_module",
        "reboot",
        "open_by_handle_at",
        "io_uring_setup",
        "add_key",
        "keyctl",
        "personality",
        "pivot_root",
        "swapon",
        "settimeofday",
        "userfaultfd",
    ] {
        assert!(!unconditional.contains(&call), "{call} is for no container");
    }
    let rule = |name: &str| {
        rules
            .iter()
            .find(|rule| strings(&rule["names"]).contains(&name))
            .unwrap()
    };
    assert_eq!(rule("clone3")["errnoRet"], 38);
    // CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
    let flags: u64 = [17, 25, 26, 27, 28, 29, 30]
        .map(|bit: u32| 1 << bit)
        .iter()
        .sum();
    let clone = json!({ "index": 0, "value": flags, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" });
    assert_eq!(rule("clone")["args"], json!([clone]));
    let vsock = json!({ "index": 0, "value": libc::AF_VSOCK, "op": "SCMP_CMP_NE" });
    assert_eq!(rule("socket")["args"], json!([vsock]));
}

fn mount(destination: &str) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(destination.into());
    mount.set_source(Some("/from/the/caller".into()));
    mount
}

#[test]
fn mounts_are_added_or_take_the_place_of_a_default_one() {
    let destinations = |options: &SpecOptions| -> Vec<String> {
        let spec = web().spec(options).unwrap();
        let mounts = spec.mounts().as_ref().unwrap();
        mounts
            .iter()
            .map(|mount| mount.destination().display().to_string())
            .collect()
    };
    let default = [
        "/proc",
        "/dev",
        "/dev/pts",
        "/sys",
        "/sys/fs/cgroup",
        "/dev/mqueue",
        "/dev/shm",
    ];
    assert_eq!(destinations(&options()), default);
    let mut with = options();
    with.mounts = vec![mount("/data"), mount("/dev/shm"), mount("/sys")];
    let expected = [
        "/proc",
        "/dev",
        "/dev/pts",
        "/sys/fs/cgroup",
        "/dev/mqueue",
        "/data",
        "/dev/shm",
        "/sys",
    ];
    assert_eq!(destinations(&with), expected);
    // The last of two at one place is the one that is meant.
    with.mounts = vec![mount("/data"), mount("/data")];
    assert_eq!(
        destinations(&with)
            .iter()
            .filter(|path| *path == "/data")
            .count(),
        1
    );

    let shm = |options: &SpecOptions| web().json(options)["mounts"].as_array().unwrap()[6].clone();
    assert_eq!(shm(&options())["type"], "tmpfs");
    let shared = SpecOptions {
        shm: Some("/run/shm".into()),
        ..options()
    };
    assert_eq!(
        (&shm(&shared)["type"], &shm(&shared)["source"]),
        (&json!("bind"), &json!("/run/shm"))
    );
}

/// What an option or a setting gets wrong is named by the error.
#[test]
fn errors_name_the_field() {
    let refused = |config: Value, change: &dyn Fn(&mut SpecOptions), words: &[&str]| {
        let mut options = options();
        change(&mut options);
        let error = Given::new(config).spec(&options).unwrap_err();
        let text = error.chain();
        for word in words {
            assert!(text.contains(word), "{text:?} does not say {word:?}");
        }
        assert!(!text.contains('\n'));
        error.kind()
    };
    let (cmd, keep) = (json!({ "Cmd": ["x"] }), |_: &mut SpecOptions| {});
    let long = "h".repeat(65);
    let cases: [(Value, &dyn Fn(&mut SpecOptions), &[&str]); 16] = [
        (json!({}), &keep, &["command", "the image has none"]),
        (cmd.clone(), &|o| o.entrypoint = Some(vec![]), &["command"]),
        (
            cmd.clone(),
            &|o| o.args = vec!["a\0b".into()],
            &["argument", "zero byte"],
        ),
        (json!({ "Cmd": ["x\0"] }), &keep, &["argument", "zero byte"]),
        (
            cmd.clone(),
            &|o| o.cwd = Some("tmp".into()),
            &["working directory \"tmp\""],
        ),
        (
            json!({ "Cmd": ["x"], "WorkingDir": "srv" }),
            &keep,
            &["working directory \"srv\""],
        ),
        (
            cmd.clone(),
            &|o| o.cwd = Some("/a\0".into()),
            &["working directory"],
        ),
        (
            cmd.clone(),
            &|o| o.env = words("A=1 NAME"),
            &["environment \"NAME\"", "NAME=VALUE"],
        ),
        (
            cmd.clone(),
            &|o| o.env = words("=x"),
            &["environment \"=x\""],
        ),
        (
            cmd.clone(),
            &|o| o.env = vec!["A=\0".into()],
            &["environment", "zero byte"],
        ),
        (
            json!({ "Cmd": ["x"], "Env": ["B"] }),
            &keep,
            &["the image's Env \"B\""],
        ),
        (
            cmd.clone(),
            &|o| o.hostname = Some(String::new()),
            &["host name"],
        ),
        (
            cmd.clone(),
            &|o| o.hostname = Some(long.clone()),
            &["host name", "64"],
        ),
        (
            cmd.clone(),
            &|o| o.hostname = Some("a\nb\0".into()),
            &["host name"],
        ),
        (
            cmd.clone(),
            &|o| o.mounts = vec![mount("data")],
            &["mount at data", "absolute"],
        ),
        (
            cmd.clone(),
            &|o| o.user = Some("4294967296".into()),
            &["user \"4294967296\""],
        ),
    ];
    for (config, change, words) in cases {
        assert_eq!(
            refused(config, change, words),
            ErrorKind::InvalidArgument,
            "{words:?}"
        );
    }
    let ghost = refused(
        cmd,
        &|o| o.user = Some("ghost".into()),
        &["user \"ghost\"", "/etc/passwd"],
    );
    assert_eq!(ghost, ErrorKind::NotFound);
    let of_image = json!({ "Cmd": ["x"], "User": "web:ghosts" });
    assert_eq!(
        refused(of_image, &keep, &["\"ghosts\"", "/etc/group"]),
        ErrorKind::NotFound
    );
}

#[test]
fn directories_are_made_inside_of_the_root_file_system() {
    let given = Given::new(json!({
        "Cmd": ["x"], "WorkingDir": "/srv/www", "Volumes": { "/data": {}, "/link/inner": {} },
    }));
    let root = given.rootfs.path();
    symlink("/deep", root.join("link")).unwrap();
    std::fs::create_dir(root.join("deep")).unwrap();
    let spec = given.spec(&options()).unwrap();
    make_directories(&given.image, &spec, root).unwrap();
    for path in ["srv/www", "data", "deep/inner"] {
        assert!(root.join(path).is_dir(), "{path}");
    }
    // Again is no error, and one that would be outside is one.
    make_directories(&given.image, &spec, root).unwrap();
    let outside = Given::new(json!({ "Cmd": ["x"], "Volumes": { "/../../out": {} } }));
    let spec = outside.spec(&options()).unwrap();
    let error = make_directories(&outside.image, &spec, outside.rootfs.path()).unwrap_err();
    assert!(error.to_string().contains("/../../out"), "{error}");
}

#[test]
fn signals_by_name_and_number() {
    for (text, number) in [
        ("SIGTERM", 15),
        ("term", 15),
        ("SigInt", 2),
        ("9", 9),
        ("09", 9),
        ("64", 64),
        ("WINCH", 28),
        ("SIGRTMIN", 34),
        ("SIGRTMIN+3", 37),
        ("RTMAX-14", 50),
        ("rtmax", 64),
        ("RTMIN+30", 64),
    ] {
        assert_eq!(parse_signal(text), Some(number), "{text}");
    }
    for text in [
        "",
        "0",
        "65",
        "-9",
        "+9",
        " 9",
        "SIG",
        "SIGSIGTERM",
        "SIGFOO",
        "RTMIN+31",
        "RTMAX-31",
        "RTMIN-1",
        "RTMIN+",
        "RTMAX+1",
        "RTMIN+99999999999",
        "99999999999999999999",
        "TERM\n",
    ] {
        assert_eq!(parse_signal(text), None, "{text:?}");
    }
    let wrong = Given::new(json!({ "StopSignal": "SIGFOO" }));
    let error = stop_signal(&wrong.image).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error.to_string().contains("StopSignal: \"SIGFOO\""),
        "{error}"
    );
    assert_eq!(
        stop_signal(&Given::new(json!({ "StopSignal": "" })).image).unwrap(),
        15
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_settings_give_a_specification_or_one_line(
        args in proptest::collection::vec(".{0,8}", 0..3),
        env in proptest::collection::vec(".{0,8}|[A-C]=.{0,3}", 0..4),
        cwd in proptest::option::of(".{0,8}|/[a-z/.]{0,8}"),
        user in proptest::option::of(".{0,6}|[0-9]{1,11}(:[0-9]{1,11})?"),
        hostname in proptest::option::of(".{0,70}"),
        terminal: bool,
    ) {
        let config = json!({ "Cmd": args, "Env": env, "WorkingDir": cwd, "User": user });
        let by_caller = SpecOptions { args, env, cwd, user, hostname, terminal, ..options() };
        for (config, options) in [(config, options()), (json!({}), by_caller)] {
            match Given::new(config).spec(&options) {
                Ok(spec) => {
                    let process = spec.process().as_ref().unwrap();
                    prop_assert!(process.cwd().is_absolute());
                    prop_assert!(!process.args().as_ref().unwrap().is_empty());
                }
                Err(error) => prop_assert!(!error.chain().contains('\n')),
            }
        }
    }

    #[test]
    fn each_variable_is_there_once_with_its_last_value(
        given in proptest::collection::vec("[AB]{1,2}=[a-z=]{0,3}", 0..12),
    ) {
        let mut env = Vec::new();
        set_env(&mut env, &given, "environment").unwrap();
        let name = |entry: &String| entry.split('=').next().unwrap().to_owned();
        for entry in &env {
            prop_assert_eq!(env.iter().filter(|other| name(other) == name(entry)).count(), 1);
            let last = given.iter().rfind(|other| name(other) == name(entry));
            prop_assert_eq!(last, Some(entry));
        }
        prop_assert!(given.iter().all(|entry| has_env(&env, &name(entry))));
    }

    #[test]
    fn any_text_is_a_signal_of_1_to_64_or_none(text in ".{0,12}|(?i)(sig)?rtm(in|ax)[+-]?[0-9]{0,4}") {
        prop_assert!(parse_signal(&text).is_none_or(|number| (1..=64).contains(&number)));
    }
}
