use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::error::ErrorKind;
use crate::image::testing::{INDEX, Layout, TAR, TAR_GZIP, Tar, gzip, zstd};

/// Resolves, with the store's scratch directory in a place of its own.
fn resolved(reference: &str) -> Result<Resolved> {
    resolved_within(reference, &Limits::default())
}

fn resolved_within(reference: &str, limits: &Limits) -> Result<Resolved> {
    let scratch = tempfile::tempdir().unwrap();
    let (_, resolved) = resolve(&ImageRef::parse(reference).unwrap(), scratch.path(), limits)?;
    Ok(resolved)
}

fn cmd(resolved: &Resolved) -> String {
    resolved
        .config
        .config()
        .as_ref()
        .unwrap()
        .cmd()
        .as_ref()
        .unwrap()
        .join(" ")
}

#[track_caller]
fn refused(reference: &str, words: &[&str]) -> ErrorKind {
    let Err(error) = resolved(reference) else {
        panic!("{reference} was taken")
    };
    let text = error.chain();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert!(!text.contains('\n'));
    error.kind()
}

fn oci(layout: &Layout) -> String {
    format!("oci:{}", layout.path().display())
}

/// Adds an image without layers whose command is `cmd`.
fn add(layout: &mut Layout, cmd: &str, extra: Value) {
    layout.add_image(&[], json!({ "Cmd": [cmd] }), extra);
}

fn tag(name: &str) -> Value {
    json!({ "annotations": { "org.opencontainers.image.ref.name": name } })
}

#[test]
fn a_tag_chooses_the_image() {
    let mut layout = Layout::new();
    assert_eq!(refused(&oci(&layout), &["an image"]), ErrorKind::NotFound);
    add(&mut layout, "one", tag("v1"));
    assert_eq!(cmd(&resolved(&oci(&layout)).unwrap()), "one");
    add(&mut layout, "two", tag("v2"));
    assert_eq!(
        cmd(&resolved(&format!("{}:v2", oci(&layout))).unwrap()),
        "two"
    );
    // Several, and none is the latest.
    assert_eq!(
        refused(&oci(&layout), &["v1, v2", "no tag was given"]),
        ErrorKind::InvalidArgument
    );
    assert_eq!(
        refused(&format!("{}:v3", oci(&layout)), &["\"v3\"", "v1, v2"]),
        ErrorKind::NotFound
    );
    add(&mut layout, "three", tag("latest"));
    assert_eq!(cmd(&resolved(&oci(&layout)).unwrap()), "three");
    let full = json!({ "annotations": { "io.containerd.image.name": "docker.io/library/x:4" } });
    add(&mut layout, "four", full);
    assert_eq!(
        cmd(&resolved(&format!("{}:docker.io/library/x:4", oci(&layout))).unwrap()),
        "four"
    );
}

#[test]
fn the_platform_is_linux_amd64() {
    let platform = |os: &str, arch: &str, variant: Option<&str>| json!({ "platform": { "os": os, "architecture": arch, "variant": variant } });
    let mut layout = Layout::new();
    add(&mut layout, "arm", platform("linux", "arm64", Some("v8")));
    add(&mut layout, "new", platform("linux", "amd64", Some("v3")));
    let words = ["linux/amd64", "linux/arm64", "linux/amd64/v3"];
    assert_eq!(refused(&oci(&layout), &words), ErrorKind::NotFound);
    add(&mut layout, "right", platform("linux", "amd64", None));
    assert_eq!(cmd(&resolved(&oci(&layout)).unwrap()), "right");

    // Without a platform in the index, the configuration says it.
    let mut layout = Layout::new();
    let config = json!({ "architecture": "arm64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let config = layout.blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [] });
    let manifest = layout.blob(
        crate::image::testing::MANIFEST,
        manifest.to_string().as_bytes(),
    );
    layout.add_manifest(manifest, json!({}));
    assert_eq!(
        refused(&oci(&layout), &["linux/arm64, not linux/amd64"]),
        ErrorKind::Unimplemented
    );
}

#[test]
fn nested_indexes_are_followed_so_far() {
    let nested = |depth: usize| {
        let mut layout = Layout::new();
        let mut entry = layout.image_blobs(&[], json!({ "Cmd": ["deep"] }));
        for _ in 0..depth {
            let index = json!({ "schemaVersion": 2, "manifests": [entry] });
            entry = layout.blob(INDEX, index.to_string().as_bytes());
        }
        layout.add_manifest(entry, json!({}));
        layout
    };
    assert_eq!(cmd(&resolved(&oci(&nested(4))).unwrap()), "deep");
    assert_eq!(
        refused(&oci(&nested(5)), &["4 nested indexes"]),
        ErrorKind::ResourceExhausted
    );
}

#[test]
fn what_is_missing_or_broken_is_named() {
    let layout = Layout::of(&[b"layer".to_vec()]);
    let manifest = layout.manifest();
    let config = manifest["config"]["digest"].as_str().unwrap();
    let path = layout.blob_path(config);
    let right = std::fs::read(&path).unwrap();

    let mut wrong = right.clone();
    wrong[10] ^= 1;
    std::fs::write(&path, &wrong).unwrap();
    assert_eq!(
        refused(&oci(&layout), &["configuration", config, "corrupt"]),
        ErrorKind::InvalidArgument
    );
    std::fs::write(&path, &right[..10]).unwrap();
    assert_eq!(
        refused(&oci(&layout), &[config, "10 bytes"]),
        ErrorKind::InvalidArgument
    );
    std::fs::write(&path, [&right[..], b" "].concat()).unwrap();
    assert_eq!(
        refused(&oci(&layout), &[config, "corrupt"]),
        ErrorKind::InvalidArgument
    );
    std::fs::remove_file(&path).unwrap();
    let hex = config.strip_prefix("sha256:").unwrap();
    assert_eq!(
        refused(&oci(&layout), &[hex, "image directory"]),
        ErrorKind::NotFound
    );

    let file = layout.path().join("index.json");
    std::fs::write(&file, "{\"schemaVersion\":").unwrap();
    assert_eq!(
        refused(&oci(&layout), &["index.json in", "not valid"]),
        ErrorKind::InvalidArgument
    );
    // Read up to the cap and no further, whatever its size.
    std::fs::File::create(&file)
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    assert_eq!(
        refused(&oci(&layout), &["index.json", "4194304 bytes"]),
        ErrorKind::ResourceExhausted
    );
    std::fs::remove_file(&file).unwrap();
    assert_eq!(refused(&oci(&layout), &["index.json"]), ErrorKind::NotFound);
    std::fs::write(
        layout.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    assert_eq!(
        refused(&oci(&layout), &["oci-layout", "2.0.0"]),
        ErrorKind::Unimplemented
    );
    assert_eq!(
        refused("oci:/no/such/dir", &["/no/such/dir"]),
        ErrorKind::NotFound
    );
}

#[test]
fn a_manifest_that_does_not_fit_its_configuration_is_refused() {
    let image = |layers: Value, diff_ids: Value| {
        let mut layout = Layout::new();
        let config = json!({
            "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = layout.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let manifest = layout.blob(
            crate::image::testing::MANIFEST,
            manifest.to_string().as_bytes(),
        );
        layout.add_manifest(manifest, json!({}));
        layout
    };
    let digest = format!("sha256:{}", "0".repeat(64));
    let layer = |media_type: &str, digest: &str| json!({ "mediaType": media_type, "digest": digest, "size": 1 });
    let refused = |layers: Value, diff_ids: Value, words: &[&str]| {
        refused(&oci(&image(layers, diff_ids)), words)
    };
    let words = ["1 layers, but 2 diff ids"];
    refused(
        json!([layer(TAR, &digest)]),
        json!([digest, digest]),
        &words,
    );
    // A digest is a part of a path: nothing but one gets there.
    let words = ["rootfs.diff_ids", "../../etc"];
    refused(
        json!([layer(TAR, &digest)]),
        json!(["sha256:../../etc"]),
        &words,
    );
    let unknown = "application/vnd.in-toto+json";
    let kind = refused(
        json!([layer(unknown, &digest)]),
        json!([digest]),
        &[unknown],
    );
    assert_eq!(kind, ErrorKind::Unimplemented);
    let many = json!(vec![layer(TAR_GZIP, &digest); 129]);
    let kind = refused(many, json!(vec![&digest; 129]), &["128 layers"]);
    assert_eq!(kind, ErrorKind::ResourceExhausted);
    let sha512 = format!("sha512:{}", "0".repeat(128));
    let kind = refused(json!([layer(TAR, &sha512)]), json!([digest]), &["sha512"]);
    assert_eq!(kind, ErrorKind::Unimplemented);
}

/// A file with this content, in a directory that goes with it.
fn file(content: &[u8]) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.tar");
    std::fs::write(&path, content).unwrap();
    (dir, path)
}

#[test]
fn an_archive_of_a_layout_is_read_in_place_or_decompressed() {
    let layout = Layout::of(&[]);
    let plain = layout.archive();
    for bytes in [plain.clone(), gzip(&plain), zstd(&plain)] {
        let (_dir, path) = file(&bytes);
        assert_eq!(
            cmd(&resolved(&format!("oci-archive:{}", path.display())).unwrap()),
            "/bin/true"
        );
    }
    let (_dir, path) = file(&gzip(&plain));
    let limits = Limits {
        archive_bytes: 1000,
        ..Limits::default()
    };
    let reference = format!("oci-archive:{}", path.display());
    let error = resolved_within(&reference, &limits).err().unwrap();
    assert!(
        error.to_string().contains("1000 bytes uncompressed"),
        "{error}"
    );
    let limits = Limits {
        archive_entries: 2,
        ..Limits::default()
    };
    let error = resolved_within(&reference, &limits).err().unwrap();
    assert!(error.to_string().contains("2 entries"), "{error}");

    for (bytes, words) in [
        (&plain[..700], "image.tar"),
        (b"not an archive, surely", "image.tar"),
    ] {
        let (_dir, path) = file(bytes);
        refused(&format!("oci-archive:{}", path.display()), &[words]);
    }
    refused("oci-archive:/no/such/file.tar", &["/no/such/file.tar"]);
    refused("docker-archive:/proc", &["/proc", "not a regular file"]);
}

/// An archive of `manifest.json`, a configuration and one layer, with symbolic links beside.
fn saved(manifest: &Value, links: &[(&str, &str)]) -> (TempDir, PathBuf) {
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["saved"] },
        "rootfs": { "type": "layers", "diff_ids": [Sha256Digest::of(b"layer").to_string()] },
    });
    let mut tar = Tar::new()
        .file("manifest.json", manifest.to_string().as_bytes())
        .file("config.json", config.to_string().as_bytes())
        .file("one/layer.tar", b"layer");
    for (name, target) in links {
        tar = tar.symlink(name, target);
    }
    file(&tar.finish())
}

/// An image of `manifest.json`.
fn saved_image(tag: &str, layer: &str) -> Value {
    json!({ "Config": "config.json", "RepoTags": [tag], "Layers": [layer] })
}

/// The content of the only layer.
fn saved_layer(manifest: &Value, links: &[(&str, &str)], tag: &str) -> Result<Vec<u8>> {
    let (_dir, path) = saved(manifest, links);
    let reference = ImageRef::parse(&format!("docker-archive:{}{tag}", path.display())).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let (files, resolved) = resolve(&reference, scratch.path(), &Limits::default())?;
    assert_eq!(cmd(&resolved), "saved");
    let mut layer = Vec::new();
    let (mut reader, _) = files.open(&resolved.layers[0].name)?;
    reader.read_to_end(&mut layer).unwrap();
    Ok(layer)
}

#[test]
fn what_docker_saves() {
    let one = json!([saved_image("x:1", "one/layer.tar")]);
    for tag in ["", ":1", ":x:1"] {
        assert_eq!(saved_layer(&one, &[], tag).unwrap(), b"layer");
    }
    let text = saved_layer(&one, &[], ":2").unwrap_err().to_string();
    assert!(text.contains("\"2\"") && text.contains("x:1"), "{text}");
    let two = json!([
        saved_image("x:1", "one/layer.tar"),
        saved_image("x:2", "one/layer.tar")
    ]);
    let error = saved_layer(&two, &[], "").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(saved_layer(&two, &[], ":2").unwrap(), b"layer");
}

/// A layer that repeats is saved as a link, which is followed within the archive alone.
#[test]
fn links_of_archives_do_not_lead_out() {
    let linked = json!([saved_image("x:1", "two/layer.tar")]);
    let inside = [("two/layer.tar", "../one/layer.tar")];
    assert_eq!(saved_layer(&linked, &inside, "").unwrap(), b"layer");
    let around = [("two/layer.tar", "../three"), ("three", "two/layer.tar")];
    let error = saved_layer(&linked, &around, "").unwrap_err();
    assert!(error.to_string().contains("leads nowhere"), "{error}");
    for target in ["../../../../../etc/passwd", "/etc/passwd"] {
        let error = saved_layer(&linked, &[("two/layer.tar", target)], "").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    let name = "../../../../etc/passwd";
    let error = saved_layer(&json!([saved_image("x:1", name)]), &[], "").unwrap_err();
    assert!(error.to_string().contains(name), "{error}");
}

#[test]
fn registries_are_not_there_yet() {
    assert_eq!(
        refused("busybox", &["docker.io/library/busybox:latest"]),
        ErrorKind::Unimplemented
    );
}
