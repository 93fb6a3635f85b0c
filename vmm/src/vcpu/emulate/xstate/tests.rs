//! Saving and restoring against areas whose every component is marked by a byte of its own.

use proptest::prelude::*;

use super::*;

/// x87, SSE, AVX at 576 and a component 9 of 8 bytes behind it.
fn layout() -> Layout {
    Layout::new(0x207, |component| match component {
        2 => (576, 256),
        _ => (832, 8),
    })
}

const SIZE: usize = 840;

/// An area with x87 filled with `mark`, SSE with `mark + 1`, AVX with `mark + 2`, component 9 with `mark + 3`.
fn area(mark: u8, used: u64) -> Vec<u8> {
    let mut area = vec![0xee; SIZE];
    area[X87_HEAD].fill(mark);
    area[X87_REGISTERS].fill(mark);
    area[MXCSR].copy_from_slice(&0x1fa0u32.to_le_bytes());
    area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    area[SSE_REGISTERS].fill(mark + 1);
    area[576..832].fill(mark + 2);
    area[832..840].fill(mark + 3);
    area[XSTATE_BV].copy_from_slice(&used.to_le_bytes());
    area[HEADER_ZEROES].fill(0);
    area
}

fn all(bytes: &[u8], value: u8) -> bool {
    bytes.iter().all(|byte| *byte == value)
}

#[test]
fn saving_writes_the_requested_components_and_nothing_else() {
    let state = area(0x10, 0x207);
    let mut saved = area(0x80, 0x201);
    save(&mut saved, &state, SSE | AVX, &layout(), true);
    assert!(all(&saved[X87_HEAD], 0x80), "x87 was not asked for");
    assert!(all(&saved[X87_REGISTERS], 0x80));
    assert_eq!(saved[MXCSR], 0x1fa0u32.to_le_bytes());
    assert!(all(&saved[SSE_REGISTERS], 0x11));
    assert!(all(&saved[416..512], 0xee), "reserved for software");
    assert!(all(&saved[576..832], 0x12));
    assert!(all(&saved[832..840], 0x83), "component 9 was not asked for");
    assert_eq!(
        in_use(&saved),
        0x207,
        "what was not asked for keeps its bit"
    );
    assert!(all(&saved[HEADER_ZEROES], 0));
}

#[test]
fn saving_a_component_in_its_initial_state_clears_it_and_its_bit() {
    let state = area(0x10, SSE);
    let mut saved = area(0x80, 0x207);
    save(&mut saved, &state, 0x207, &layout(), true);
    assert_eq!(in_use(&saved), SSE);
    assert_eq!(&saved[..4], b"\x7f\x03\x00\x00", "FCW");
    assert!(all(&saved[4..24], 0));
    assert!(all(&saved[X87_REGISTERS], 0));
    assert!(all(&saved[SSE_REGISTERS], 0x11));
    assert!(all(&saved[576..840], 0));
}

#[test]
fn the_narrow_form_has_selectors_of_zero_above_the_pointers() {
    let state = area(0x10, 0x207);
    let mut saved = area(0x80, 0);
    save(&mut saved, &state, X87, &layout(), false);
    assert!(all(&saved[8..12], 0x10));
    assert!(all(&saved[12..16], 0));
    assert!(all(&saved[16..20], 0x10));
    assert!(all(&saved[20..24], 0));
    assert_eq!(in_use(&saved), X87);
    assert!(all(&saved[SSE_REGISTERS], 0x81));
}

#[test]
fn restoring_changes_the_requested_components_and_nothing_else() {
    let mut state = area(0x10, 0x207);
    let saved = area(0x80, SSE);
    restore(&mut state, &saved, SSE | AVX, &layout()).unwrap();
    assert!(all(&state[X87_HEAD], 0x10));
    assert!(all(&state[SSE_REGISTERS], 0x81));
    assert!(all(&state[576..832], 0), "initial: not in the area");
    assert!(all(&state[832..840], 0x13));
    assert_eq!(in_use(&state), 0x203);
}

#[test]
fn an_unusual_mxcsr_survives_without_its_component() {
    let mut state = area(0x10, 0x207);
    let saved = area(0x80, AVX);
    restore(&mut state, &saved, SSE | AVX, &layout()).unwrap();
    assert_eq!(state[MXCSR], 0x1fa0u32.to_le_bytes());
    assert!(all(&state[SSE_REGISTERS], 0));
    assert_eq!(in_use(&state) & (SSE | AVX), SSE | AVX);
    // MXCSR as after reset needs no such thing.
    let mut saved = saved;
    saved[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    restore(&mut state, &saved, SSE | AVX, &layout()).unwrap();
    assert_eq!(in_use(&state) & (SSE | AVX), AVX);
}

#[test]
fn what_was_saved_comes_back() {
    let state = area(0x10, 0x207);
    let mut saved = vec![0; SIZE];
    save(&mut saved, &state, 0x207, &layout(), true);
    let mut back = area(0x80, 0x207);
    restore(&mut back, &saved, 0x207, &layout()).unwrap();
    assert_eq!(back, state);
}

#[test]
fn invalid_areas_are_refused() {
    let good = area(0x80, 0x7);
    let mut state = area(0x10, 0x7);
    let mut compact = good.clone();
    compact[527] = 0x80;
    let mut reserved = good.clone();
    reserved[575] = 1;
    let mut mxcsr = good.clone();
    mxcsr[26] = 1;
    let unknown = area(0x80, 0x8);
    for bad in [
        &compact,
        &reserved,
        &mxcsr,
        &unknown,
        &vec![0; 575],
        &vec![],
    ] {
        assert_eq!(restore(&mut state, bad, 0x7, &layout()), Err(Invalid));
    }
    restore(&mut state, &good, 0x7, &layout()).unwrap();
}

#[test]
fn components_beyond_what_kvm_gives_do_not_exist() {
    let layout = Layout::new(0x6_0207, |component| match component {
        2 => (576, 256),
        9 => (832, 8),
        17 => (2752, 64),
        _ => (2816, 8192),
    });
    assert_eq!(layout.existing(u64::MAX), 0x2_0207);
    assert_eq!(layout.extent(0), 576);
    assert_eq!(layout.extent(0x3), 576);
    assert_eq!(layout.extent(0x7), 832);
    assert_eq!(layout.extent(0x2_0000), 2816);
}

#[test]
fn this_host_has_a_layout() {
    let layout = Layout::of_host();
    assert_eq!(layout.existing(X87 | SSE), X87 | SSE);
    assert!(layout.extent(u64::MAX) <= KVM_AREA_BYTES);
}

#[test]
fn restoring_mxcsr_needs_sse_or_avx_to_be_asked_for() {
    let saved = area(0x80, X87);
    let mut state = area(0x10, 0x7);
    state[MXCSR].copy_from_slice(&INITIAL_MXCSR.to_le_bytes());
    restore(&mut state, &saved, X87, &layout()).unwrap();
    assert_eq!(state[MXCSR], INITIAL_MXCSR.to_le_bytes());
    assert!(all(&state[X87_REGISTERS], 0x80));
    assert!(all(&state[SSE_REGISTERS], 0x11));
    // AVX alone brings MXCSR, but no SSE register.
    restore(&mut state, &saved, AVX, &layout()).unwrap();
    assert_eq!(state[MXCSR], 0x1fa0u32.to_le_bytes());
    assert!(all(&state[SSE_REGISTERS], 0x11));
}

#[test]
fn saving_nothing_writes_no_register() {
    let state = area(0x10, 0x207);
    let before = area(0x80, 0x201);
    let mut saved = before.clone();
    save(&mut saved, &state, 0, &layout(), true);
    assert_eq!(saved, before);
}

/// Which component a byte of an area belongs to, after the figures of the SDM (volume 1, section 13.4); 0 for
/// MXCSR, the header and what is reserved.
fn owner(at: usize) -> u64 {
    match at {
        0..24 | 32..160 => X87,
        160..416 => SSE,
        576..832 => AVX,
        832..840 => 0x200,
        _ => 0,
    }
}

fn any_area() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(any::<u8>(), SIZE), 0..0x208u64).prop_map(|(mut area, used)| {
        area[XSTATE_BV].copy_from_slice(&(used & 0x207).to_le_bytes());
        area[HEADER_ZEROES].fill(0);
        area[26..28].fill(0);
        area
    })
}

proptest! {
    #[test]
    fn saving_takes_each_byte_from_where_it_belongs(
        before in any_area(),
        state in any_area(),
        components in 0..0x208u64,
    ) {
        let components = components & 0x207;
        let mut saved = before.clone();
        save(&mut saved, &state, components, &layout(), true);
        for at in (0..24).chain(32..512).chain(576..SIZE) {
            let expected = match owner(at) & components {
                0 => before[at],
                owner if in_use(&state) & owner != 0 => state[at],
                // FCW starts as 0x37f, all else as zero.
                _ => *[0x7f, 0x03].get(at).unwrap_or(&0),
            };
            prop_assert_eq!(saved[at], expected, "byte {}", at);
        }
        let used = in_use(&before) & !components | in_use(&state) & components;
        prop_assert_eq!(in_use(&saved), used);
    }

    #[test]
    fn what_was_saved_is_restored(
        state in any_area(),
        other in any_area(),
        before in any_area(),
        components in 0..0x208u64,
    ) {
        let components = components & 0x207;
        let mut saved = before;
        save(&mut saved, &state, components, &layout(), true);
        let mut back = other.clone();
        restore(&mut back, &saved, components, &layout()).unwrap();
        for at in (0..24).chain(32..512).chain(576..SIZE) {
            let expected = match owner(at) & components {
                0 => continue,
                owner if in_use(&state) & owner != 0 => state[at],
                _ => *[0x7f, 0x03].get(at).unwrap_or(&0),
            };
            prop_assert_eq!(back[at], expected, "byte {}", at);
        }
    }

    #[test]
    fn no_area_makes_it_panic(
        mut state in any_area(),
        area in prop::collection::vec(any::<u8>(), 0..SIZE + 8),
        components in any::<u64>(),
    ) {
        let before = state.clone();
        let components = layout().existing(components);
        if restore(&mut state, &area, components, &layout()).is_err() {
            prop_assert_eq!(&state, &before, "refused, but changed");
        }
        let mut short = area;
        save(&mut short, &state, components, &layout(), false);
    }
}
