//! Templates that are not what was written, hosts that die in the middle.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, chown};
use std::time::Duration;

use cella_host::hypervisor::SavedVm;
use cella_host::sandbox::dir::SandboxDir;

use super::builders::two_builders_make_one_template;
use super::here::{Here, MEMORY_FLAG, block_on};

/// How long after its beginning a `cella run` is killed, milliseconds.
const KILLED_AFTER: [u64; 8] = [5, 20, 35, 50, 70, 100, 150, 250];

#[test]
fn what_is_no_template_is_said_and_booted_around() {
    block_on(async {
        let Some(here) = Here::new() else { return };
        two_builders_make_one_template(&here);
        every_damage_has_its_word(&here).await;
        another_owner_is_not_trusted(&here);
        a_start_that_is_killed_leaves_nothing(&here);
        a_damaged_template_gives_way(&here);
        let said = here.host.cella(&["template", "rm", "--all"]);
        said.expect_status(0);
        assert!(here.templates().is_empty());
        here.host.assert_clean();
    });
}

/// What is wrong with a file, and how the refusal says it.
async fn every_damage_has_its_word(here: &Here) {
    type Damage = fn(&File, &File);
    let cases: [(&str, Damage); 6] = [
        ("no state file", |state, _| state.set_len(0).unwrap()),
        ("truncated", |state, _| state.set_len(500).unwrap()),
        ("altered", |state, _| flip(state, 300)),
        ("format", |state, _| flip(state, 8)),
        ("its memory file has", |_, memory| {
            memory.set_len(1 << 20).unwrap();
        }),
        ("another content", |_, memory| {
            let len = memory.metadata().unwrap().len();
            memory.set_len(0).unwrap();
            memory.set_len(len).unwrap();
        }),
    ];
    let whole = here.template_dir();
    for (word, damage) in cases {
        let copy = |name| {
            let (from, to) = (whole.join(name), here.host.path(name));
            fs::copy(from, &to).unwrap();
            let file = File::options().read(true).write(true).open(&to).unwrap();
            fs::remove_file(to).unwrap();
            file
        };
        let (state, memory) = (copy("state"), copy("memory"));
        damage(&state, &memory);
        let dir = SandboxDir::new(&here.paths, "damaged").unwrap();
        let locks = dir.create().unwrap();
        let refused = here.restore(&dir, &SavedVm { state, memory }).await;
        let message = refused.map(drop).unwrap_err();
        assert!(message.contains(word), "{word}: {message}");
        drop(locks);
        dir.remove().unwrap();
    }
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

fn another_owner_is_not_trusted(here: &Here) {
    let state = here.template_dir().join("state");
    chown(&state, Some(1), None).unwrap();
    let error = here.store().open(&here.key()).unwrap_err().to_string();
    assert!(error.contains("user 1 owns it"), "{error}");
    chown(&state, Some(0), None).unwrap();
    assert!(here.store().open(&here.key()).unwrap().is_some());
}

fn a_start_that_is_killed_leaves_nothing(here: &Here) {
    let image = here.host.busybox();
    // Unpacked, so that the first is killed in its start as well.
    let args = ["run", "--memory", MEMORY_FLAG, &image, "true"];
    here.host.cella(&args).expect_status(0);
    for after in KILLED_AFTER {
        let mut child = here.host.command(&args).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(after));
        child.kill().unwrap();
        child.wait().unwrap();
        here.host.cella(&["gc"]).expect_status(0);
        here.host.assert_clean();
    }
    assert_eq!(here.templates(), [here.key().as_str()], "it is as it was");
}

/// One that cannot be used is said to be, removed, booted around, and built again.
fn a_damaged_template_gives_way(here: &Here) {
    flip(
        &File::options()
            .read(true)
            .write(true)
            .open(here.template_dir().join("state"))
            .unwrap(),
        300,
    );
    let image = here.host.busybox();
    let args = ["run", "--memory", MEMORY_FLAG, &image, "echo", "it runs"];
    let said = here.host.cella(&args).expect_status(0);
    assert_eq!(said.stdout, "it runs\n");
    for word in ["altered", "booting instead"] {
        assert!(said.stderr.contains(word), "{said:?}");
    }
    // In the background, by a process that gives way to others.
    let deadline = std::time::Instant::now() + Duration::from_secs(90);
    while here.store().open(&here.key()).unwrap().is_none() {
        assert!(
            std::time::Instant::now() < deadline,
            "it is not built again"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let said = here.host.cella(&args).expect_status(0);
    assert_eq!(
        (said.stdout.as_str(), said.stderr.as_str()),
        ("it runs\n", "")
    );
}
