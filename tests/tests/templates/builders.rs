//! Builders of templates that meet, die, or have no room.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use cella_tests::finish;

use super::here::{Here, MEMORY_FLAG};

const BUILD: [&str; 4] = ["template", "build", "--memory", MEMORY_FLAG];
/// A build takes less than this.
const PATIENCE: Duration = Duration::from_secs(120);

fn builder(here: &Here) -> Child {
    here.host.command(&BUILD).spawn().unwrap()
}

pub fn two_builders_make_one_template(here: &Here) {
    let children = [builder(here), builder(here)];
    let mut said: Vec<_> = children
        .map(|child| finish(child, b"").expect_status(0).stdout)
        .into();
    said.sort();
    assert!(
        said.iter().any(|line| line.contains("built in")),
        "{said:?}"
    );
    let other = ["being built by another process", "there already"];
    assert!(
        said.iter()
            .any(|line| other.iter().any(|word| line.contains(word))),
        "{said:?}"
    );
    assert_eq!(here.templates(), [here.key().as_str()]);
    let listed = here.host.cella(&["template", "list", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(listed[0]["key"], here.key().as_str());
    // Only what the guest has used is on disk.
    let bytes = listed[0]["bytes"].as_u64().unwrap();
    assert!((4 << 20..40 << 20).contains(&bytes), "{bytes}");
}

#[test]
fn a_builder_that_dies_while_it_writes_leaves_no_template() {
    let Some(here) = Here::new() else { return };
    let mut child = builder(&here);
    let draft = here
        .paths
        .lib_dir
        .join(format!("templates/{}.draft/memory", here.key().as_str()));
    let deadline = Instant::now() + PATIENCE;
    // Something is written, and not all of it.
    while !has_blocks(&draft) {
        assert!(Instant::now() < deadline, "nothing is written");
        std::hint::spin_loop();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!here.template_dir().exists(), "it was not in time");
    let said = here.host.cella(&["gc"]).expect_status(0).stdout;
    assert!(said.contains("half a template"), "{said}");
    assert!(said.contains("sandbox template-"), "{said}");
    assert!(here.templates().is_empty());
    here.host.assert_clean();
}

fn has_blocks(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.blocks() > 0)
}

/// A small file system, unmounted with its owner.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(path: &'a Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("small", path, "tmpfs", flags, c"size=4m").unwrap();
        Self(path)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_template_without_room_is_an_error_and_leaves_nothing() {
    let Some(here) = Here::new() else { return };
    let small = Small::mount(&here.paths.lib_dir);
    here.host
        .cella(&BUILD)
        .expect_failure(&["building a template", "No space left"]);
    assert!(here.templates().is_empty());
    drop(small);
    here.host.assert_clean();
}
