//! The Intel MultiProcessor table (specification 1.4): how a kernel without ACPI finds its processors, the
//! IOAPIC and the interrupt lines.

use vm_memory::GuestMemoryMmap;

use super::{BootError, layout};

const SPEC_REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

// Entry types (section 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

// Interrupt types (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// A generic family 6; the kernel goes by CPUID.
const CPU_SIGNATURE: u32 = 0x600;
/// FPU and APIC on chip.
const CPU_FEATURES: u32 = 0x201;
const IOAPIC_ENABLED: u8 = 1;
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 0xff;
/// The 8259 cascade: no device interrupts there.
const CASCADE_LINE: u8 = 2;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

pub(super) fn write(memory: &GuestMemoryMmap, vcpus: u32) -> Result<(), BootError> {
    super::write(memory, "MP table", &build(vcpus), layout::MP_TABLE)
}

/// Floating pointer and table for `vcpus` processors, whose APIC ids are their indices.
fn build(vcpus: u32) -> Vec<u8> {
    // At most MAX_VCPUS, 32.
    let vcpus = vcpus.min(layout::MAX_VCPUS) as u8;
    let (count, entries) = entries(vcpus);
    let length = HEADER_BYTES + entries.len();

    let mut header = Vec::with_capacity(length);
    header.extend(b"PCMP");
    header.extend((length as u16).to_le_bytes());
    header.extend([SPEC_REVISION, 0]);
    header.extend(b"CELLA   ");
    header.extend(b"MICROVM     ");
    // No OEM table.
    header.extend([0; 6]);
    header.extend(count.to_le_bytes());
    header.extend(layout::LAPIC_ADDRESS.to_le_bytes());
    // No extended table.
    header.extend([0; 4]);
    header.extend(entries);
    header[7] = checksum(&header);

    let mut pointer = Vec::with_capacity(POINTER_BYTES + length);
    pointer.extend(b"_MP_");
    let table = layout::MP_TABLE as u32 + POINTER_BYTES as u32;
    pointer.extend(table.to_le_bytes());
    pointer.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend(header);
    pointer
}

/// The table's entries and how many they are.
fn entries(vcpus: u8) -> (u16, Vec<u8>) {
    let mut count = 0;
    let mut bytes = Vec::new();
    let mut add = |entry: &[u8]| {
        count += 1;
        bytes.extend_from_slice(entry);
    };
    for id in 0..vcpus {
        let flags = if id == 0 {
            CPU_ENABLED | CPU_BOOT
        } else {
            CPU_ENABLED
        };
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
        entry.extend(CPU_SIGNATURE.to_le_bytes());
        entry.extend(CPU_FEATURES.to_le_bytes());
        entry.extend([0; 8]);
        add(&entry);
    }
    let mut bus = vec![BUS, ISA_BUS];
    bus.extend(b"ISA   ");
    add(&bus);
    // The first id that no processor has.
    let ioapic_id = vcpus;
    let mut ioapic = vec![IOAPIC, ioapic_id, IOAPIC_VERSION, IOAPIC_ENABLED];
    ioapic.extend(layout::IOAPIC_ADDRESS.to_le_bytes());
    add(&ioapic);
    // Every line is an ISA line, so that it is edge-triggered and active high, as irqfd signals.
    for line in (0..=layout::LAST_GSI as u8).filter(|line| *line != CASCADE_LINE) {
        add(&[INTERRUPT, INT, 0, 0, ISA_BUS, line, ioapic_id, line]);
    }
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, ALL_APICS, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);
    (count, bytes)
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn the_table_of_two_processors_is_as_the_specification_has_it() {
        let table = build(2);
        let (pointer, table) = table.split_at(POINTER_BYTES);
        assert_eq!(&pointer[..10], b"_MP_\x10\xfc\x09\x00\x01\x04");
        assert_eq!(sum(pointer), 0);
        assert_eq!(sum(table), 0);
        assert_eq!(&table[..4], b"PCMP");
        assert_eq!(
            usize::from(u16::from_le_bytes([table[4], table[5]])),
            table.len()
        );
        // Two processors, a bus, an IOAPIC, 23 lines, two local interrupts.
        assert_eq!(
            u16::from_le_bytes([table[34], table[35]]),
            2 + 1 + 1 + 23 + 2
        );
        assert_eq!(table[36..40], 0xfee0_0000u32.to_le_bytes());
        assert_eq!(table[44..48], [PROCESSOR, 0, 0x14, 3], "boot processor");
        assert_eq!(table[64..68], [PROCESSOR, 1, 0x14, 1], "second processor");
        assert_eq!(&table[84..92], b"\x01\x00ISA   ");
        assert_eq!(&table[92..100], b"\x02\x02\x11\x01\x00\x00\xc0\xfe");
        assert_eq!(&table[100..108], &[3, 0, 0, 0, 0, 0, 2, 0], "line 0");
        assert_eq!(&table[116..124], &[3, 0, 0, 0, 0, 3, 2, 3], "no line 2");
        assert_eq!(table.len(), 44 + 2 * 20 + 8 + 8 + 23 * 8 + 2 * 8);
    }

    #[test]
    fn the_largest_table_fits() {
        for vcpus in 1..=layout::MAX_VCPUS {
            assert!(build(vcpus).len() <= layout::MP_TABLE_BYTES, "{vcpus}");
        }
    }
}
