//! How much memory the process has resident, guest memory apart.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::ops::Range;

/// Resident memory in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Of the VMM: code, heap, stacks.
    pub vmm_kib: u64,
    /// Of the guest's memory, as far as it is mapped here.
    pub guest_kib: u64,
}

/// Adds up the mappings in `smaps`, an open `/proc/self/smaps`: those inside of one of `guest`'s address
/// ranges are the guest's, all others the VMM's.
///
/// # Errors
/// The file cannot be read, or is not in the format of proc(5).
pub fn resident(smaps: &mut File, guest: &[Range<u64>]) -> io::Result<Resident> {
    smaps.seek(SeekFrom::Start(0))?;
    add_up(BufReader::new(smaps), guest)
}

fn add_up(smaps: impl BufRead, guest: &[Range<u64>]) -> io::Result<Resident> {
    let malformed = |line: &str| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("cannot understand the line {line:?}"),
        )
    };
    let mut total = Resident::default();
    let mut of_guest = None;
    for line in smaps.lines() {
        let line = line?;
        let Some((key, rest)) = line.split_once(' ') else {
            continue;
        };
        if key == "Rss:" {
            let kib = rest
                .trim()
                .strip_suffix(" kB")
                .and_then(|kib| kib.parse::<u64>().ok());
            let (Some(kib), Some(of_guest)) = (kib, of_guest) else {
                return Err(malformed(&line));
            };
            let sum = match of_guest {
                true => &mut total.guest_kib,
                false => &mut total.vmm_kib,
            };
            *sum = sum.saturating_add(kib);
        } else if let Some(mapping) = addresses(key) {
            let inside =
                |range: &Range<u64>| range.start <= mapping.start && mapping.end <= range.end;
            of_guest = Some(guest.iter().any(inside));
        }
    }
    match of_guest {
        Some(_) => Ok(total),
        None => Err(malformed("")),
    }
}

/// The addresses of a mapping's first line, `5581f0a00000-5581f0a21000`.
fn addresses(text: &str) -> Option<Range<u64>> {
    let (start, end) = text.split_once('-')?;
    let parse = |hex| u64::from_str_radix(hex, 16).ok();
    Some(parse(start)?..parse(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
5581f0a00000-5581f0a21000 r-xp 00000000 08:01 131 /usr/libexec/cella/cella-vmm
Size:                132 kB
Rss:                 120 kB
Pss:                  60 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0008000000 rw-s 00000000 00:01 7 /memfd:guest (deleted)
Size:             131072 kB
Rss:               20480 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Rss:                  16 kB
";

    #[test]
    fn guest_memory_is_counted_apart() {
        let guest = std::slice::from_ref(&(0x7f00_0000_0000..0x7f00_0800_0000));
        let got = add_up(SMAPS.as_bytes(), guest).unwrap();
        assert_eq!((got.vmm_kib, got.guest_kib), (136, 20480));
        let got = add_up(SMAPS.as_bytes(), &[]).unwrap();
        assert_eq!((got.vmm_kib, got.guest_kib), (20616, 0));
    }

    #[test]
    fn what_is_no_smaps_is_an_error() {
        for text in [
            "",
            "nonsense\n",
            "Rss: 5 kB\n",
            "1-2 r\nRss: many kB\n",
            "1-2 r\nRss: 5 MB\n",
        ] {
            assert!(add_up(text.as_bytes(), &[]).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_own_process_has_some() {
        let mut smaps = File::open("/proc/self/smaps").unwrap();
        for _ in 0..2 {
            let got = resident(&mut smaps, &[]).unwrap();
            assert!(got.vmm_kib > 100, "{got:?}");
        }
    }
}
