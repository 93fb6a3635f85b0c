//! What is parsed from memory: references, bundles' config.json, users, signals, variables, sizes.

#![no_main]

use cella_host::image::{ImageRef, Sha256Digest, bundle};
use cella_host::spec::{parse_signal, resolve_user_in, set_env};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    if choice % 4 == 0 {
        if let Err(error) = bundle::parse(rest, "config.json") {
            assert!(error.chain().starts_with("config.json: "));
        }
        return;
    }
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    match choice % 4 {
        1 => match ImageRef::parse(text) {
            // What is printed means the same again.
            Ok(reference) => {
                assert_eq!(ImageRef::parse(&reference.to_string()).unwrap(), reference)
            }
            Err(error) => assert!(!error.chain().contains('\n')),
        },
        2 => {
            let mut parts = text.splitn(3, '\u{1}');
            let mut part = || parts.next().unwrap_or_default();
            if let Ok(user) = resolve_user_in(part(), part(), part()) {
                assert_eq!(user.groups.first(), Some(&user.gid));
                assert!(user.uid <= i32::MAX as u32);
            }
        }
        _ => {
            assert!(parse_signal(text).is_none_or(|number| (1..=64).contains(&number)));
            let given: Vec<String> = text.lines().map(str::to_owned).collect();
            let mut env = Vec::new();
            if set_env(&mut env, &given, "environment").is_ok() {
                assert!(env.len() <= given.len());
            }
            if let Ok(digest) = Sha256Digest::parse(text, "digest") {
                assert_eq!(digest.to_string(), text);
            }
        }
    }
});
