//! What happens, told to whoever watches: bounded, and never waiting for a watcher.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use cella_proto::agent::Event;
use tokio::sync::mpsc;

/// Events that wait for a slow watcher before its stream is dropped.
const BACKLOG: usize = 256;
/// Watchers at a time. ttrpc does not tell a handler that its client is gone, so that a stale watcher is found
/// out at the next event alone; the oldest makes room for one more.
const WATCHERS: usize = 16;

/// The watchers of the agent's events.
#[derive(Debug, Default)]
pub struct Events {
    watchers: Mutex<VecDeque<mpsc::Sender<Event>>>,
}

/// The receiving end of one watcher. Its stream ends when the watcher was dropped: [`BACKLOG`] events behind, or
/// the oldest of too many.
pub type Watcher = mpsc::Receiver<Event>;

impl Events {
    /// Sends `event` to every watcher. One that is too far behind is dropped.
    pub fn publish(&self, event: &Event) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.try_send(event.clone()).is_ok());
    }

    /// A new watcher, which sees the events from here on, after those of `replay`. The replay is taken
    /// under the same lock that [`Events::publish`] takes, so that nothing is missed between the two.
    pub fn watch(&self, replay: impl FnOnce() -> Vec<Event>) -> (Vec<Event>, Watcher) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| !watcher.is_closed());
        if watchers.len() >= WATCHERS {
            watchers.pop_front();
        }
        let (sender, receiver) = mpsc::channel(BACKLOG);
        watchers.push_back(sender);
        (replay(), receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cella_proto::agent::Oom;

    fn oom(id: &str) -> Event {
        let mut event = Event::new();
        event.set_oom(Oom {
            container_id: id.to_owned(),
            ..Default::default()
        });
        event
    }

    #[test]
    fn a_slow_watcher_is_dropped_and_the_others_go_on() {
        let events = Events::default();
        let (_, mut slow) = events.watch(Vec::new);
        let (_, mut quick) = events.watch(Vec::new);
        for number in 0..=BACKLOG {
            events.publish(&oom(&number.to_string()));
            assert_eq!(
                quick.try_recv().unwrap().oom().container_id,
                number.to_string()
            );
        }
        for number in 0..BACKLOG {
            assert_eq!(
                slow.try_recv().unwrap().oom().container_id,
                number.to_string()
            );
        }
        assert_eq!(
            slow.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        );
        events.publish(&oom("last"));
        assert_eq!(quick.try_recv().unwrap().oom().container_id, "last");
    }

    #[test]
    fn the_oldest_of_too_many_watchers_makes_room() {
        let events = Events::default();
        let mut watchers: Vec<Watcher> = (0..=WATCHERS).map(|_| events.watch(Vec::new).1).collect();
        events.publish(&oom("a"));
        assert_eq!(
            watchers[0].try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        );
        assert!(
            watchers[1..]
                .iter_mut()
                .all(|watcher| watcher.try_recv().is_ok())
        );
    }
}
