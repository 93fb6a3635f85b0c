//! The records of the containers that the command line made: they outlive their sandboxes, so that `cella ps`, `logs` and
//! `rm` find a container that has ended. One directory each under `<lib>/containers`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::error::ErrorKind;
use crate::paths::{Paths, check_id, is_valid_id};
use crate::sandbox::Error;
use crate::sandbox::dir::remove_files;
use crate::sandbox::state::{self, ContainerState};

/// One container's record.
#[derive(Clone, Debug)]
pub struct Record {
    id: String,
    path: PathBuf,
}

impl Record {
    /// Takes the id for a new container.
    ///
    /// # Errors
    /// `AlreadyExists`: a container has it. `InvalidArgument`: it is no id.
    pub fn create(paths: &Paths, id: &str) -> Result<Self, Error> {
        let record = Self::new(paths, id)?;
        let parent = paths.lib_dir.join("containers");
        fs::create_dir_all(&parent)
            .map_err(|e| Error::host(format!("making {}", parent.display()), e))?;
        match fs::create_dir(&record.path) {
            Ok(()) => Ok(record),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::state(
                ErrorKind::AlreadyExists,
                format!("container {id} exists already"),
            )),
            Err(e) => Err(Error::host(format!("making {}", record.path.display()), e)),
        }
    }

    /// The record of an existing container.
    ///
    /// # Errors
    /// `NotFound`: there is none.
    pub fn open(paths: &Paths, id: &str) -> Result<Self, Error> {
        let record = Self::new(paths, id)?;
        if record.path.join("container.json").exists() {
            Ok(record)
        } else {
            Err(Error::state(
                ErrorKind::NotFound,
                format!("there is no container {id}"),
            ))
        }
    }

    fn new(paths: &Paths, id: &str) -> Result<Self, Error> {
        check_id(id)?;
        Ok(Self {
            id: id.to_owned(),
            path: paths.lib_dir.join("containers").join(id),
        })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its output goes, if it is detached.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Its state.
    ///
    /// # Errors
    /// The file is not there or is no state.
    pub fn read(&self) -> Result<ContainerState, Error> {
        state::read(&self.path.join("container.json"))
    }

    /// Writes its state, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, state: &ContainerState) -> Result<(), Error> {
        state::write(&self.path.join("container.json"), state)
    }

    /// The OCI spec that it runs with.
    ///
    /// # Errors
    /// The file is not there or is no spec.
    pub fn read_spec(&self) -> Result<Spec, Error> {
        state::read(&self.path.join("config.json"))
    }

    /// Keeps the OCI spec that it runs with.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_spec(&self, spec: &Spec) -> Result<(), Error> {
        state::write(&self.path.join("config.json"), spec)
    }

    /// Made a moment ago, and its process has not come to write its state.
    pub fn is_unfinished(&self) -> bool {
        let age = fs::metadata(&self.path)
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|made| made.elapsed().ok());
        age.is_some_and(|age| age.as_secs() < 60)
    }

    /// Forgets the container.
    ///
    /// # Errors
    /// Something could not be removed.
    pub fn remove(self) -> Result<(), Error> {
        remove_files(&self.path)
    }
}

/// Every container's record, by id.
///
/// # Errors
/// The directory exists but cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<Record>, Error> {
    let parent: &Path = &paths.lib_dir.join("containers");
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::host(format!("listing {}", parent.display()), e)),
    };
    let mut ids: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|id| is_valid_id(id))
        .collect();
    ids.sort();
    ids.iter().map(|id| Record::new(paths, id)).collect()
}

/// An id for a container that was given none: 12 hexadecimal digits.
///
/// # Errors
/// The kernel gives no random bytes.
pub fn new_id() -> Result<String, Error> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::host("drawing an id", e))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
