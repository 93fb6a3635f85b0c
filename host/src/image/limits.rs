//! Caps on what an image may ask of the host.

/// Caps on sizes and counts. The defaults are far above what images in use have, and far below what
/// would hurt a host; tests set smaller ones.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of a manifest or an index (registries refuse larger ones, too).
    pub manifest_bytes: u64,
    /// Bytes of an image configuration.
    pub config_bytes: u64,
    /// Entries of one index.
    pub index_entries: usize,
    /// How deep indexes may be nested.
    pub index_depth: usize,
    /// Layers of an image. Overlayfs itself allows 500.
    pub layers: usize,
    /// Entries of one layer.
    pub layer_entries: u64,
    /// Bytes of one layer's tar stream, uncompressed.
    pub layer_bytes: u64,
    /// Bytes of a path in a layer, and of a link's target (the kernel's PATH_MAX).
    pub path_bytes: usize,
    /// Bytes of one extended (pax or GNU) header, which is held in memory.
    pub extension_bytes: u64,
    /// Entries of an image archive (not of a layer).
    pub archive_entries: usize,
    /// Bytes of an image archive that is itself compressed, uncompressed.
    pub archive_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            manifest_bytes: 4 << 20,
            config_bytes: 8 << 20,
            index_entries: 1024,
            index_depth: 4,
            layers: 128,
            layer_entries: 2_000_000,
            layer_bytes: 128 << 30,
            path_bytes: 4096,
            extension_bytes: 1 << 20,
            archive_entries: 10_000,
            archive_bytes: 256 << 30,
        }
    }
}
