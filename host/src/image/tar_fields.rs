//! The fields of tar headers, and the extended headers that overrule them.

use super::tar_reader::{Kind, TarEntry, TarError, Time};

/// The prefix of pax records that carry extended attributes.
const PAX_XATTR: &[u8] = b"SCHILY.xattr.";
/// Extended attributes of one entry; files in use have one or two.
const XATTRS: usize = 128;

/// What extended headers say about the entry that follows them.
#[derive(Debug, Default)]
pub(super) struct Extension {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<Time>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extension {
    /// Adds the content of an extended header of type `flag`.
    pub fn add(&mut self, flag: u8, content: &[u8]) -> Result<(), TarError> {
        match flag {
            b'L' => self.name = Some(until_zero(content).to_vec()),
            b'K' => self.link = Some(until_zero(content).to_vec()),
            b'x' => return self.add_pax(content),
            // Global headers carry comments (git) in practice; docker and containerd ignore them.
            _ => {}
        }
        Ok(())
    }

    /// Pax records: `LENGTH KEY=VALUE\n`, the length that of the whole record.
    fn add_pax(&mut self, mut content: &[u8]) -> Result<(), TarError> {
        let bad = || malformed("a pax header is not made of 'LENGTH KEY=VALUE' records");
        while !content.is_empty() {
            let space = content
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or_else(bad)?;
            let digits = content.get(..space).ok_or_else(bad)?;
            let length = decimal(digits)
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(bad)?;
            let (record, rest) = content.split_at_checked(length).ok_or_else(bad)?;
            let record = record.get(space.saturating_add(1)..).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or_else(bad)?;
            let (key, value) = record.split_at_checked(equals).ok_or_else(bad)?;
            self.add_record(key, value.get(1..).unwrap_or_default())?;
            content = rest;
        }
        Ok(())
    }

    fn add_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        let number = |what: &str| {
            decimal(value).ok_or_else(|| malformed(&format!("a pax header's {what} is no number")))
        };
        match key {
            b"path" => self.name = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number("size")?),
            b"uid" => self.uid = Some(number("uid")?),
            b"gid" => self.gid = Some(number("gid")?),
            b"mtime" => {
                let time = time(value).ok_or_else(|| malformed("a pax header's mtime is no time"));
                self.mtime = Some(time?);
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(malformed("sparse files are not supported"));
            }
            _ => {
                if let Some(name) = key.strip_prefix(PAX_XATTR) {
                    if self.xattrs.len() >= XATTRS {
                        return Err(TarError::Limit(format!("{XATTRS} extended attributes")));
                    }
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

/// The entry that `header` describes, `extension` applied; `size` is the header's own.
pub(super) fn entry(
    header: &tar::Header,
    extension: Extension,
    size: u64,
) -> Result<TarEntry, TarError> {
    let old = header.as_old();
    let id = |overruled: Option<u64>, field: &[u8], what: &str| -> Result<u32, TarError> {
        let id = match overruled {
            Some(id) => id,
            None => unsigned(field, what)?,
        };
        // The last number means "leave as it is" to chown.
        u32::try_from(id)
            .ok()
            .filter(|id| *id != u32::MAX)
            .ok_or_else(|| malformed(&format!("the {what} {id} is out of range")))
    };
    let name = extension
        .name
        .unwrap_or_else(|| header.path_bytes().into_owned());
    let kind = kind(header, &name);
    let has_content = matches!(kind, Kind::File | Kind::Other(_));
    let is_link = matches!(kind, Kind::HardLink | Kind::Symlink);
    let link = extension
        .link
        .unwrap_or_else(|| until_zero(&old.linkname).to_vec());
    let mtime = match extension.mtime {
        Some(time) => time,
        None => Time {
            seconds: signed(&old.mtime, "mtime")?,
            nanoseconds: 0,
        },
    };
    let device = match kind {
        Kind::Character | Kind::Block => device(header)?,
        _ => (0, 0),
    };
    Ok(TarEntry {
        kind,
        link: if is_link { link } else { Vec::new() },
        mode: u32::try_from(unsigned(&old.mode, "mode")? & 0o7777).unwrap_or(0),
        uid: id(extension.uid, &old.uid, "uid")?,
        gid: id(extension.gid, &old.gid, "gid")?,
        mtime,
        size: if has_content {
            extension.size.unwrap_or(size)
        } else {
            0
        },
        device,
        xattrs: extension.xattrs,
        offset: 0,
        name,
    })
}

/// The size field of a header.
pub(super) fn size(header: &tar::Header) -> Result<u64, TarError> {
    unsigned(&header.as_old().size, "size")
}

/// Compares a header's checksum with the sum of its bytes, the checksum's own counted as blanks.
pub(super) fn verify_checksum(block: &[u8; 512]) -> Result<(), TarError> {
    let header = tar::Header::from_byte_slice(block);
    let field = &header.as_old().cksum;
    let own: u64 = field.iter().map(|byte| u64::from(*byte)).sum();
    let own_signed: i64 = field.iter().map(|byte| i64::from(byte.cast_signed())).sum();
    let blanks = field.len() as u64 * u64::from(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    // Some old writers summed signed bytes.
    let signed: i64 = block.iter().map(|byte| i64::from(byte.cast_signed())).sum();
    let said = unsigned(field, "checksum")?;
    let sum = sum.wrapping_sub(own).wrapping_add(blanks);
    let signed = signed
        .wrapping_sub(own_signed)
        .wrapping_add_unsigned(blanks);
    if said == sum || i64::try_from(said).is_ok_and(|said| said == signed) {
        return Ok(());
    }
    Err(malformed("a header's checksum is wrong"))
}

fn kind(header: &tar::Header, name: &[u8]) -> Kind {
    match header.as_old().linkflag {
        // Before ustar, a directory was a file with a slash behind its name.
        [b'0' | 0 | b'7'] if name.ends_with(b"/") => Kind::Directory,
        [b'0' | 0 | b'7'] => Kind::File,
        [b'1'] => Kind::HardLink,
        [b'2'] => Kind::Symlink,
        [b'3'] => Kind::Character,
        [b'4'] => Kind::Block,
        [b'5'] => Kind::Directory,
        [b'6'] => Kind::Fifo,
        [other] => Kind::Other(other),
    }
}

fn device(header: &tar::Header) -> Result<(u32, u32), TarError> {
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (None, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        (None, None) => return Err(malformed("a device in a format that has no device numbers")),
    };
    let number = |field: &[u8], bits: u32| {
        let number = unsigned(field, "device number")?;
        // The kernel has 12 bits for the major number and 20 for the minor one.
        u32::try_from(number)
            .ok()
            .filter(|number| number >> bits == 0)
            .ok_or_else(|| malformed(&format!("the device number {number} is out of range")))
    };
    Ok((number(major, 12)?, number(minor, 20)?))
}

fn malformed(reason: &str) -> TarError {
    TarError::Malformed(reason.to_owned())
}

fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn unsigned(field: &[u8], what: &str) -> Result<u64, TarError> {
    let number = signed(field, what)?;
    u64::try_from(number).map_err(|_| malformed(&format!("the {what} {number} is negative")))
}

/// A number: octal digits between blanks, nothing for 0, or base 256 where the first bit is set.
fn signed(field: &[u8], what: &str) -> Result<i64, TarError> {
    let number = match field.first() {
        Some(first) if first & 0x80 != 0 => base_256(field),
        _ => octal(field),
    };
    number.ok_or_else(|| malformed(&format!("the {what} field is no number")))
}

fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(field.len());
    let digits = field.get(start..)?.split(blank).next()?;
    digits.iter().try_fold(0i64, |number, digit| {
        let digit = char::from(*digit).to_digit(8)?;
        number.checked_mul(8)?.checked_add(i64::from(digit))
    })
}

/// Two's complement, big endian; the first bit only marks the form, the second is the sign.
fn base_256(field: &[u8]) -> Option<i64> {
    let negative = field.first()? & 0x40 != 0;
    let mut number: i128 = if negative { -1 } else { 0 };
    for (index, byte) in field.iter().enumerate() {
        let byte = match (index, negative) {
            (0, true) => byte | 0x80,
            (0, false) => byte & 0x7f,
            _ => *byte,
        };
        number = number.checked_mul(256)?.checked_add(i128::from(byte))?;
        // Far outside of what fits: stop before the wider type overflows, too.
        i64::try_from(number).ok()?;
    }
    i64::try_from(number).ok()
}

/// Decimal seconds with an optional fraction, as pax has times.
fn time(text: &[u8]) -> Option<Time> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0u32, |number, digit| {
        number
            .wrapping_mul(10)
            .wrapping_add(u32::from(digit.wrapping_sub(b'0')))
    });
    match (negative, nanoseconds) {
        (false, _) => Some(Time {
            seconds,
            nanoseconds,
        }),
        (true, 0) => Some(Time {
            seconds: seconds.checked_neg()?,
            nanoseconds: 0,
        }),
        (true, _) => Some(Time {
            seconds: seconds.checked_neg()?.checked_sub(1)?,
            nanoseconds: 1_000_000_000u32.checked_sub(nanoseconds)?,
        }),
    }
}
