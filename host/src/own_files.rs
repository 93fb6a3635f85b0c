//! Files and directories of this user's alone: nobody else may have written what a guest's memory is mapped from.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Makes a directory of mode 0700; with `recursive`, those above it as well, and it may be there.
///
/// # Errors
/// Those of mkdir(2).
pub fn make_dir(path: &Path, recursive: bool) -> io::Result<()> {
    DirBuilder::new()
        .recursive(recursive)
        .mode(0o700)
        .create(path)
}

/// Makes a file of mode 0600, which is not there.
///
/// # Errors
/// Those of open(2).
pub fn make(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Opens a file for reading that nobody but this user can have written.
///
/// # Errors
/// Those of open(2) and of [`check`].
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let meta = file.metadata()?;
    check(&meta, meta.is_file())?;
    Ok(file)
}

/// Checks that a file or directory is of the right type, this user's, and that nobody else may write to it.
///
/// # Errors
/// `PermissionDenied`, with the reason.
pub fn check(meta: &Metadata, right_type: bool) -> io::Result<()> {
    let user = rustix::process::geteuid().as_raw();
    let why = if !right_type {
        "it is of another type".to_owned()
    } else if meta.uid() != user {
        format!("user {} owns it, not {user}", meta.uid())
    } else if meta.mode() & 0o022 != 0 {
        format!("others may write to it (mode {:o})", meta.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// Removes a directory with everything in it, if it is there.
///
/// # Errors
/// Something could not be removed.
pub fn remove_dir(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Has the names in a directory reach the disk.
///
/// # Errors
/// Those of fsync(2).
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}
