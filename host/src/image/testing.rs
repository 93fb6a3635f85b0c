//! Images made by the tests themselves.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::digest::Sha256Digest;

/// A tar stream in the making.
#[derive(Default)]
pub(crate) struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    /// One entry with any header and content, names taken as they are.
    pub fn raw(mut self, name: &str, kind: u8, link: &str, mode: u32, data: &[u8]) -> Self {
        self.bytes
            .extend(block(name, kind, link, mode, data.len() as u64));
        self.data(data)
    }

    pub fn data(mut self, data: &[u8]) -> Self {
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub fn header(mut self, change: impl FnOnce(&mut tar::Header)) -> Self {
        let mut header = tar::Header::from_byte_slice(&block("x", b'0', "", 0o644, 0)).clone();
        change(&mut header);
        header.set_cksum();
        self.bytes.extend(header.as_bytes());
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.raw(name, b'0', "", 0o644, data)
    }

    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.raw(name, b'5', "", mode, b"")
    }

    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(name, b'2', target, 0o777, b"")
    }

    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(name, b'1', target, 0o644, b"")
    }

    pub fn device(self, name: &str, kind: u8, major: u32, minor: u32) -> Self {
        self.header(|header| {
            set_name(header, name);
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
            header.set_mode(0o620);
        })
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            content.extend(format!("{length} {key}=").bytes());
            content.extend(*value);
            content.push(b'\n');
        }
        self.raw("pax", b'x', "", 0o644, &content)
    }

    /// The stream with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.extend([0; 1024]);
        self.bytes
    }

    /// The stream without one.
    pub fn cut(self) -> Vec<u8> {
        self.bytes
    }
}

fn set_name(header: &mut tar::Header, name: &str) {
    let old = header.as_old_mut();
    old.name = [0; 100];
    old.name[..name.len()].copy_from_slice(name.as_bytes());
}

fn block(name: &str, kind: u8, link: &str, mode: u32, size: u64) -> [u8; 512] {
    let mut header = tar::Header::new_ustar();
    set_name(&mut header, name);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header.set_cksum();
    *header.as_bytes()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

pub(crate) const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// An OCI layout in the making, in a directory that goes with it.
pub(crate) struct Layout {
    pub dir: TempDir,
    manifests: Vec<Value>,
}

impl Layout {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        std::fs::write(
            dir.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        let layout = Self {
            dir,
            manifests: Vec::new(),
        };
        layout.write_index();
        layout
    }

    /// A layout with one image of these uncompressed layers.
    pub fn of(layers: &[Vec<u8>]) -> Self {
        let mut layout = Self::new();
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| (TAR, layer.clone(), layer.clone()))
            .collect();
        layout.add_image(&layers, json!({ "Cmd": ["/bin/true"] }), json!({}));
        layout
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn blob_path(&self, digest: &str) -> PathBuf {
        self.path()
            .join(digest.replace(':', "/").replace("sha256/", "blobs/sha256/"))
    }

    /// Adds a blob; its descriptor.
    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Sha256Digest::of(bytes).to_string();
        std::fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    /// Adds an image's blobs: layers of media type, blob, and uncompressed content. The descriptor of
    /// its manifest.
    pub fn image_blobs(&self, layers: &[(&str, Vec<u8>, Vec<u8>)], config: Value) -> Value {
        let diff_ids: Vec<String> = layers
            .iter()
            .map(|(_, _, plain)| Sha256Digest::of(plain).to_string())
            .collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(CONFIG, config.to_string().as_bytes());
        let layers: Vec<Value> = layers
            .iter()
            .map(|(media_type, blob, _)| self.blob(media_type, blob))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers,
        });
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    /// Adds an image to the index, its descriptor changed by what `extra` has.
    pub fn add_image(&mut self, layers: &[(&str, Vec<u8>, Vec<u8>)], config: Value, extra: Value) {
        let descriptor = self.image_blobs(layers, config);
        self.add_manifest(descriptor, extra);
    }

    pub fn add_manifest(&mut self, mut descriptor: Value, extra: Value) {
        for (key, value) in extra.as_object().unwrap() {
            descriptor[key] = value.clone();
        }
        self.manifests.push(descriptor);
        self.write_index();
    }

    fn write_index(&self) {
        let index = json!({ "schemaVersion": 2, "manifests": self.manifests });
        std::fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    pub fn manifest(&self) -> Value {
        self.read(self.manifests[0]["digest"].as_str().unwrap())
    }

    pub fn read(&self, digest: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.blob_path(digest)).unwrap()).unwrap()
    }

    /// The files of the layout as a tar archive.
    pub fn archive(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_dir_all(".", self.path()).unwrap();
        builder.into_inner().unwrap()
    }
}

/// Whether this process may make devices, set owners and mount; says so if not.
pub(crate) fn is_root() -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED: the right to make devices and mounts (root)");
    false
}
