//! What a container is made of: an image with a spec made for it, or a bundle with its own.

use std::path::Path;

use oci_spec::runtime::Spec;

use super::Error;
use crate::image::{Bundle, Image, ImageRef, Store, bundle};
use crate::paths::Paths;
use crate::sandbox::volume;
use crate::spec::{self, SpecOptions};

/// An image or a bundle, ready to be mounted.
pub enum Source {
    /// A spec is made for it.
    Image(Box<Image>),
    /// It has its own.
    Bundle(Box<Bundle>),
}

impl Source {
    /// Finds what `reference` names; unpacks an image's layers unless they are unpacked.
    ///
    /// # Errors
    /// It does not exist, or is not what it says it is.
    pub fn prepare(paths: &Paths, reference: &str) -> Result<Self, Error> {
        Ok(match ImageRef::parse(reference)? {
            ImageRef::Bundle(dir) => Self::Bundle(Box::new(bundle::load(&dir)?)),
            reference => {
                let store = Store::open(&paths.lib_dir)?;
                Self::Image(Box::new(store.prepare(&reference)?))
            }
        })
    }

    /// The digests of an image's layers; none of a bundle.
    pub fn layers(&self) -> Vec<String> {
        match self {
            Self::Image(image) => image.digests(),
            Self::Bundle(_) => Vec::new(),
        }
    }

    /// Mounts the root file system at `target`, in a sandbox's share; what is written goes to `scratch`, but for a
    /// bundle's, which is used as it is.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub fn mount(&self, target: &Path, scratch: &Path) -> Result<(), Error> {
        match self {
            // Whoever removes the sandbox's directory unmounts it.
            Self::Image(image) => image.mount(target, scratch)?.keep(),
            Self::Bundle(bundle) => volume::bind(&bundle.rootfs, target, volume::Bound::default())?,
        }
        Ok(())
    }

    /// The container's spec. A bundle's takes the command, the variables and the mounts of `options`, if there are any.
    ///
    /// # Errors
    /// The image's user does not exist, or an option is no option.
    pub fn spec(&self, options: &SpecOptions, rootfs: &Path) -> Result<Spec, Error> {
        let bundle = match self {
            Self::Image(image) => {
                let spec = spec::for_image(image, options, rootfs)?;
                spec::make_directories(image, &spec, rootfs)?;
                return Ok(spec);
            }
            Self::Bundle(bundle) => bundle,
        };
        let mut spec = bundle.spec.clone();
        if let Some(process) = spec.process_mut() {
            if !options.args.is_empty() {
                process.set_args(Some(options.args.clone()));
            }
            let mut env = process.env().clone().unwrap_or_default();
            spec::set_env(&mut env, &options.env, "--env")?;
            process.set_env(Some(env));
            if options.terminal {
                process.set_terminal(Some(true));
            }
        }
        spec::add_mounts(&mut spec, &options.mounts)?;
        Ok(spec)
    }
}
