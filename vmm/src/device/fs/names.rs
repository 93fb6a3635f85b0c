//! Under which names the inodes that the guest holds can be found again.
//!
//! The server knows a file by a descriptor, which ends with the process: a snapshot needs the file's directory and its name there.
//! Each inode has the last name that the guest's requests have shown. A file with several (hard links) that loses the last shown has
//! none, although it may still be there under another. What the host renames or removes is not noticed here.

use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::ROOT_ID as ROOT;

/// A name in a directory, by the directory's inode.
pub type Place<'a> = (u64, &'a CStr);

/// The held inodes' places: at most one each, so that they are bounded as the inodes are.
#[derive(Debug, Default)]
pub struct Names {
    inodes: HashMap<u64, Known>,
    // The same by place.
    directories: HashMap<u64, HashMap<Arc<CStr>, u64>>,
}

#[derive(Debug)]
struct Known {
    file_type: u32,
    place: Option<(u64, Arc<CStr>)>,
}

impl Names {
    /// `inode`, which the guest holds, was found at `place`. Its file type is that of `mode`.
    pub fn found(&mut self, place: Place<'_>, inode: u64, mode: u32) {
        // A mount of the share in itself.
        if inode == ROOT {
            return;
        }
        let known = self.inodes.entry(inode).or_insert(Known {
            file_type: 0,
            place: None,
        });
        known.file_type = mode & libc::S_IFMT;
        let is_there = |(directory, name): &(u64, Arc<CStr>)| (*directory, &**name) == place;
        if !known.place.as_ref().is_some_and(is_there) {
            self.lift(inode);
            self.put(place, inode);
        }
    }

    /// What was at `old` is at `new` now, in the place of what was there.
    pub fn moved(&mut self, old: Place<'_>, new: Place<'_>) {
        let inode = self.removed(old);
        self.removed(new);
        if let Some(inode) = inode {
            self.put(new, inode);
        }
    }

    /// What was at `one` and what was at `other` have changed places.
    pub fn exchanged(&mut self, one: Place<'_>, other: Place<'_>) {
        let (first, second) = (self.removed(one), self.removed(other));
        for (place, inode) in [(other, first), (one, second)] {
            if let Some(inode) = inode {
                self.put(place, inode);
            }
        }
    }

    /// Nothing is at `place` any more; what was there, if the guest holds it.
    pub fn removed(&mut self, place: Place<'_>) -> Option<u64> {
        let (directory, name) = place;
        let names = self.directories.get_mut(&directory)?;
        let inode = names.remove(name)?;
        if names.is_empty() {
            self.directories.remove(&directory);
        }
        if let Some(known) = self.inodes.get_mut(&inode) {
            known.place = None;
        }
        Some(inode)
    }

    /// The guest holds `inode` no more.
    pub fn forget(&mut self, inode: u64) {
        self.lift(inode);
        self.inodes.remove(&inode);
    }

    /// The type of `inode`, of stat(2)'s `st_mode`; 0 if it is not known.
    pub fn file_type(&self, inode: u64) -> u32 {
        self.inodes.get(&inode).map_or(0, |known| known.file_type)
    }

    /// Every inode that can be reached from the root by directories that the guest holds, a directory before what is in it.
    pub fn reachable(&self) -> Vec<(Place<'_>, u64)> {
        // Each inode has one place and the root none, so that this ends.
        let mut reached = Vec::new();
        let mut next = 0_usize;
        let mut directory = ROOT;
        loop {
            let names = self.directories.get(&directory).into_iter().flatten();
            reached.extend(names.map(|(name, inode)| ((directory, &**name), *inode)));
            let Some((_, inode)) = reached.get(next) else {
                return reached;
            };
            directory = *inode;
            next = next.saturating_add(1);
        }
    }

    // Takes `inode` away from its place.
    fn lift(&mut self, inode: u64) {
        let known = self.inodes.get_mut(&inode);
        if let Some((directory, name)) = known.and_then(|known| known.place.take()) {
            self.removed((directory, &name));
        }
    }

    // Gives an inode without a place that of `place`.
    fn put(&mut self, place: Place<'_>, inode: u64) {
        self.removed(place);
        if let Some(known) = self.inodes.get_mut(&inode) {
            let (directory, name) = (place.0, Arc::<CStr>::from(place.1));
            known.place = Some((directory, name.clone()));
            let names = self.directories.entry(directory).or_default();
            names.insert(name, inode);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: u32 = libc::S_IFDIR | 0o755;
    const FILE: u32 = libc::S_IFREG | 0o600;

    // A directory 2 with the file 3 and the directory 4, which has the file 5; and a file 6.
    fn tree() -> Names {
        let mut names = Names::default();
        names.found((ROOT, c"d"), 2, DIR);
        names.found((2, c"f"), 3, FILE);
        names.found((2, c"e"), 4, DIR);
        names.found((4, c"f"), 5, FILE);
        names.found((ROOT, c"f"), 6, FILE);
        names
    }

    fn paths(names: &Names) -> Vec<(String, u64)> {
        let mut paths: HashMap<u64, String> = HashMap::from([(ROOT, String::new())]);
        let mut all = Vec::new();
        for ((directory, name), inode) in names.reachable() {
            let path = format!("{}/{}", paths[&directory], name.to_str().unwrap());
            paths.insert(inode, path.clone());
            all.push((path, inode));
        }
        all.sort();
        all
    }

    fn expect(names: &Names, expected: &[(&str, u64)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(path, inode)| ((*path).to_owned(), *inode))
            .collect();
        assert_eq!(paths(names), expected);
        // Nothing is kept of what has no place.
        let placed = names.inodes.values().filter(|it| it.place.is_some());
        let by_place: usize = names.directories.values().map(HashMap::len).sum();
        assert_eq!(placed.count(), by_place);
        assert!(names.directories.values().all(|names| !names.is_empty()));
    }

    #[test]
    fn directories_come_first_and_files_know_their_type() {
        let names = tree();
        let whole = [
            ("/d", 2),
            ("/d/e", 4),
            ("/d/e/f", 5),
            ("/d/f", 3),
            ("/f", 6),
        ];
        expect(&names, &whole);
        assert_eq!(names.file_type(4), libc::S_IFDIR);
        assert_eq!(names.file_type(5), libc::S_IFREG);
        assert_eq!(names.file_type(99), 0);
    }

    #[test]
    fn a_directory_moves_with_what_is_in_it() {
        let mut names = tree();
        names.moved((2, c"e"), (ROOT, c"f"));
        expect(&names, &[("/d", 2), ("/d/f", 3), ("/f", 4), ("/f/f", 5)]);
        names.moved((ROOT, c"nobody's"), (ROOT, c"d"));
        expect(&names, &[("/f", 4), ("/f/f", 5)]);
    }

    #[test]
    fn names_are_exchanged() {
        let mut names = tree();
        names.exchanged((2, c"e"), (ROOT, c"f"));
        let exchanged = [("/d", 2), ("/d/e", 6), ("/d/f", 3), ("/f", 4), ("/f/f", 5)];
        expect(&names, &exchanged);
        names.exchanged((ROOT, c"new"), (2, c"f"));
        let one_unknown = [("/d", 2), ("/d/e", 6), ("/f", 4), ("/f/f", 5), ("/new", 3)];
        expect(&names, &one_unknown);
    }

    #[test]
    fn the_last_name_counts_and_is_lost_alone() {
        let mut names = tree();
        names.found((ROOT, c"link"), 3, FILE);
        names.removed((2, c"f"));
        assert!(paths(&names).contains(&("/link".to_owned(), 3)));
        names.removed((ROOT, c"link"));
        assert!(paths(&names).iter().all(|(_, inode)| *inode != 3));
        // The host has put another file there.
        names.found((ROOT, c"f"), 7, FILE);
        expect(&names, &[("/d", 2), ("/d/e", 4), ("/d/e/f", 5), ("/f", 7)]);
    }

    #[test]
    fn what_is_forgotten_leaves_nothing() {
        let mut names = tree();
        names.forget(4);
        expect(&names, &[("/d", 2), ("/d/f", 3), ("/f", 6)]);
        // It was held all the time, by a file that is open.
        names.found((2, c"e"), 4, DIR);
        assert!(paths(&names).contains(&("/d/e/f".to_owned(), 5)));
        for inode in 2..=6 {
            names.forget(inode);
        }
        expect(&names, &[]);
        assert!(names.inodes.is_empty());
    }

    #[test]
    fn circles_that_the_host_makes_are_not_walked() {
        let mut names = tree();
        names.found((4, c"d"), 2, DIR);
        names.found((2, c"root"), ROOT, DIR);
        expect(&names, &[("/f", 6)]);
    }
}
