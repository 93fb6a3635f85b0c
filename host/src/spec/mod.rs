//! temp
use crate::image::{Error, Image};
use oci_spec::runtime::{Mount, Spec};
use std::path::Path;
#[derive(Default)]
pub struct SpecOptions {
    pub command: Vec<String>,
    pub env: Vec<String>,
    pub terminal: bool,
    pub mounts: Vec<Mount>,
}
pub fn for_image(_i: &Image, _o: &SpecOptions, _r: &Path) -> Result<Spec, Error> {
    Ok(Spec::default())
}
pub fn set_env(_e: &mut Vec<String>, _n: &[String]) -> Result<(), Error> {
    Ok(())
}
pub fn default_env(_e: &mut Vec<String>, _k: &str, _v: &str) {}
