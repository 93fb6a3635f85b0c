//! Whether containerd still knows of the shim. A containerd that was killed in the middle of a start comes back with half of
//! what it had written, removes the bundle that it can do nothing with, and never calls the shim again.
//!
//! The bundle is looked at now and then. It is not watched: the kernel takes tens of milliseconds to close an inotify
//! descriptor, and a killed shim would be listening that much longer than containerd thinks.

use std::io;
use std::path::Path;
use std::time::Duration;

/// How often the bundle is looked at.
const PERIOD: Duration = Duration::from_secs(5);
/// How long a shim lives on without its bundle: the end of a pod may be on its way, with calls about its containers.
const GRACE: Duration = Duration::from_secs(10);

/// Returns some time after `bundle` was removed.
pub(super) async fn removal(bundle: &Path) {
    while is_there(bundle) {
        tokio::time::sleep(PERIOD).await;
    }
    tokio::time::sleep(GRACE).await;
}

/// What cannot be looked at counts as there.
fn is_there(bundle: &Path) -> bool {
    match std::fs::symlink_metadata(bundle) {
        Ok(_) => true,
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bundle_that_is_gone_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        std::fs::create_dir(&path).unwrap();
        assert!(is_there(&path));
        std::fs::rename(&path, dir.path().join(".bundle")).unwrap();
        assert!(!is_there(&path));
        let nowhere = Path::new("/").join("x".repeat(300));
        assert!(is_there(&nowhere), "a name that is too long says nothing");
    }
}
