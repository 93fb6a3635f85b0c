//! The ways to a machine: an idle clone, a template, a boot.

use super::{Error, SandboxSpec};
use crate::error::ErrorKind;
use crate::hypervisor::{self, HandedVm, Hypervisor, SavedVm, VmSpec};
use crate::paths::Paths;
use crate::pool::{self, Claimed};
use crate::template::{self, Key, Shape, Store};

/// What templates had to do with a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TemplateUse {
    /// It is a clone.
    Cloned,
    /// It is a clone that had to take memory into use which those of a template of this shape have.
    Grown(Shape),
    /// It is a clone that waited in the pool.
    Claimed,
    /// It was booted; with a template of this shape it could have been a clone.
    Wanted(Shape),
    /// It was booted, and another one like it will be.
    Unused,
}

/// The ways to a machine, the quickest first.
pub(super) struct Ways<'a> {
    pub(super) hypervisor: &'a dyn Hypervisor,
    /// An idle clone that is this process's.
    pub(super) idle: Option<HandedVm>,
    pub(super) found: Found,
}

/// What there is to clone.
pub(super) enum Found {
    Template {
        key: Key,
        shape: Shape,
        saved: SavedVm,
        /// A shape that would serve better.
        better: Option<Shape>,
    },
    /// One of this shape would serve.
    Missing(Shape),
    Nothing,
}

impl Found {
    /// An idle clone of it. Those of the pool have no disks and no added memory.
    pub(super) fn claim(&self, paths: &Paths, spec: &SandboxSpec) -> Option<Claimed> {
        match self {
            Self::Template { key, shape, .. }
                if spec.pool
                    && spec.disks.is_empty()
                    && spec.memory_bytes == shape.memory_bytes =>
            {
                pool::claim(paths, key, spec.vcpus)
            }
            _ => None,
        }
    }

    pub(super) fn look(paths: &Paths, hypervisor: &dyn Hypervisor, spec: &SandboxSpec) -> Self {
        // A console is a device that a template does not have.
        if !spec.template || !hypervisor.saves() || spec.console.is_some() {
            return Self::Nothing;
        }
        let network = spec.netns.is_some();
        let best = Shape::serving(spec.vcpus, spec.memory_bytes, network, &spec.cmdline);
        let common = best.common();
        match Self::of_shape(paths, &best) {
            Self::Missing(_) if common != best => match Self::of_shape(paths, &common) {
                Self::Template {
                    key, shape, saved, ..
                } => Self::Template {
                    key,
                    shape,
                    saved,
                    better: Some(best),
                },
                other => other,
            },
            found => found,
        }
    }

    fn of_shape(paths: &Paths, shape: &Shape) -> Self {
        let key = match Key::of(paths, shape) {
            Ok(key) => key,
            // A program is missing: the boot fails of it, and says so.
            Err(error) => {
                tracing::debug!("looking for a template: {error}");
                return Self::Nothing;
            }
        };
        let shape = shape.clone();
        match Store::new(paths).open(&key) {
            Ok(Some(saved)) => Self::Template {
                key,
                shape,
                saved,
                better: None,
            },
            Ok(None) => Self::Missing(shape),
            Err(error) => {
                tracing::warn!("looking for a template: {error}; booting instead");
                Self::Nothing
            }
        }
    }
}

/// Makes `spec` that of a clone of a template of `shape`, with the memory that it has beyond that as added memory.
pub(super) fn grow(spec: &mut VmSpec, shape: &Shape) {
    let more = spec.memory_bytes.saturating_sub(shape.memory_bytes);
    spec.added_memory_bytes = more
        .checked_next_multiple_of(hypervisor::ADDED_BLOCK)
        .unwrap_or(more);
    spec.memory_bytes = shape.memory_bytes;
}

/// A template that cannot be used is in the way of one that can, unless it is the host that lacks something.
pub(super) fn discard(paths: &Paths, key: &Key, why: &Error) {
    if why.kind() == ErrorKind::ResourceExhausted {
        return;
    }
    match Store::new(paths).remove(key) {
        Ok(()) | Err(template::Error::NotFound(_)) => {}
        Err(error) => tracing::warn!("{error}"),
    }
}
