//! What each request of the hypervisor does.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use super::ring::{Calls, Ring, event};
use super::{FIRST_KICK, READ, memory::Table};
use crate::device::{Device, DeviceError, GuestMemory, Readiness, Resources, Watcher};
use crate::transport::{guarded, lock};

/// How many failures of a device are logged: a guest can make one as often as it likes.
const LOGGED_FAILURES: u32 = 8;

/// A device, and what the hypervisor has said so far.
pub(super) struct Connection {
    name: &'static str,
    /// So many queues, from the first on, does the hypervisor hand over.
    handed: usize,
    /// Where the device watches.
    watcher: Arc<dyn Watcher + Send + Sync>,
    calls: Arc<Calls>,
    state: Mutex<State>,
}

struct State {
    device: Box<dyn Device>,
    own_watcher: Option<Arc<dyn Watcher + Send + Sync>>,
    memory: Option<GuestMemory>,
    table: Table,
    /// What the driver has taken of the features offered.
    features: u64,
    rings: Vec<Ring>,
    active: bool,
    /// The device has failed, and waits for a reset.
    failed: bool,
    failures: u32,
}

impl Connection {
    pub(super) fn new(
        name: &'static str,
        device: Box<dyn Device>,
        handed: usize,
        watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Self {
        let queues = device.queue_sizes().len();
        Self {
            name,
            handed: handed.min(queues),
            watcher,
            calls: Arc::new(Calls::new(queues)),
            state: Mutex::new(State {
                device,
                own_watcher: None,
                memory: None,
                table: Table::default(),
                features: 0,
                rings: (0..queues).map(|_| Ring::default()).collect(),
                active: false,
                failed: false,
                failures: 0,
            }),
        }
    }

    /// Where the kicks of the queues are watched.
    pub(super) fn watch_with(&self, watcher: Arc<dyn Watcher + Send + Sync>) {
        lock(&self.state).own_watcher = Some(watcher);
    }

    pub(super) fn guest_ranges(&self) -> Vec<Range<u64>> {
        lock(&self.state).table.mapped.clone()
    }

    /// The driver has kicked queue `index`.
    pub(super) fn kicked(&self, index: usize) {
        let mut state = lock(&self.state);
        if let Some(kick) = state.rings.get(index).and_then(|ring| ring.kick.as_ref()) {
            // Emptied first, so that a kick while the device runs comes back.
            let _ = kick.read();
        }
        self.run(&mut state, "kicked", |device| device.kick(index));
    }

    pub(super) fn event(&self, token: u64, readiness: Readiness) {
        let mut state = lock(&self.state);
        self.run(&mut state, "handling an event", |device| {
            device.event(token, readiness)
        });
    }

    /// The hypervisor is gone.
    pub(super) fn end(&self) {
        let mut state = lock(&self.state);
        self.deactivate(&mut state);
        for ring in &mut state.rings {
            ring.enabled = false;
        }
        for index in 0..state.rings.len() {
            self.set_kick(&mut state, index, None).ok();
            self.calls.set(index, None);
        }
    }

    fn run(
        &self,
        state: &mut State,
        doing: &str,
        call: impl FnOnce(&mut dyn Device) -> std::result::Result<(), DeviceError>,
    ) {
        if !state.active || state.failed {
            return;
        }
        if let Err(failure) = guarded(|| call(state.device.as_mut())) {
            self.fail(state, doing, &failure);
        }
    }

    /// vhost-user has no word for a device that needs a reset: it just stops, until the driver resets it.
    fn fail(&self, state: &mut State, doing: &str, failure: &str) {
        state.failed = true;
        state.failures = state.failures.saturating_add(1);
        if state.failures <= LOGGED_FAILURES {
            eprintln!("cella-vmm: device {} failed {doing}: {failure}", self.name);
        }
    }

    /// Takes the device into use if the last of what it needs has come.
    fn activate_if_complete(&self, state: &mut State) -> Result<()> {
        let mut handed = state.rings.iter().take(self.handed);
        if state.active || !handed.all(Ring::is_started) {
            return Ok(());
        }
        let memory = state
            .memory
            .clone()
            .ok_or(Error::InvalidOperation("queues without guest memory"))?;
        let event_idx = state.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let queues = {
            let guard = memory.memory();
            let sizes = state.device.queue_sizes();
            let queues = state.rings.iter().zip(sizes);
            queues
                .map(|(ring, max)| ring.queue(*max, event_idx, &guard))
                .collect::<std::result::Result<_, _>>()
                .map_err(|error| {
                    eprintln!(
                        "cella-vmm: device {}: setting up a queue: {error}",
                        self.name
                    );
                    Error::InvalidOperation("a queue cannot be set up")
                })?
        };
        let resources = Resources {
            memory,
            queues,
            interrupt: self.calls.clone(),
            features: state.features,
        };
        let watcher = Arc::clone(&self.watcher);
        state.active = true;
        state.failed = false;
        if let Err(failure) = guarded(|| state.device.activate(resources, watcher)) {
            self.fail(state, "on activation", &failure);
        }
        // What the driver had made available before has perhaps been kicked for long ago.
        for index in 0..self.handed {
            self.run(state, "kicked", |device| device.kick(index));
        }
        Ok(())
    }

    /// Ends the device's use, and keeps how far it has come in each queue.
    fn deactivate(&self, state: &mut State) {
        if !std::mem::take(&mut state.active) {
            return;
        }
        let resources = match guarded(|| Ok(state.device.reset())) {
            Ok(resources) => resources,
            Err(failure) => return self.fail(state, "on reset", &failure),
        };
        let queues = resources.map(|lent| lent.queues).unwrap_or_default();
        for (ring, queue) in state.rings.iter_mut().zip(queues) {
            ring.base = queue.next_avail();
        }
    }

    fn set_kick(&self, state: &mut State, index: usize, kick: Option<File>) -> Result<()> {
        let watcher = state.own_watcher.clone();
        let Some(ring) = state.rings.get_mut(index) else {
            return Err(Error::InvalidParam);
        };
        if let (Some(old), Some(watcher)) = (ring.kick.take(), &watcher) {
            let _ = watcher.unwatch(old.as_raw_fd());
        }
        if let Some(kick) = kick {
            let kick = event(kick).map_err(Error::ReqHandlerError)?;
            if let Some(watcher) = &watcher {
                let token = FIRST_KICK.saturating_add(index as u64);
                watcher
                    .watch(kick.as_raw_fd(), token, READ)
                    .map_err(Error::ReqHandlerError)?;
            }
            ring.kick = Some(kick);
        }
        Ok(())
    }

    /// Does `change` to a ring that is not being served.
    fn change_ring(
        &self,
        index: u32,
        change: impl FnOnce(&mut Ring, &Table) -> Result<()>,
    ) -> Result<()> {
        let mut state = lock(&self.state);
        let State {
            rings,
            table,
            active,
            ..
        } = &mut *state;
        if *active {
            return Err(Error::InvalidOperation("a queue was changed while in use"));
        }
        let ring = usize::try_from(index)
            .ok()
            .and_then(|index| rings.get_mut(index));
        change(ring.ok_or(Error::InvalidParam)?, table)
    }
}

const UNASKED: Error = Error::InvalidOperation("it was not negotiated");

impl VhostUserBackendReqHandler for Connection {
    fn set_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        self.deactivate(&mut lock(&self.state));
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        let offered = lock(&self.state).device.features();
        Ok(offered | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&self, features: u64) -> Result<()> {
        let mut state = lock(&self.state);
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & !(state.device.features() | protocol) != 0 {
            return Err(Error::FeatureMismatch);
        }
        state.features = features & !protocol;
        if features & protocol == 0 {
            // Without the protocol's features there is no request that enables a ring.
            for ring in &mut state.rings {
                ring.enabled = true;
            }
        }
        Ok(())
    }

    fn set_mem_table(&self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let (table, memory) = Table::map(regions, files).map_err(Error::ReqHandlerError)?;
        let mut state = lock(&self.state);
        match &state.memory {
            Some(known) => {
                if let Ok(guard) = known.lock() {
                    guard.replace(memory);
                }
            }
            None => state.memory = Some(GuestMemory::new(memory)),
        }
        state.table = table;
        Ok(())
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        self.change_ring(index, |ring, _| {
            ring.size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
            Ok(())
        })
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change_ring(index, |ring, table| {
            let guest = |address| {
                table
                    .guest_address(address)
                    .ok_or(Error::InvalidOperation("rings outside of guest memory"))
            };
            ring.addresses = Some([guest(descriptor)?, guest(available)?, guest(used)?]);
            Ok(())
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.change_ring(index, |ring, _| {
            ring.base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
            Ok(())
        })
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let mut state = lock(&self.state);
        // The specification has this request stop the ring. A device whose queues are not all there is of no use.
        self.deactivate(&mut state);
        let at = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.set_kick(&mut state, at, None)?;
        let ring = state.rings.get_mut(at).ok_or(Error::InvalidParam)?;
        Ok(VhostUserVringState::new(index, u32::from(ring.base)))
    }

    fn set_vring_kick(&self, index: u8, kick: Option<File>) -> Result<()> {
        let mut state = lock(&self.state);
        self.set_kick(&mut state, usize::from(index), kick)?;
        self.activate_if_complete(&mut state)
    }

    fn set_vring_call(&self, index: u8, call: Option<File>) -> Result<()> {
        let call = call
            .map(event)
            .transpose()
            .map_err(Error::ReqHandlerError)?;
        self.calls.set(usize::from(index), call);
        Ok(())
    }

    fn set_vring_err(&self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG)
    }

    fn set_protocol_features(&self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.handed as u64)
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        let mut state = lock(&self.state);
        let ring = usize::try_from(index)
            .ok()
            .and_then(|index| state.rings.get_mut(index));
        ring.ok_or(Error::InvalidParam)?.enabled = enable;
        match enable {
            true => self.activate_if_complete(&mut state)?,
            false => self.deactivate(&mut state),
        }
        Ok(())
    }

    fn get_config(&self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The library bounds the size to that of a message.
        let mut data = vec![0; usize::try_from(size).map_err(|_| Error::InvalidParam)?];
        let state = lock(&self.state);
        guarded(|| {
            state.device.read_config(u64::from(offset), &mut data);
            Ok(())
        })
        .map_err(|_| Error::BackendInternalError)?;
        Ok(data)
    }

    // No device of ours has a configuration space that its driver writes.
    fn set_config(&self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        Err(UNASKED)
    }

    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        Err(UNASKED)
    }

    fn get_inflight_fd(&self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(UNASKED)
    }

    fn set_inflight_fd(&self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(UNASKED)
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Err(UNASKED)
    }

    fn add_mem_region(&self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        Err(UNASKED)
    }

    fn remove_mem_region(&self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(UNASKED)
    }

    fn set_device_state_fd(
        &self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(UNASKED)
    }

    fn check_device_state(&self) -> Result<()> {
        Err(UNASKED)
    }

    fn set_log_base(&self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(UNASKED)
    }
}
