//! A process's arguments and environment as execve(2) takes them, and where its command may be.

use std::ffi::CString;

use super::{Error, Result};

/// Where commands are looked for when the environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// C strings with the null-terminated array of pointers that execve(2) wants.
#[derive(Debug)]
pub(super) struct StringArray {
    /// What the pointers point to.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

// SAFETY: the pointers are to memory that the array owns and nobody changes.
unsafe impl Send for StringArray {}
// SAFETY: as above.
unsafe impl Sync for StringArray {}

impl StringArray {
    /// Of strings from `field` of the spec.
    pub(super) fn new(field: &str, values: &[String]) -> Result<Self> {
        let strings = values
            .iter()
            .map(|value| c_string(field, value.as_bytes()))
            .collect::<Result<Vec<_>>>()?;
        let pointers = strings
            .iter()
            .map(|s| s.as_ptr())
            .chain([std::ptr::null()])
            .collect();
        Ok(Self {
            _strings: strings,
            pointers,
        })
    }

    /// For execve(2).
    pub(super) fn pointers(&self) -> &[*const libc::c_char] {
        &self.pointers
    }
}

/// A string of the spec for the kernel: without NUL.
pub(super) fn c_string(field: &str, value: &[u8]) -> Result<CString> {
    CString::new(value).map_err(|_| Error::invalid(field, "contains a NUL byte"))
}

/// The environment with each name once: the last value counts.
pub(super) fn environment(env: &[String]) -> Result<Vec<String>> {
    let mut result: Vec<String> = Vec::with_capacity(env.len());
    let mut positions = std::collections::HashMap::with_capacity(env.len());
    for entry in env {
        let Some((name, _)) = entry.split_once('=') else {
            return Err(Error::invalid(
                "process.env",
                format!("{entry:?} has no '='"),
            ));
        };
        if name.is_empty() {
            return Err(Error::invalid(
                "process.env",
                format!("{entry:?} has no name"),
            ));
        }
        match positions.entry(name) {
            std::collections::hash_map::Entry::Vacant(slot) => {
                slot.insert(result.len());
                result.push(entry.clone());
            }
            std::collections::hash_map::Entry::Occupied(slot) => {
                if let Some(value) = result.get_mut(*slot.get()) {
                    value.clone_from(entry);
                }
            }
        }
    }
    Ok(result)
}

/// Where `command` may be: itself if it has a slash, else in each directory of PATH.
pub(super) fn candidates(command: &str, env: &[String]) -> Result<Vec<CString>> {
    if command.contains('/') {
        return Ok(vec![c_string("process.args", command.as_bytes())?]);
    }
    let path = env
        .iter()
        .find_map(|e| e.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH);
    path.split(':')
        .map(|directory| match directory {
            "" => format!("./{command}"),
            directory => format!("{directory}/{command}"),
        })
        .map(|candidate| c_string("process.args", candidate.as_bytes()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(values: &[&str]) -> Vec<String> {
        values.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_last_value_of_a_name_counts() {
        let env = environment(&strings(&["A=1", "B=2", "A=3"])).unwrap();
        assert_eq!(env, ["A=3", "B=2"]);
        assert!(environment(&strings(&["novalue"])).is_err());
        assert!(environment(&strings(&["=x"])).is_err());
    }

    #[test]
    fn a_command_is_looked_for_in_path_unless_it_has_a_slash() {
        let env = strings(&["PATH=/a::/b"]);
        assert_eq!(
            candidates("x", &env).unwrap(),
            [c"/a/x", c"./x", c"/b/x"].map(CString::from)
        );
        assert_eq!(candidates("./x", &env).unwrap(), [CString::from(c"./x")]);
        assert_eq!(candidates("x", &[]).unwrap().len(), 6);
        assert!(candidates("a\0b", &env).is_err());
    }
}
