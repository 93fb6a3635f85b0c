//! The frame of a state file: magic, format, length, digest, and then the message.

use std::fs::File;
use std::os::unix::fs::FileExt;

use cella_proto::snapshot::MachineState;
use protobuf::Message;
use sha2::{Digest, Sha256};

use super::SnapshotError;

const MAGIC: [u8; 8] = *b"CELLASNP";
/// Raised with every change of what the message means.
const FORMAT: u32 = 2;
const DIGEST_BYTES: usize = 32;
const HEADER_BYTES: usize = MAGIC.len() + 4 + 4 + DIGEST_BYTES;
/// The most that a state can have: 32 vCPUs of about 10 KiB each, and some devices. A guest may hold as many files of a shared
/// directory as the VMM has descriptors, half a million, each with its name.
const MAX_STATE: u64 = 64 << 20;
/// The version that a state file names.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Writes `state` to an empty `file`.
///
/// # Errors
/// The message is too long, or the file cannot be written.
pub fn write(file: &File, state: &MachineState) -> Result<(), SnapshotError> {
    let message = state.write_to_bytes().map_err(SnapshotError::Content)?;
    let len = u32::try_from(message.len())
        .ok()
        .filter(|&len| u64::from(len) <= MAX_STATE)
        .ok_or(SnapshotError::Part {
            what: "a state that is not too long",
        })?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(message.len()));
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&Sha256::digest(&message));
    bytes.extend_from_slice(&message);
    file.write_all_at(&bytes, 0)
        .map_err(SnapshotError::io("writing the snapshot's state"))
}

/// Reads a state from `file`, and checks that it is whole and of this VMM.
///
/// # Errors
/// See [`SnapshotError`].
pub fn read(file: &File) -> Result<MachineState, SnapshotError> {
    let io = || SnapshotError::io("reading the snapshot's state");
    let found = file.metadata().map_err(io())?.len();
    let mut header = [0; HEADER_BYTES];
    if found < HEADER_BYTES as u64 {
        return Err(SnapshotError::Magic);
    }
    file.read_exact_at(&mut header, 0).map_err(io())?;
    let (len, digest) = parse(&header)?;
    let expected = u64::from(len).saturating_add(HEADER_BYTES as u64);
    if found != expected || u64::from(len) > MAX_STATE {
        return Err(SnapshotError::Length { found, expected });
    }
    let mut message = vec![0; len as usize];
    file.read_exact_at(&mut message, HEADER_BYTES as u64)
        .map_err(io())?;
    if Sha256::digest(&message).as_slice() != digest {
        return Err(SnapshotError::Digest);
    }
    let state = MachineState::parse_from_bytes(&message).map_err(SnapshotError::Content)?;
    if state.vmm_version != VERSION {
        return Err(SnapshotError::Version {
            found: state.vmm_version,
            expected: VERSION,
        });
    }
    Ok(state)
}

fn parse(header: &[u8; HEADER_BYTES]) -> Result<(u32, [u8; DIGEST_BYTES]), SnapshotError> {
    let rest = header.strip_prefix(&MAGIC).ok_or(SnapshotError::Magic)?;
    let (format, rest) = rest.split_first_chunk().ok_or(SnapshotError::Magic)?;
    let (len, rest) = rest.split_first_chunk().ok_or(SnapshotError::Magic)?;
    let digest = rest.first_chunk().ok_or(SnapshotError::Magic)?;
    let found = u32::from_le_bytes(*format);
    if found != FORMAT {
        return Err(SnapshotError::Format {
            found,
            expected: FORMAT,
        });
    }
    Ok((u32::from_le_bytes(*len), *digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let state = MachineState {
            vmm_version: VERSION.to_owned(),
            memory_bytes: 7,
            ..MachineState::default()
        };
        write(&file, &state).unwrap();
        assert_eq!(read(&file).unwrap(), state);
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (file, bytes)
    }

    fn read_bytes(bytes: &[u8]) -> SnapshotError {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        read(&file).unwrap_err()
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_refused() {
        let (_, bytes) = written();
        for len in 0..bytes.len() {
            let error = read_bytes(&bytes[..len]);
            let expected = matches!(error, SnapshotError::Magic | SnapshotError::Length { .. });
            assert!(expected, "{len} bytes: {error}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(read_bytes(&longer), SnapshotError::Length { .. }));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut altered = bytes.clone();
                altered[at] ^= 1 << bit;
                let error = read_bytes(&altered);
                let expected = match at {
                    0..8 => matches!(error, SnapshotError::Magic),
                    8..12 => matches!(error, SnapshotError::Format { .. }),
                    12..16 => matches!(error, SnapshotError::Length { .. }),
                    _ => matches!(error, SnapshotError::Digest),
                };
                assert!(expected, "byte {at}, bit {bit}: {error}");
            }
        }
    }

    #[test]
    fn another_version_is_refused_with_both_versions() {
        let file = tempfile::tempfile().unwrap();
        let state = MachineState {
            vmm_version: "0.0.1-other".to_owned(),
            ..MachineState::default()
        };
        write(&file, &state).unwrap();
        let message = read(&file).unwrap_err().to_string();
        assert!(
            message.contains("0.0.1-other") && message.contains(VERSION),
            "{message}"
        );
    }

    #[test]
    fn a_right_digest_does_not_make_a_message() {
        let message = [0xff; 9];
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&9_u32.to_le_bytes());
        bytes.extend_from_slice(&Sha256::digest(message));
        bytes.extend_from_slice(&message);
        assert!(matches!(read_bytes(&bytes), SnapshotError::Content(_)));
    }
}
