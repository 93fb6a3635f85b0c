mod errors;
mod policy;

use std::os::unix::fs::symlink;

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
    assert_eq!(stop_signal(&web().spec(&options()).unwrap()).unwrap(), 3);
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
    assert_eq!(stop_signal(&given.spec(&options).unwrap()).unwrap(), 15);
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
    let of = |name: &str| {
        let given = Given::new(json!({ "Cmd": ["x"], "StopSignal": name }));
        stop_signal(&given.spec(&options()).unwrap())
    };
    let error = of("SIGFOO").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(
        error.to_string().contains("StopSignal: \"SIGFOO\""),
        "{error}"
    );
    assert_eq!(of("").unwrap(), 15);
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
