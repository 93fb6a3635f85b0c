use serde_json::json;

use super::*;
use crate::error::ErrorKind;

fn whole() -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": {
            "args": ["/bin/true"], "cwd": "/", "env": ["A=b"], "user": { "uid": 0, "gid": 0 },
        },
    })
}

/// A bundle's directory with this configuration.
fn bundle(config: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("rootfs")).unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    dir
}

#[test]
fn a_bundle_is_its_configuration_and_root() {
    let dir = bundle(&whole().to_string());
    let bundle = load(dir.path()).unwrap();
    assert_eq!(bundle.rootfs, dir.path().join("rootfs"));
    assert_eq!(
        bundle.spec.root().as_ref().unwrap().path(),
        Path::new("rootfs")
    );
    // An absolute root is where it says.
    let elsewhere = tempfile::tempdir().unwrap();
    let mut config = whole();
    config["root"]["path"] = json!(elsewhere.path());
    let dir = self::bundle(&config.to_string());
    assert_eq!(load(dir.path()).unwrap().rootfs, elsewhere.path());
}

/// A field, a wrong value, and what is said about it.
fn wrong_fields() -> Vec<(&'static str, Value, &'static str)> {
    vec![
        ("/ociVersion", Value::Null, "ociVersion: not a string"),
        (
            "/ociVersion",
            json!("2.0.0"),
            "ociVersion: version \"2.0.0\"",
        ),
        ("/root", json!([]), "root: not an object"),
        ("/root/path", json!(""), "root.path: empty"),
        ("/root/path", json!("a\0b"), "root.path: has a zero byte"),
        ("/process", json!("x"), "process: not an object"),
        ("/process/args", json!([]), "process.args: empty"),
        (
            "/process/args",
            json!("sh"),
            "process.args: missing, or not a list",
        ),
        (
            "/process/args",
            json!(["sh", 1]),
            "process.args[1]: not a string",
        ),
        (
            "/process/args",
            json!(["\0"]),
            "process.args[0]: has a zero byte",
        ),
        ("/process/env", json!({}), "process.env: not a list"),
        (
            "/process/env",
            json!(["A=\0"]),
            "process.env[0]: has a zero byte",
        ),
        ("/process/cwd", json!(7), "process.cwd: not a string"),
        (
            "/process/cwd",
            json!("tmp"),
            "process.cwd: \"tmp\" is not an absolute path",
        ),
        ("/process/user", json!(0), "process.user: not an object"),
    ]
}

/// Each field that is wrong is named.
#[test]
fn errors_name_the_field() {
    for (pointer, wrong, words) in wrong_fields() {
        let mut config = whole();
        *config.pointer_mut(pointer).unwrap() = wrong;
        let error = parse(config.to_string().as_bytes(), "the/config.json").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(
            error
                .to_string()
                .starts_with(&format!("the/config.json: {words}")),
            "{error}"
        );
    }
    for field in [
        "ociVersion",
        "root",
        "process",
        "process.cwd",
        "process.user",
        "root.path",
    ] {
        let mut config = whole();
        let (parent, key) = field.rsplit_once('.').unwrap_or(("", field));
        let parent = if parent.is_empty() {
            &mut config
        } else {
            &mut config[parent]
        };
        parent.as_object_mut().unwrap().remove(key);
        let error = parse(config.to_string().as_bytes(), "x").unwrap_err();
        assert_eq!(error.to_string(), format!("x: {field}: missing"));
    }
}

#[test]
fn what_is_no_bundle_says_which_file_is_wrong() {
    let refused = |dir: &Path, words: &str| {
        let error = load(dir).unwrap_err();
        assert!(error.chain().contains(words), "{error}");
        error.kind()
    };
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(refused(empty.path(), "config.json"), ErrorKind::NotFound);
    let broken = bundle("{");
    assert_eq!(
        refused(broken.path(), "config.json: it is not valid JSON"),
        ErrorKind::InvalidArgument
    );
    let rootless = bundle(&whole().to_string());
    std::fs::remove_dir(rootless.path().join("rootfs")).unwrap();
    assert_eq!(
        refused(rootless.path(), "rootfs (root.path)"),
        ErrorKind::NotFound
    );
    std::fs::write(rootless.path().join("rootfs"), "a file").unwrap();
    assert_eq!(
        refused(rootless.path(), "is not a directory"),
        ErrorKind::InvalidArgument
    );
    let config = std::fs::File::create(empty.path().join("config.json")).unwrap();
    config.set_len(1 << 40).unwrap();
    assert_eq!(
        refused(empty.path(), "8388608 bytes"),
        ErrorKind::ResourceExhausted
    );
}
