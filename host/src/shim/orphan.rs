//! Whether containerd still knows of the shim. A containerd that was killed in the middle of a start comes back with half of
//! what it had written, removes the bundle that it can do nothing with, and never calls the shim again.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How long a shim lives on without its bundle: the end of a pod may be on its way, with calls about its containers.
const GRACE: Duration = Duration::from_secs(10);

/// The shim's bundle, watched.
pub(super) struct Bundle(OwnedFd);

impl Bundle {
    /// Watches the directory.
    ///
    /// # Errors
    /// It is gone, or there is no inotify.
    pub(super) fn watch(dir: &Path) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // containerd renames a bundle before it removes what is in it.
        inotify::add_watch(&fd, dir, WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF)?;
        Ok(Self(fd))
    }

    /// Returns some time after the bundle was removed; never if that cannot be seen.
    pub(super) async fn removal(self) {
        if let Err(error) = removed(self.0).await {
            tracing::warn!("watching the bundle: {error}");
            return std::future::pending().await;
        }
        tokio::time::sleep(GRACE).await;
    }
}

async fn removed(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned, and stays the same open file until it is dropped.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
    loop {
        let mut ready = fd.readable().await?;
        let mut room = [MaybeUninit::<u8>::uninit(); 512];
        match inotify::Reader::new(fd.get_ref(), &mut room).next() {
            Ok(event) if !event.events().contains(ReadFlags::QUEUE_OVERFLOW) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_bundle_that_removal_or_renamed_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        for rename in [false, true] {
            let path = dir.path().join("bundle");
            std::fs::create_dir(&path).unwrap();
            let bundle = Bundle::watch(&path).unwrap();
            let mut noticed = Box::pin(removed(bundle.0));
            std::fs::write(path.join("address"), "x").unwrap();
            let early = tokio::time::timeout(Duration::from_millis(50), &mut noticed).await;
            assert!(early.is_err(), "what is in it does not matter");
            match rename {
                true => std::fs::rename(&path, dir.path().join(".bundle")).unwrap(),
                false => std::fs::remove_dir_all(&path).unwrap(),
            }
            let limit = Duration::from_secs(5);
            tokio::time::timeout(limit, noticed).await.unwrap().unwrap();
        }
        assert!(Bundle::watch(&dir.path().join("bundle")).is_err());
    }
}
