//! What devices do alike with the resources that a transport lends them.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT};
use vm_memory::GuestMemoryMmap;

use super::{DeviceError, Resources};

/// The resources of a device, from its activation to its reset.
#[derive(Default)]
pub struct Lent(Option<Resources>);

impl Lent {
    /// Takes them for a device of `queues` queues.
    ///
    /// # Errors
    /// [`DeviceError::State`] if the device is active already or there are not as many queues.
    pub fn take_up(&mut self, resources: Resources, queues: usize) -> Result<(), DeviceError> {
        if self.0.is_some() {
            return Err(DeviceError::State("it is active already"));
        }
        if resources.queues.len() != queues {
            return Err(DeviceError::State("it has another number of queues"));
        }
        self.0 = Some(resources);
        Ok(())
    }

    /// The resources of an active device.
    ///
    /// # Errors
    /// [`DeviceError::State`] if it is not active.
    pub fn get(&mut self) -> Result<&mut Resources, DeviceError> {
        self.0
            .as_mut()
            .ok_or(DeviceError::State("it is not active"))
    }

    /// Gives them back; `None` if the device was not active.
    pub fn give_back(&mut self) -> Option<Resources> {
        self.0.take()
    }
}

/// What virtio-queue found wrong with queue `queue`.
pub fn broken(queue: usize) -> impl Fn(virtio_queue::Error) -> DeviceError + Copy {
    move |source| DeviceError::Queue { queue, source }
}

/// The next chain that the driver has made available.
///
/// # Errors
/// The rings lie outside of guest memory, or the driver's index runs ahead of them.
pub fn pop<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemoryMmap,
    index: usize,
) -> Result<Option<DescriptorChain<&'m GuestMemoryMmap>>, DeviceError> {
    Ok(queue.iter(memory).map_err(broken(index))?.next())
}

/// Reads a configuration space whose bytes are `config`: what lies past its end is zero.
pub fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| config.get(offset..))
        .unwrap_or_default();
    data.fill(0);
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}
