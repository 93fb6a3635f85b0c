//! What takes long to make from a specification, kept for the next container of the same one.

use std::borrow::Borrow;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// How many: a pod's containers differ little.
const MOST: usize = 4;

/// The last few results, the last used first. Containers of a pod have the same rules as a rule, and one that crashed
/// has its own again.
#[derive(Debug)]
pub(super) struct Kept<K, V>(Mutex<VecDeque<(K, V)>>);

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K, V: Clone> Kept<K, V> {
    /// What there is for `key`, or what `make` makes of it. `make` is to compute, not to wait: one computes at a time,
    /// so that several containers at once neither make the same thing nor need the memory for it several times.
    pub(super) fn get<Q, E>(&self, key: &Q, make: impl FnOnce() -> Result<V, E>) -> Result<V, E>
    where
        K: Borrow<Q>,
        Q: ToOwned<Owned = K> + PartialEq + ?Sized,
    {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let position = kept.iter().position(|(of, _)| of.borrow() == key);
        let entry = match position.and_then(|position| kept.remove(position)) {
            Some(entry) => entry,
            None => (key.to_owned(), make()?),
        };
        let value = entry.1.clone();
        kept.push_front(entry);
        kept.truncate(MOST);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_used_are_kept() {
        let kept = Kept::<Vec<u8>, u8>::default();
        let made = std::cell::Cell::new(0);
        let get = |key: u8| {
            let make = || {
                made.set(made.get() + 1);
                Ok::<_, ()>(key)
            };
            assert_eq!(kept.get(&[key][..], make), Ok(key));
        };
        for key in [0, 1, 2, 3, 0, 4, 0] {
            get(key);
        }
        assert_eq!(made.get(), 5);
        // The one that was not used for the longest time is made again.
        get(1);
        assert_eq!(made.get(), 6);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let kept = Kept::<Vec<u8>, u8>::default();
        assert_eq!(kept.get(&[1][..], || Err("no")), Err("no"));
        assert_eq!(kept.get(&[1][..], || Ok::<_, &str>(7)), Ok(7));
    }
}
