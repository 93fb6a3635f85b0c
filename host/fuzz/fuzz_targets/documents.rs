//! The documents of an image, one of them hostile and the others right, from a layout and from archives.

#![no_main]

use std::path::Path;

use cella_host::image::{ImageRef, Limits, Sha256Digest, Store};
use cella_host::spec::{SpecOptions, for_image, make_directories, stop_signal};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};

const TYPE: &str = "application/vnd.oci.image";

fn limits() -> Limits {
    Limits {
        layers: 4,
        index_entries: 8,
        layer_bytes: 1 << 20,
        archive_bytes: 1 << 20,
        archive_entries: 64,
        ..Limits::default()
    }
}

fn blob(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = Sha256Digest::of(bytes);
    std::fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    json!({ "mediaType": format!("{TYPE}.{media_type}"), "digest": digest.to_string(), "size": bytes.len() })
}

// A layout whose document of this number is `hostile`.
fn layout(dir: &Path, number: u8, hostile: &[u8]) {
    std::fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    let document = |is: u8, right: Value| match number == is {
        true => hostile.to_vec(),
        false => right.to_string().into_bytes(),
    };
    let none: [&str; 0] = [];
    let config = document(
        1,
        json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["x"] },
            "rootfs": { "type": "layers", "diff_ids": none },
        }),
    );
    let config = blob(dir, "config.v1+json", &config);
    let manifest = document(
        2,
        json!({ "schemaVersion": 2, "config": config, "layers": none }),
    );
    let manifest = blob(dir, "manifest.v1+json", &manifest);
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    let nested = document(3, index.clone());
    let outer = blob(dir, "index.v1+json", &nested);
    let index = document(4, json!({ "schemaVersion": 2, "manifests": [outer] }));
    std::fs::write(dir.join("index.json"), index).unwrap();
    let marker = document(5, json!({ "imageLayoutVersion": "1.0.0" }));
    std::fs::write(dir.join("oci-layout"), marker).unwrap();
}

// An archive as docker saves it, with a hostile manifest or configuration.
fn docker_archive(file: &Path, hostile: &[u8], hostile_manifest: bool) {
    let right = br#"[{"Config":"config.json","RepoTags":["x:y"],"Layers":[]}]"#;
    let config =
        br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
    let (manifest, config) = match hostile_manifest {
        true => (hostile, &config[..]),
        false => (&right[..], hostile),
    };
    let mut archive = tar::Builder::new(std::fs::File::create(file).unwrap());
    for (name, bytes) in [("manifest.json", manifest), ("config.json", config)] {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes).unwrap();
    }
    archive.finish().unwrap();
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, hostile)) = data.split_first() else {
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let at = place.path().join("image");
    let scheme = match choice % 9 {
        number @ 0..=5 => {
            layout(&at, number, hostile);
            "oci"
        }
        number @ (6 | 7) => {
            docker_archive(&at, hostile, number == 6);
            "docker-archive"
        }
        _ => {
            std::fs::write(&at, hostile).unwrap();
            "oci-archive"
        }
    };
    let tag = if choice >= 128 { ":latest" } else { "" };
    let reference = ImageRef::parse(&format!("{scheme}:{}{tag}", at.display())).unwrap();
    let store = Store::with_limits(place.path().join("store"), limits()).unwrap();
    let rootfs = place.path().join("rootfs");
    std::fs::create_dir(&rootfs).unwrap();
    let options = SpecOptions {
        root: "/rootfs".into(),
        ..SpecOptions::default()
    };
    let used = store.prepare(&reference).and_then(|image| {
        let spec = for_image(&image, &options, &rootfs)?;
        stop_signal(&spec)?;
        make_directories(&image, &spec, &rootfs)
    });
    if let Err(error) = used {
        assert!(!error.chain().contains('\n'));
    }
    let mut names: Vec<_> = std::fs::read_dir(place.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(
        names,
        ["image", "rootfs", "store"],
        "something was made outside"
    );
    assert_eq!(
        std::fs::read_dir(place.path().join("store/tmp"))
            .unwrap()
            .count(),
        0
    );
});
