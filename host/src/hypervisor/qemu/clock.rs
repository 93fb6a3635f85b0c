//! The frequency of the host's time stamp counter. Software emulation gives the guest that counter, and a guest that has
//! to measure it takes a tenth of a second and may get it wrong.

use std::time::{Duration, Instant};

/// How far apart two samples must be: their errors of some 50 ns are then 10 parts in a million.
const APART: Duration = Duration::from_millis(5);

/// The counter and the time at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    counter: u64,
    time: Instant,
}

impl Sample {
    /// Now.
    pub(super) fn take() -> Self {
        // Of a few, the one that was disturbed the least.
        let samples = (0..5).map(|_| {
            let time = Instant::now();
            let counter = counter();
            (time.elapsed(), Self { counter, time })
        });
        let best = samples.min_by_key(|(took, _)| *took);
        best.map_or_else(
            || Self {
                counter: counter(),
                time: Instant::now(),
            },
            |(_, sample)| sample,
        )
    }

    /// The frequency from then to now, in kHz.
    pub(super) fn khz(self) -> u64 {
        if let Some(rest) = APART.checked_sub(self.time.elapsed()) {
            std::thread::sleep(rest);
        }
        let now = Self::take();
        let ticks = u128::from(now.counter.wrapping_sub(self.counter));
        let nanos = now.time.duration_since(self.time).as_nanos().max(1);
        u64::try_from(ticks.saturating_mul(1_000_000) / nanos).unwrap_or_default()
    }
}

fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_measurement_agrees() {
        let sample = Sample::take();
        let short = sample.khz();
        std::thread::sleep(Duration::from_millis(100));
        let long = sample.khz();
        assert!(long > 100_000, "{long} kHz");
        assert!(short.abs_diff(long) < long / 500, "{short} and {long} kHz");
    }
}
