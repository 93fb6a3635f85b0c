//! A driver, honest or not, on the registers of a device that does what the test tells it to.

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::testing::MockWatcher;

const FEATURES: u64 = VERSION_1 | 1 << 29 | 1 << 5;
const SIZES: [u16; 2] = [64, 16];
const MEMORY: u64 = 1 << 20;

/// What the device under the transport has seen. Asserting inside of the device would be caught as its panic.
#[derive(Default)]
struct Seen {
    activations: AtomicUsize,
    resets: AtomicUsize,
    kicks: AtomicUsize,
    events: AtomicUsize,
    wrong: AtomicUsize,
}

impl Seen {
    fn count(counter: &AtomicUsize) -> usize {
        counter.load(Ordering::SeqCst)
    }

    fn add(counter: &AtomicUsize) {
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Mood {
    Well,
    Error,
    Panic,
}

struct Fake {
    seen: Arc<Seen>,
    mood: Arc<Mutex<Mood>>,
    active: Option<Resources>,
}

impl Device for Fake {
    fn id(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = if at < 6 { at as u8 + 1 } else { 0 };
        }
    }

    fn activate(
        &mut self,
        resources: Resources,
        _watcher: Arc<dyn Watcher + Send + Sync>,
    ) -> Result<(), DeviceError> {
        let memory = resources.memory.memory();
        let fine = self.active.is_none()
            && resources.features & !FEATURES == 0
            && resources.queues.len() == SIZES.len()
            && resources
                .queues
                .iter()
                .all(|queue| queue.is_valid(&*memory));
        if !fine {
            Seen::add(&self.seen.wrong);
        }
        Seen::add(&self.seen.activations);
        self.active = Some(resources);
        Ok(())
    }

    fn kick(&mut self, index: usize) -> Result<(), DeviceError> {
        Seen::add(&self.seen.kicks);
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Well => self
                .active
                .as_mut()
                .ok_or(DeviceError::State("inactive"))?
                .notify(index),
            Mood::Error => Err(DeviceError::State("a bad mood")),
            Mood::Panic => panic!("a very bad mood"),
        }
    }

    fn event(&mut self, _token: u64, _readiness: Readiness) -> Result<(), DeviceError> {
        Seen::add(&self.seen.events);
        Ok(())
    }

    fn reset(&mut self) -> Option<Resources> {
        Seen::add(&self.seen.resets);
        self.active.take()
    }
}

struct Bench {
    transport: Arc<MmioTransport>,
    seen: Arc<Seen>,
    mood: Arc<Mutex<Mood>>,
}

impl Bench {
    fn new() -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let (seen, mood) = (Arc::new(Seen::default()), Arc::new(Mutex::new(Mood::Well)));
        let device = Fake {
            seen: seen.clone(),
            mood: mood.clone(),
            active: None,
        };
        let watcher = Arc::new(MockWatcher::default());
        let transport =
            MmioTransport::new("fake", Box::new(device), GuestMemory::new(memory), watcher)
                .unwrap();
        Self {
            transport,
            seen,
            mood,
        }
    }

    fn read(&self, register: Register) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(register as u64, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: Register, value: u32) {
        self.transport.write(register as u64, &value.to_le_bytes());
    }

    fn negotiate(&self, features: u64) {
        self.write(Register::Status, 1);
        self.write(Register::Status, 3);
        for half in 0..2 {
            self.write(Register::DriverFeaturesSel, half);
            self.write(Register::DriverFeatures, (features >> (32 * half)) as u32);
        }
        self.write(Register::Status, 11);
    }

    fn set_up_queue(&self, index: u32, size: u32, rings: [u64; 3]) {
        self.write(Register::QueueSel, index);
        self.write(Register::QueueNum, size);
        let registers = [
            (Register::QueueDescLow, Register::QueueDescHigh),
            (Register::QueueDriverLow, Register::QueueDriverHigh),
            (Register::QueueDeviceLow, Register::QueueDeviceHigh),
        ];
        for ((low, high), address) in registers.into_iter().zip(rings) {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(Register::QueueReady, 1);
    }

    fn bring_up(&self) {
        self.negotiate(FEATURES);
        for index in 0..2 {
            self.set_up_queue(index, 16, [0x1000, 0x2000, 0x3000]);
            assert_eq!(self.read(Register::QueueReady), 1);
        }
        self.write(Register::Status, 15);
    }
}

#[test]
fn a_driver_finds_what_the_device_is() {
    let bench = Bench::new();
    assert_eq!(bench.read(Register::MagicValue), 0x7472_6976);
    assert_eq!(bench.read(Register::Version), 2);
    assert_eq!(bench.read(Register::DeviceId), 42);
    let mut offered = 0;
    for half in 0..2 {
        bench.write(Register::DeviceFeaturesSel, half);
        offered |= u64::from(bench.read(Register::DeviceFeatures)) << (32 * half);
    }
    assert_eq!(offered, FEATURES);
    bench.write(Register::DeviceFeaturesSel, 2);
    assert_eq!(bench.read(Register::DeviceFeatures), 0);
    for (index, size) in [(0, 64), (1, 16), (2, 0), (u32::MAX, 0)] {
        bench.write(Register::QueueSel, index);
        assert_eq!(bench.read(Register::QueueNumMax), size);
    }
    assert_eq!(bench.read(Register::ShmLenLow), u32::MAX);
    assert_eq!(bench.read(Register::ShmLenHigh), u32::MAX);
}

#[test]
fn bring_up_activates_and_a_kick_interrupts() {
    let bench = Bench::new();
    bench.transport.kick(0);
    assert_eq!(Seen::count(&bench.seen.kicks), 0, "kicked before DRIVER_OK");
    bench.bring_up();
    assert_eq!(bench.read(Register::Status), 15);
    assert_eq!(Seen::count(&bench.seen.activations), 1);
    // With event indices an interrupt comes when the used index passes the one asked for; none does yet.
    bench.transport.kick(0);
    assert_eq!(bench.read(Register::InterruptStatus), 0);
    bench.transport.interrupt.queue(1);
    assert_eq!(bench.read(Register::InterruptStatus), 1);
    assert_eq!(bench.transport.irq().read().unwrap(), 1);
    bench.write(Register::InterruptAck, 1);
    assert_eq!(bench.read(Register::InterruptStatus), 0);
    bench.transport.event(7, Readiness::default());
    assert_eq!(Seen::count(&bench.seen.events), 1);
    assert_eq!(Seen::count(&bench.seen.wrong), 0);
}

#[test]
fn features_that_were_not_offered_do_not_stick() {
    for features in [
        FEATURES | 1 << 7,
        FEATURES | 1 << 63,
        FEATURES & !VERSION_1,
        0,
    ] {
        let bench = Bench::new();
        bench.negotiate(features);
        assert_eq!(bench.read(Register::Status), 3, "{features:#x}");
        bench.write(Register::Status, 15);
        assert_eq!(bench.read(Register::Status), 3, "{features:#x}");
        assert_eq!(Seen::count(&bench.seen.activations), 0);
        bench.write(Register::Status, 0x83);
        assert_eq!(bench.read(Register::Status), 0x83);
        bench.write(Register::Status, 0x8f);
        assert_eq!(bench.read(Register::Status), 0x83, "FAILED until reset");
    }
}

#[test]
fn queues_that_cannot_be_are_not_ready_and_fail_activation() {
    let rings = [0x1000, 0x2000, 0x3000];
    for (size, rings) in [
        (0, rings),
        (3, rings),
        (128, rings),
        (0x1_0010, rings),
        (u32::MAX, rings),
        (16, [0x1008, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        (16, [MEMORY - 0xf0, 0x2000, 0x3000]),
        (16, [0x1000, MEMORY - 32, 0x3000]),
        (16, [0x1000, 0x2000, MEMORY - 128]),
        (16, [u64::MAX - 15, 0x2000, 0x3000]),
        (16, [0x1000, u64::MAX - 1, 0x3000]),
    ] {
        let bench = Bench::new();
        bench.negotiate(FEATURES);
        bench.set_up_queue(1, 16, [0x1000, 0x2000, 0x3000]);
        bench.set_up_queue(0, size, rings);
        assert_eq!(bench.read(Register::QueueReady), 0, "{size} {rings:x?}");
        bench.write(Register::Status, 15);
        assert_eq!(bench.read(Register::Status), 15 | STATUS_NEEDS_RESET);
        assert_eq!(bench.read(Register::InterruptStatus), 2);
        assert_eq!(Seen::count(&bench.seen.activations), 0);
    }
}

#[test]
fn rings_may_end_where_memory_ends() {
    let bench = Bench::new();
    bench.negotiate(FEATURES);
    bench.set_up_queue(0, 16, [0x1000, 0x2000, (MEMORY - 134) & !3]);
    assert_eq!(bench.read(Register::QueueReady), 1);
}

#[test]
fn what_is_agreed_on_cannot_be_changed() {
    let bench = Bench::new();
    bench.write(Register::DriverFeatures, 1 << 5);
    assert_eq!(
        lock(&bench.transport.registers).driver_features,
        0,
        "before DRIVER"
    );
    bench.bring_up();
    let before = lock(&bench.transport.registers).clone();
    bench.write(Register::DriverFeaturesSel, 0);
    bench.write(Register::DriverFeatures, 0);
    for index in 0..2 {
        bench.set_up_queue(index, 8, [0x4000, 0x5000, 0x6000]);
        bench.write(Register::QueueReady, 0);
    }
    bench.write(Register::Status, 7);
    let after = lock(&bench.transport.registers).clone();
    assert_eq!(after.queues, before.queues);
    assert_eq!(after.driver_features, before.driver_features);
    assert_eq!(after.status, 15);
}

#[test]
fn reset_gives_back_and_forgets() {
    let bench = Bench::new();
    bench.bring_up();
    bench.transport.interrupt.queue(0);
    bench.write(Register::Status, 0);
    assert_eq!(bench.read(Register::Status), 0);
    assert_eq!(bench.read(Register::InterruptStatus), 0);
    assert!(
        lock(&bench.transport.slot).device.reset().is_none(),
        "gave nothing back"
    );
    assert_eq!(
        *lock(&bench.transport.registers),
        TransportState::new(&SIZES)
    );
    bench.transport.kick(0);
    assert_eq!(Seen::count(&bench.seen.kicks), 0);
    bench.bring_up();
    assert_eq!(Seen::count(&bench.seen.activations), 2);
    assert_eq!(Seen::count(&bench.seen.wrong), 0);
}

#[test]
fn a_device_that_fails_or_panics_needs_a_reset_and_gets_well_by_it() {
    for mood in [Mood::Error, Mood::Panic] {
        let bench = Bench::new();
        bench.bring_up();
        *bench.mood.lock().unwrap() = mood;
        let generation = bench.read(Register::ConfigGeneration);
        bench.transport.kick(0);
        assert_eq!(bench.read(Register::Status), 15 | STATUS_NEEDS_RESET);
        assert_eq!(bench.read(Register::InterruptStatus), 2);
        assert_ne!(bench.read(Register::ConfigGeneration), generation);
        bench.transport.kick(0);
        assert_eq!(
            Seen::count(&bench.seen.kicks),
            1,
            "left alone after its failure"
        );
        bench.write(Register::Status, 0);
        *bench.mood.lock().unwrap() = Mood::Well;
        bench.bring_up();
        assert_eq!(bench.read(Register::Status), 15);
        bench.transport.kick(0);
        assert_eq!(Seen::count(&bench.seen.kicks), 2);
    }
}

#[test]
fn a_notify_that_no_ioeventfd_took_reaches_the_worker() {
    let bench = Bench::new();
    bench.write(Register::QueueNotify, 1);
    assert_eq!(bench.transport.kicks()[1].read().unwrap(), 1);
    assert!(bench.transport.kicks()[0].read().is_err());
    bench.write(Register::QueueNotify, 2);
    bench.write(Register::QueueNotify, u32::MAX);
    assert!(
        bench
            .transport
            .kicks()
            .iter()
            .all(|kick| kick.read().is_err())
    );
}

#[test]
fn config_space_reads_at_any_width_and_registers_at_theirs_only() {
    let bench = Bench::new();
    let mut data = [0xaa; 8];
    bench.transport.read(CONFIG + 3, &mut data);
    assert_eq!(data, [4, 5, 6, 0, 0, 0, 0, 0]);
    bench.transport.read(CONFIG, &mut data[..1]);
    assert_eq!(data[0], 1);
    let mut data = [0xaa; 2];
    bench.transport.read(0, &mut data);
    assert_eq!(data, [0, 0]);
    bench.transport.write(CONFIG, &[1; 8]);
    bench.transport.write(Register::Status as u64, &[1]);
    bench.transport.write(Register::Status as u64 + 2, &[1; 4]);
    assert_eq!(bench.read(Register::Status), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Kick(usize),
    Mood(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let width = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    let value = prop_oneof![
        any::<u32>(),
        0..20u32,
        prop_oneof![
            Just(0x1000u32),
            Just(0x2000),
            Just(0x3000),
            Just(MEMORY as u32 - 16)
        ],
    ];
    let offset = prop_oneof![(0..0x120u64).prop_map(|at| at & !3), 0..WINDOW];
    prop_oneof![
        8 => (offset.clone(), value).prop_map(|(at, value)| Step::Write(at, value.to_le_bytes().to_vec())),
        3 => prop::sample::select(vec![0u32, 1, 3, 11, 15])
            .prop_map(|status| Step::Write(0x70, status.to_le_bytes().to_vec())),
        1 => (offset.clone(), prop::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, data)| Step::Write(at, data)),
        2 => (offset, width).prop_map(|(at, width)| Step::Read(at, width)),
        1 => (0..4usize).prop_map(Step::Kick),
        1 => any::<bool>().prop_map(Step::Mood),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_accesses_breaks_the_state_machine(
        start_up in any::<bool>(),
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let bench = Bench::new();
        if start_up {
            bench.bring_up();
        }
        for step in steps {
            match step {
                Step::Write(at, data) => bench.transport.write(at, &data),
                Step::Read(at, width) => bench.transport.read(at, &mut vec![0; width]),
                Step::Kick(queue) => bench.transport.kick(queue),
                Step::Mood(well) => {
                    *bench.mood.lock().unwrap() = if well { Mood::Well } else { Mood::Error };
                }
            }
            let status = bench.read(Register::Status);
            for (bit, before) in [(2, 1), (8, 2), (4, 8)] {
                prop_assert!(status & bit == 0 || status & before != 0, "status {:#x}", status);
            }
            let registers = lock(&bench.transport.registers).clone();
            prop_assert!(status & 8 == 0 || registers.driver_features & !FEATURES == 0);
            let active = lock(&bench.transport.slot).active;
            let failed = status & STATUS_NEEDS_RESET != 0;
            prop_assert_eq!(active || failed, status & 4 != 0 , "status {:#x}", status);
            prop_assert_eq!(Seen::count(&bench.seen.wrong), 0);
        }
    }
}
