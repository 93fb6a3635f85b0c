//! The XSAVE area: which component is where, and how `XSAVE` and `XRSTOR` merge two areas in the standard format
//! (Intel SDM volume 1, chapter 13).

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;

/// Bytes of the legacy region and the header, which every area has.
pub const MIN_AREA_BYTES: usize = 576;
/// Bytes of an area as `KVM_GET_XSAVE` gives it.
pub const KVM_AREA_BYTES: usize = 4096;

const XSTATE_BV: Range<usize> = 512..520;
/// XCOMP_BV and what is reserved: zero in the standard format.
const HEADER_ZEROES: Range<usize> = 520..576;

const X87: u64 = 1;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const FIRST_EXTENDED: u32 = 2;

/// x87 registers, without MXCSR, which lies among them.
const X87_HEAD: Range<usize> = 0..24;
const X87_REGISTERS: Range<usize> = 32..160;
const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const SSE_REGISTERS: Range<usize> = 160..416;
/// Selectors above the 32-bit instruction and data pointers, which are upper halves in the wide form.
const POINTER_UPPER_HALVES: [Range<usize>; 2] = [12..16, 20..24];

/// The x87 control word and MXCSR after reset.
const INITIAL_FCW: [u8; 2] = 0x37fu16.to_le_bytes();
const INITIAL_MXCSR: u32 = 0x1f80;
/// Bits of MXCSR that every 64-bit processor has.
const MXCSR_BITS: u32 = 0xffff;

/// `XRSTOR` of an area that is not valid: #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// Where the extended components lie (CPUID leaf 0xD).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bit `i`: component `i` exists, as in XCR0.
    mask: u64,
    /// Component, and its bytes in the area.
    extended: Vec<(u32, Range<usize>)>,
}

impl Layout {
    /// The host's layout, which is the guest's: a guest without hardware virtualization sees the host's CPUID.
    /// Components that do not fit into what KVM gives (they need a permission that nobody asked for) are left out.
    pub fn of_host() -> Self {
        let leaf = __cpuid_count(0xd, 0);
        let supported = u64::from(leaf.eax) | u64::from(leaf.edx) << 32;
        Self::new(supported, |component| {
            let leaf = __cpuid_count(0xd, component);
            (leaf.ebx, leaf.eax)
        })
    }

    /// The layout of the components in `supported`; `place` tells a component's offset and size.
    fn new(supported: u64, place: impl Fn(u32) -> (u32, u32)) -> Self {
        let mut mask = supported & (X87 | SSE);
        let mut extended = Vec::new();
        for component in FIRST_EXTENDED..63 {
            if supported & (1 << component) == 0 {
                continue;
            }
            let (offset, size) = place(component);
            let (start, end) = (offset as usize, offset as usize + size as usize);
            if size > 0 && start >= MIN_AREA_BYTES && end <= KVM_AREA_BYTES {
                mask |= 1 << component;
                extended.push((component, start..end));
            }
        }
        Self { mask, extended }
    }

    /// The components of `requested` that exist.
    pub fn existing(&self, requested: u64) -> u64 {
        requested & self.mask
    }

    /// Bytes of the area up to the last of `components`.
    pub fn extent(&self, components: u64) -> usize {
        self.of(components)
            .map(|range| range.end)
            .fold(MIN_AREA_BYTES, usize::max)
    }

    /// Every range of the area that belongs to `components`, MXCSR aside.
    fn of(&self, components: u64) -> impl Iterator<Item = Range<usize>> + '_ {
        let x87 = (components & X87 != 0).then_some([X87_HEAD, X87_REGISTERS]);
        let sse = (components & SSE != 0).then_some(SSE_REGISTERS);
        let extended = self
            .extended
            .iter()
            .filter(move |(component, _)| components & (1 << component) != 0)
            .map(|(_, range)| range.clone());
        x87.into_iter().flatten().chain(sse).chain(extended)
    }
}

/// The components that an area's header says are in use.
pub fn in_use(area: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    if let Some(field) = area.get(XSTATE_BV) {
        bytes.copy_from_slice(field);
    }
    u64::from_le_bytes(bytes)
}

fn set_in_use(area: &mut [u8], components: u64) {
    copy(area, XSTATE_BV, &components.to_le_bytes());
}

/// `XSAVE` of `components` from the processor's `state` to `area`, which is as long as their extent. Everything
/// else of the area stays. `wide`: the instruction had `REX.W`.
pub fn save(area: &mut [u8], state: &[u8], components: u64, layout: &Layout, wide: bool) {
    let used = in_use(state);
    for component in bits(components) {
        for range in layout.of(component) {
            if used & component != 0 {
                copy_range(area, state, range);
            } else {
                fill_initial(area, range);
            }
        }
    }
    if components & (SSE | AVX) != 0 {
        copy_range(area, state, MXCSR_AND_MASK);
    }
    if components & X87 != 0 && !wide {
        for range in POINTER_UPPER_HALVES {
            fill(area, range);
        }
    }
    let kept = in_use(area) & !components;
    set_in_use(area, kept | (used & components));
}

/// `XRSTOR` of `components` from `area` to the processor's `state`.
///
/// # Errors
/// The area is none that the instruction takes.
pub fn restore(
    state: &mut [u8],
    area: &[u8],
    components: u64,
    layout: &Layout,
) -> Result<(), Invalid> {
    let given = check(area, layout)?;
    let mxcsr = mxcsr(area)?;
    for component in bits(components) {
        for range in layout.of(component) {
            if given & component != 0 {
                copy_range(state, area, range);
            } else {
                fill_initial(state, range);
            }
        }
    }
    let mut used = (in_use(state) & !components) | (given & components);
    if components & (SSE | AVX) != 0 {
        copy_range(state, area, MXCSR);
        // KVM takes MXCSR only with a component that uses it.
        if mxcsr != INITIAL_MXCSR && used & SSE == 0 {
            fill(state, SSE_REGISTERS);
            used |= SSE;
        }
    }
    set_in_use(state, used);
    Ok(())
}

/// The components that `area` holds, if its header is valid.
fn check(area: &[u8], layout: &Layout) -> Result<u64, Invalid> {
    let zeroes = area.get(HEADER_ZEROES).ok_or(Invalid)?;
    let given = in_use(area);
    if given & !layout.mask != 0 || zeroes.iter().any(|byte| *byte != 0) {
        return Err(Invalid);
    }
    Ok(given)
}

fn mxcsr(area: &[u8]) -> Result<u32, Invalid> {
    let field = area.get(MXCSR).and_then(|bytes| bytes.try_into().ok());
    let value = u32::from_le_bytes(field.ok_or(Invalid)?);
    if value & !MXCSR_BITS != 0 {
        return Err(Invalid);
    }
    Ok(value)
}

fn bits(mask: u64) -> impl Iterator<Item = u64> {
    (0..64)
        .map(|bit| 1 << bit)
        .filter(move |bit| mask & bit != 0)
}

fn copy_range(to: &mut [u8], from: &[u8], range: Range<usize>) {
    if let Some(from) = from.get(range.clone()) {
        copy(to, range, from);
    }
}

fn copy(to: &mut [u8], range: Range<usize>, from: &[u8]) {
    if let Some(to) = to.get_mut(range) {
        to.copy_from_slice(from);
    }
}

/// Every component starts as zeroes, but for the x87 control word.
fn fill_initial(area: &mut [u8], range: Range<usize>) {
    let head = range == X87_HEAD;
    fill(area, range);
    if head {
        copy(area, 0..2, &INITIAL_FCW);
    }
}

fn fill(area: &mut [u8], range: Range<usize>) {
    if let Some(bytes) = area.get_mut(range) {
        bytes.fill(0);
    }
}

#[cfg(test)]
mod tests;
