//! The entropy device (virtio 1.2, section 5.4): the smallest complete device, and the one to read first.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};

use super::lent::{Lent, broken, read_config};
use super::{Device, DeviceError, Resources, Watcher};

const QUEUE_SIZES: [u16; 1] = [32];

/// Most bytes of entropy that one request is answered with. Linux asks for less than a cache line at a time;
/// without a cap a guest could keep the VMM's main thread in `getrandom` for as long as it likes, by a
/// chain of 4 GiB. A device may fill less than what it is offered (section 5.4.6.1).
const MAX_REQUEST: u32 = 4096;

/// A virtio entropy device, fed by the host's `getrandom`.
#[derive(Default)]
pub struct Rng {
    active: Lent,
}

impl Rng {
    /// An inactive device.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&[], offset, data);
    }

    fn activate(
        &mut self,
        resources: Resources,
        _watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        self.active.take_up(resources, QUEUE_SIZES.len())
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        let resources = self.active.get()?;
        let memory = resources.memory.memory();
        let queue = resources.queue(index)?;
        let broken = broken(index);
        // An index that runs ahead of the ring is an error here, so that one kick is at most a ring's length of work.
        // Notifications are never switched off (no VIRTIO_F_EVENT_IDX either): what the driver adds from
        // here on comes with a kick of its own, and no driver can keep the loop going.
        let chains: Vec<_> = queue.iter(memory.clone()).map_err(broken)?.collect();
        for chain in chains {
            let head = chain.head_index();
            let filled = fill(&memory, chain)?;
            queue.add_used(&*memory, head, filled).map_err(broken)?;
        }
        resources.notify(index)
    }

    fn reset(&mut self) -> Option<Resources> {
        self.active.give_back()
    }
}

/// Fills a request's buffers, up to [`MAX_REQUEST`] bytes, and returns how many it filled. A buffer outside of
/// guest memory ends the request.
fn fill<M>(memory: &GuestMemoryMmap, chain: DescriptorChain<M>) -> Result<u32, DeviceError>
where
    M: std::ops::Deref<Target = GuestMemoryMmap> + Clone,
{
    let mut filled = 0;
    let mut bytes = [0; MAX_REQUEST as usize];
    for descriptor in chain.writable() {
        let len = descriptor.len().min(MAX_REQUEST - filled);
        let Some(part) = bytes.get_mut(..len as usize) else {
            break;
        };
        random(part)?;
        if memory.write_slice(part, descriptor.addr()).is_err() {
            break;
        }
        filled += len;
    }
    Ok(filled)
}

fn random(mut buffer: &mut [u8]) -> Result<(), DeviceError> {
    while !buffer.is_empty() {
        match rustix::rand::getrandom(&mut *buffer, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => buffer = buffer.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(DeviceError::Host {
                    action: "reading entropy of the host",
                    source: error.into(),
                });
            }
        }
    }
    Ok(())
}
