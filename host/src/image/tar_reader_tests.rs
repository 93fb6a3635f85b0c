use std::io::Cursor;

use proptest::prelude::*;

use super::*;
use crate::image::testing::Tar;

impl Skip for Cursor<Vec<u8>> {}

fn read_all(bytes: Vec<u8>) -> Result<Vec<(TarEntry, Vec<u8>)>, TarError> {
    let limits = Limits {
        extension_bytes: 4096,
        path_bytes: 300,
        ..Limits::default()
    };
    let mut reader = TarReader::new(Cursor::new(bytes), &limits);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        reader.read_to_end(&mut data)?;
        entries.push((entry, data));
    }
    Ok(entries)
}

fn one(tar: Tar) -> TarEntry {
    read_all(tar.finish()).unwrap().remove(0).0
}

#[test]
fn plain_entries() {
    let tar = Tar::new()
        .dir("d/", 0o1777)
        .file("d/f", b"hello")
        .symlink("l", "d/f")
        .finish();
    let entries = read_all(tar).unwrap();
    let shown: Vec<_> = entries
        .iter()
        .map(|(e, data)| {
            (
                e.name.as_slice(),
                e.kind,
                e.mode,
                e.link.as_slice(),
                data.as_slice(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            (&b"d/"[..], Kind::Directory, 0o1777, &b""[..], &b""[..]),
            (b"d/f", Kind::File, 0o644, b"", b"hello"),
            (b"l", Kind::Symlink, 0o777, b"d/f", b""),
        ]
    );
    assert_eq!(
        entries[1].0.mtime,
        Time {
            seconds: 1_000_000_000,
            nanoseconds: 0
        }
    );
    assert_eq!(entries[1].0.offset, 1024);
}

#[test]
fn content_that_is_not_read_is_skipped() {
    let tar = Tar::new().file("a", &[7; 1000]).file("b", b"x").finish();
    let limits = Limits::default();
    let mut reader = TarReader::new(Cursor::new(tar), &limits);
    assert_eq!(reader.next_entry().unwrap().unwrap().name, b"a");
    let mut some = [0; 10];
    reader.read_exact(&mut some).unwrap();
    assert_eq!(reader.next_entry().unwrap().unwrap().name, b"b");
    assert!(reader.next_entry().unwrap().is_none());
}

#[test]
fn pax_overrules_the_header() {
    let name = "n".repeat(250);
    let entry = one(Tar::new()
        .pax(&[
            ("path", name.as_bytes()),
            ("uid", b"70000"),
            ("gid", b"2147483648"),
            ("mtime", b"-1.25"),
            ("comment", b"a=b"),
            ("SCHILY.xattr.user.k", b"v\n\0"),
        ])
        .file("short", b""));
    assert_eq!(entry.name, name.as_bytes());
    assert_eq!((entry.uid, entry.gid), (70_000, 1 << 31));
    assert_eq!(
        entry.mtime,
        Time {
            seconds: -2,
            nanoseconds: 750_000_000
        }
    );
    assert_eq!(entry.xattrs, [(b"user.k".to_vec(), b"v\n\0".to_vec())]);
}

#[test]
fn pax_holds_for_one_entry_only() {
    let tar = Tar::new()
        .pax(&[("path", b"long")])
        .file("a", b"")
        .file("b", b"")
        .finish();
    let names: Vec<_> = read_all(tar)
        .unwrap()
        .into_iter()
        .map(|(entry, _)| entry.name)
        .collect();
    assert_eq!(names, [b"long".to_vec(), b"b".to_vec()]);
}

#[test]
fn pax_size_is_that_of_the_content() {
    let tar = Tar::new()
        .pax(&[("size", b"600")])
        .file("a", b"")
        .data(&[1; 600])
        .file("b", b"");
    let entries = read_all(tar.finish()).unwrap();
    assert_eq!((entries.len(), entries[0].1.len()), (2, 600));
}

#[test]
fn gnu_long_names_and_big_numbers() {
    let name = "x/".repeat(100);
    let tar = Tar::new()
        .raw("././@LongLink", b'L', "", 0, format!("{name}\0").as_bytes())
        .raw("././@LongLink", b'K', "", 0, b"target\0")
        .header(|header| {
            header.set_entry_type(tar::EntryType::Symlink);
            // 2^31 in base 256.
            header.as_old_mut().uid = [0x80, 0, 0, 0, 0x80, 0, 0, 0];
            header.as_old_mut().gid = *b"  12   \0";
            header.as_old_mut().mtime = [0xff; 12];
        });
    let entry = one(tar);
    assert_eq!(
        (entry.name, entry.link),
        (name.into_bytes(), b"target".to_vec())
    );
    assert_eq!(
        (entry.uid, entry.gid, entry.mtime.seconds),
        (1 << 31, 10, -1)
    );
}

#[test]
fn links_and_directories_have_no_content_whatever_their_size() {
    let tar = Tar::new()
        .file("a", b"")
        .header(|header| {
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(100);
        })
        .file("b", b"");
    assert_eq!(read_all(tar.finish()).unwrap().len(), 3);
}

#[test]
fn truncation_is_noticed_everywhere_but_between_entries() {
    let whole = Tar::new().pax(&[("path", b"p")]).file("a", &[1; 700]).cut();
    for length in 0..whole.len() {
        let result = read_all(whole[..length].to_vec());
        let between = length == 0 || length == 1024;
        assert_eq!(result.is_ok(), between, "{length}: {result:?}");
    }
    // Writers may leave the end mark out.
    assert_eq!(read_all(whole).unwrap().len(), 1);
}

#[test]
fn malformed_headers_are_refused() {
    let bad = |tar: Tar, part: &str| {
        let error = read_all(tar.finish()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    let field = |change: fn(&mut tar::Header)| Tar::new().header(change);
    bad(
        field(|h| h.as_old_mut().size = [0xff; 12]),
        "size -1 is negative",
    );
    bad(
        field(|h| h.as_old_mut().size = *b"99999999999\0"),
        "size field is no number",
    );
    bad(field(|h| h.as_old_mut().uid = *b"garbage\0"), "uid field");
    bad(
        field(|h| h.as_old_mut().gid = [0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        "out of range",
    );
    bad(field(|h| h.as_old_mut().mtime = [0xbf; 12]), "mtime field");
    bad(Tar::new().pax(&[("size", b"-1")]), "size is no number");
    bad(Tar::new().pax(&[("mtime", b"1.x")]), "mtime is no time");
    bad(Tar::new().pax(&[("GNU.sparse.major", b"1")]), "sparse");
    bad(
        Tar::new().pax(&[("path", b"a\0b")]).file("x", b""),
        "zero byte",
    );
    bad(
        Tar::new().raw("p", b'x', "", 0, b"99 path=x\n"),
        "pax header",
    );
    bad(
        Tar::new().raw("p", b'x', "", 0, b"0 path=x\n"),
        "pax header",
    );
    bad(Tar::new().raw("p", b'x', "", 0, b"7 path\n"), "pax header");
    bad(
        Tar::new().raw("p", b'x', "", 0, &[b'1'; 5000]),
        "more than 4096 bytes",
    );
    bad(
        Tar::new().pax(&[("path", &[b'n'; 301])]).file("x", b""),
        "more than 300 bytes in a name",
    );
    let many: Vec<_> = (0..129)
        .map(|_| ("SCHILY.xattr.user.x", &b""[..]))
        .collect();
    bad(Tar::new().pax(&many), "extended attributes");
    let mut broken = Tar::new().file("a", b"").finish();
    broken[0] = b'b';
    assert!(
        read_all(broken)
            .unwrap_err()
            .to_string()
            .contains("checksum")
    );
}

#[test]
fn devices_have_numbers_in_range() {
    let entry = one(Tar::new().device("null", b'3', 1, 3));
    assert_eq!((entry.kind, entry.device), (Kind::Character, (1, 3)));
    assert!(read_all(Tar::new().device("x", b'4', 4096, 0).finish()).is_err());
    assert!(read_all(Tar::new().device("x", b'4', 0, 1 << 20).finish()).is_err());
}

proptest! {
    #[test]
    fn any_bytes_end(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let _ = read_all(bytes);
    }

    #[test]
    fn any_header_field_is_read_or_refused(
        at in 0usize..500,
        bytes in proptest::collection::vec(any::<u8>(), 1..12),
        more in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        let mut block = Tar::new().file("name", b"").cut();
        for (slot, byte) in block[at..].iter_mut().zip(&bytes) {
            *slot = *byte;
        }
        let mut header = tar::Header::from_byte_slice(&block).clone();
        header.set_cksum();
        let mut tar = header.as_bytes().to_vec();
        tar.extend(more);
        if let Ok(entries) = read_all(tar) {
            for (entry, data) in entries {
                prop_assert_eq!(entry.size, data.len() as u64);
                prop_assert!(entry.name.len() <= 300);
            }
        }
    }

    #[test]
    fn names_and_times_pass_unchanged(
        name in "[^\0]{1,80}",
        seconds in 0i64..1 << 40,
        nanoseconds in 0u32..1_000_000_000,
    ) {
        let time = format!("{seconds}.{nanoseconds:09}");
        let tar = Tar::new().pax(&[("path", name.as_bytes()), ("mtime", time.as_bytes())]);
        let entry = one(tar.file("x", b""));
        prop_assert_eq!(entry.name, name.as_bytes());
        prop_assert_eq!(entry.mtime, Time { seconds, nanoseconds });
    }
}
