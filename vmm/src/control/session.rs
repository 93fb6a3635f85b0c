//! What each request does to the machine.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use cella_proto::vmm::{
    Configure, Done, ErrorKind, Plug, Reply, Request, Snapshot, Started, Stats, reply, request,
};
use vm_memory::{GuestAddressSpace, GuestMemory, GuestMemoryRegion};

use super::configure::{self, Beginning};
use super::packet::{self, Fds};
use super::refusal::Refusal;
use super::{COMPANION_OUTPUT, Context, MACHINE_STOPPED, memory};
use crate::jail::{Companion, ThreadKind};
use crate::machine::companion::CompanionMachine;
use crate::machine::devices::Devices;
use crate::machine::worker::Worker;
use crate::machine::{Confine, Machine, MachineError, StopReason};
use crate::snapshot::{file, pages};
use crate::transport::mmio::Frozen;

const CONFIGURING: &str = "configuring the machine";

/// The door's connection and the machine behind it.
pub(super) struct Session {
    pub(super) control: OwnedFd,
    pub(super) worker: Worker,
    /// The machine shall stop, because the door said so.
    pub(super) stopping: bool,
    smaps: File,
    confine: Confine,
    stats: Stats,
    configured: bool,
    companion: Option<Companion>,
    built: Option<Built>,
}

/// Devices before the machine: their threads end before the memory goes.
struct Built {
    devices: Devices,
    machine: AnyMachine,
}

/// The machine, run by this process on KVM or by its companion.
enum AnyMachine {
    Own(Box<Machine>),
    Companion(CompanionMachine),
}

impl Session {
    pub(super) fn new(context: Context, worker: Worker) -> Self {
        Self {
            control: context.control,
            worker,
            stopping: false,
            smaps: context.smaps,
            confine: context.confine,
            stats: Stats {
                entered_us: context.entered_us,
                jailed_us: context.jailed_us,
                ..Stats::default()
            },
            configured: false,
            companion: context.companion,
            built: None,
        }
    }

    /// Does what was asked for.
    pub(super) fn handle(&mut self, request: Request, fds: Fds) -> Result<reply::Body, Refusal> {
        use request::Call;
        match request.call {
            Some(Call::Configure(configure)) => self.configure(&configure, fds)?,
            Some(Call::Start(_)) => self.start()?,
            Some(Call::Pause(_)) => self.change(
                "pausing the machine",
                Machine::pause,
                CompanionMachine::pause,
            )?,
            Some(Call::Resume(_)) => self.change(
                "resuming the machine",
                Machine::resume,
                CompanionMachine::resume,
            )?,
            Some(Call::Snapshot(snapshot)) => self.snapshot(&snapshot, fds)?,
            Some(Call::Plug(plug)) => self.plug(&plug, fds)?,
            Some(Call::Stop(_)) => self.stopping = true,
            Some(Call::GetStats(_)) => return self.get_stats().map(reply::Body::Stats),
            _ => {
                return Err(Refusal {
                    kind: ErrorKind::ERROR_KIND_INVALID_ARGUMENT,
                    message: "a request asks for nothing that is known".to_owned(),
                });
            }
        }
        Ok(reply::Body::Done(Done::default()))
    }

    fn configure(&mut self, configure: &Configure, fds: Fds) -> Result<(), Refusal> {
        // One attempt: it ends with the main thread's confinement, which leaves no way to make a second machine.
        if std::mem::replace(&mut self.configured, true) {
            return Err(Refusal {
                kind: ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
                message: "configuring the machine: it was asked for before".to_owned(),
            });
        }
        self.built = Some(match self.companion.take() {
            Some(companion) => self.serve(companion, configure, fds)?,
            None => self.build(configure, fds)?,
        });
        Ok(())
    }

    /// Makes the machine that is asked for, on KVM.
    fn build(&mut self, configure: &Configure, mut fds: Fds) -> Result<Built, Refusal> {
        let (beginning, specs) = configure::parse(configure, &mut fds)?;
        // What nobody asked for shall not stay open.
        drop(fds);
        let (made, saved, mut spares) = match beginning {
            Beginning::Boot(config) => (Machine::new(config), None, configure.spare_slots),
            Beginning::Restore(mut config) => {
                let devices = std::mem::take(&mut config.state.devices);
                let spares = config.state.spare_slots;
                (Machine::restore(config), Some(devices), spares)
            }
        };
        let mut machine = made.map_err(Refusal::machine(CONFIGURING))?;
        let devices = Devices::connect(&mut machine, specs, &mut self.worker, &self.confine)
            .map_err(Refusal::devices(CONFIGURING))?;
        if let Some(saved) = &saved {
            spares = devices
                .left_over(saved, spares)
                .map_err(Refusal::snapshot(CONFIGURING))?;
        }
        machine
            .add_spares(spares)
            .map_err(Refusal::machine(CONFIGURING))?;
        machine
            .spawn(self.confine.clone())
            .map_err(Refusal::machine(CONFIGURING))?;
        if let Some(saved) = saved {
            devices
                .restore(&saved)
                .map_err(Refusal::snapshot(CONFIGURING))?;
        }
        self.worker
            .watch(machine.stopped_event().as_raw_fd(), MACHINE_STOPPED)
            .and_then(|()| (self.confine)(ThreadKind::Main))
            .map_err(Refusal::io(CONFIGURING))?;
        Ok(Built {
            devices,
            machine: AnyMachine::Own(Box::new(machine)),
        })
    }

    /// Serves the devices that are asked for to the companion.
    fn serve(
        &mut self,
        companion: Companion,
        configure: &Configure,
        mut fds: Fds,
    ) -> Result<Built, Refusal> {
        let specs = configure::parse_served(configure, &mut fds)?;
        drop(fds);
        let machine = CompanionMachine::new(companion).map_err(Refusal::machine(CONFIGURING))?;
        let devices = Devices::serve(specs, &mut self.worker, &self.confine, &machine.on_end())
            .map_err(Refusal::devices(CONFIGURING))?;
        for fd in machine.ends() {
            self.worker
                .watch(fd.as_raw_fd(), MACHINE_STOPPED)
                .map_err(Refusal::io(CONFIGURING))?;
        }
        self.worker
            .watch(machine.output().as_raw_fd(), COMPANION_OUTPUT)
            .and_then(|()| (self.confine)(ThreadKind::VhostUserMain))
            .map_err(Refusal::io(CONFIGURING))?;
        Ok(Built {
            devices,
            machine: AnyMachine::Companion(machine),
        })
    }

    /// The companion has written something.
    pub(super) fn read_output(&mut self) {
        if let Some(Built {
            machine: AnyMachine::Companion(machine),
            ..
        }) = &mut self.built
            && !machine.read_output()
        {
            let _ = self.worker.unwatch(machine.output().as_raw_fd());
        }
    }

    /// Something has happened; perhaps the guest of a companion has come to use a device.
    pub(super) fn look_at_guest(&mut self) {
        if let Some(Built {
            machine: AnyMachine::Companion(machine),
            devices,
        }) = &mut self.built
            && machine.is_booting()
            && !devices.guest_ranges().is_empty()
        {
            machine.booted();
        }
    }

    fn start(&mut self) -> Result<(), Refusal> {
        let started_us = now_us();
        self.change(
            "starting the machine",
            Machine::start,
            CompanionMachine::start,
        )?;
        self.stats.started_us = started_us;
        let started = Started {
            started_us,
            ..Started::default()
        };
        let event = Reply {
            body: Some(reply::Body::Started(started)),
            ..Reply::default()
        };
        packet::reply(self.control.as_fd(), &event)
            .map_err(Refusal::io("saying that the machine has started"))
            .map(drop)
    }

    /// Writes what the paused machine is to the files that came along.
    fn snapshot(&mut self, snapshot: &Snapshot, mut fds: Fds) -> Result<(), Refusal> {
        let action = "saving the machine";
        let built = self.built.as_ref().ok_or_else(|| not_configured(action))?;
        let AnyMachine::Own(machine) = &built.machine else {
            return Err(Refusal {
                kind: ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
                message: format!("{action}: the companion's cannot be"),
            });
        };
        let state_file = configure::take(&mut fds, snapshot.state_fd, "state_fd")?;
        let memory_file = configure::take(&mut fds, snapshot.memory_fd, "memory_fd")?;
        let mut state = machine.save().map_err(Refusal::machine(action))?;
        // Until memory is written: what devices do changes it.
        let mut frozen = built.devices.freeze();
        state.devices = frozen
            .iter_mut()
            .map(Frozen::save)
            .collect::<Result<_, _>>()
            .map_err(Refusal::snapshot(action))?;
        let memory = machine.memory();
        state.samples = pages::write(&memory.memory(), &memory_file.into())
            .map_err(Refusal::snapshot(action))?;
        drop(frozen);
        file::write(&state_file.into(), &state).map_err(Refusal::snapshot(action))
    }

    /// Gives the network device the tap that came along.
    fn plug(&mut self, plug: &Plug, mut fds: Fds) -> Result<(), Refusal> {
        let action = "plugging a network in";
        let built = self.built.as_ref().ok_or_else(|| not_configured(action))?;
        let tap = configure::take(&mut fds, plug.tap_fd, "tap_fd")?;
        match built.devices.plug(tap.into()) {
            true => Ok(()),
            false => Err(Refusal {
                kind: ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
                message: format!("{action}: the machine has no network device"),
            }),
        }
    }

    fn change(
        &mut self,
        action: &str,
        own: fn(&mut Machine) -> Result<(), MachineError>,
        companion: fn(&mut CompanionMachine) -> Result<(), MachineError>,
    ) -> Result<(), Refusal> {
        let built = self.built.as_mut().ok_or_else(|| not_configured(action))?;
        match &mut built.machine {
            AnyMachine::Own(machine) => own(machine),
            AnyMachine::Companion(machine) => companion(machine),
        }
        .map_err(Refusal::machine(action))
    }

    fn get_stats(&mut self) -> Result<Stats, Refusal> {
        let guest = self
            .built
            .as_ref()
            .map(|built| match &built.machine {
                AnyMachine::Own(machine) => guest_ranges(machine),
                AnyMachine::Companion(_) => built.devices.guest_ranges(),
            })
            .unwrap_or_default();
        let resident = memory::resident(&mut self.smaps, &guest)
            .map_err(Refusal::io("reading the process's own memory use"))?;
        let exits: HashMap<String, u64> = self
            .built
            .iter()
            .flat_map(|built| match &built.machine {
                AnyMachine::Own(machine) => machine.exits(),
                AnyMachine::Companion(_) => Vec::new(),
            })
            .map(|(reason, count)| (reason.to_owned(), count))
            .collect();
        Ok(Stats {
            exits,
            rss_kib: resident.vmm_kib,
            guest_rss_kib: resident.guest_kib,
            ..self.stats.clone()
        })
    }

    /// Stops the machine and its devices, and says why it stopped.
    pub(super) fn stop(&mut self) -> StopReason {
        let Some(Built {
            devices,
            mut machine,
        }) = self.built.take()
        else {
            return StopReason::Requested;
        };
        let reason = match &mut machine {
            AnyMachine::Own(machine) => {
                machine.stop();
                machine.stop_reason()
            }
            AnyMachine::Companion(machine) => {
                Some(machine.stop(!devices.guest_ranges().is_empty()))
            }
        };
        devices.shut_down();
        reason.unwrap_or(StopReason::Requested)
    }
}

fn not_configured(action: &str) -> Refusal {
    Refusal {
        kind: ErrorKind::ERROR_KIND_FAILED_PRECONDITION,
        message: format!("{action}: it is not configured"),
    }
}

/// Where guest memory is mapped in this process.
fn guest_ranges(machine: &Machine) -> Vec<Range<u64>> {
    let memory = machine.memory();
    let memory = memory.memory();
    memory
        .iter()
        .map(|region| {
            let start = region.as_ptr() as u64;
            start..start.saturating_add(region.len())
        })
        .collect()
}

/// Microseconds of `CLOCK_MONOTONIC`.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let micros = u64::try_from(now.tv_nsec).unwrap_or_default() / 1000;
    seconds.saturating_mul(1_000_000).saturating_add(micros)
}
