//! What an option or a setting gets wrong is named by the error.

use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::{Given, mount, options, words};
use crate::error::ErrorKind;
use crate::spec::SpecOptions;

#[track_caller]
fn refused(config: Value, change: impl FnOnce(&mut SpecOptions), words: &[&str]) -> ErrorKind {
    let mut options = options();
    change(&mut options);
    let error = Given::new(config).spec(&options).unwrap_err();
    let text = error.chain();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert!(!text.contains('\n'));
    error.kind()
}

/// An option is wrong, and the image is not.
#[track_caller]
fn wrong_option(change: impl FnOnce(&mut SpecOptions), words: &[&str]) {
    let kind = refused(json!({ "Cmd": ["x"] }), change, words);
    assert_eq!(kind, ErrorKind::InvalidArgument);
}

#[track_caller]
fn wrong_image(config: Value, words: &[&str]) {
    assert_eq!(refused(config, |_| {}, words), ErrorKind::InvalidArgument);
}

#[test]
fn options_name_themselves() {
    wrong_option(
        |o| o.entrypoint = Some(vec![]),
        &["command", "none was given"],
    );
    wrong_option(|o| o.args = vec!["a\0b".into()], &["argument", "zero byte"]);
    wrong_option(
        |o| o.cwd = Some("tmp".into()),
        &["working directory \"tmp\""],
    );
    wrong_option(|o| o.cwd = Some("/a\0".into()), &["working directory"]);
    wrong_option(
        |o| o.env = words("A=1 NAME"),
        &["environment \"NAME\"", "NAME=VALUE"],
    );
    wrong_option(|o| o.env = words("=x"), &["environment \"=x\""]);
    wrong_option(
        |o| o.env = vec!["A=\0".into()],
        &["environment", "zero byte"],
    );
    wrong_option(|o| o.hostname = Some(String::new()), &["host name"]);
    wrong_option(|o| o.hostname = Some("h".repeat(65)), &["host name", "64"]);
    wrong_option(|o| o.hostname = Some("a\nb\0".into()), &["host name"]);
    wrong_option(
        |o| o.mounts = vec![mount("data")],
        &["mount at data", "absolute"],
    );
    wrong_option(
        |o| o.user = Some("4294967296".into()),
        &["user \"4294967296\""],
    );
    wrong_option(
        |o| o.root = std::ffi::OsStr::from_bytes(b"/\xff").into(),
        &["root"],
    );
}

#[test]
fn settings_of_images_name_themselves() {
    wrong_image(json!({}), &["command", "the image has none"]);
    wrong_image(json!({ "Cmd": ["x\0"] }), &["argument", "zero byte"]);
    let config = json!({ "Cmd": ["x"], "WorkingDir": "srv" });
    wrong_image(config, &["working directory \"srv\""]);
    let config = json!({ "Cmd": ["x"], "Env": ["B"] });
    wrong_image(config, &["the image's Env \"B\"", "NAME=VALUE"]);
}

#[test]
fn users_who_do_not_exist() {
    let ghost = |o: &mut SpecOptions| o.user = Some("ghost".into());
    let words = ["user \"ghost\"", "/etc/passwd"];
    let kind = refused(json!({ "Cmd": ["x"] }), ghost, &words);
    assert_eq!(kind, ErrorKind::NotFound);
    let config = json!({ "Cmd": ["x"], "User": "web:ghosts" });
    let kind = refused(config, |_| {}, &["\"ghosts\"", "/etc/group"]);
    assert_eq!(kind, ErrorKind::NotFound);
}
