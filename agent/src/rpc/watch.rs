//! Watch: everything that happens, as one stream.

use std::time::Duration;

use cella_proto::agent::{Event, WatchRequest};
use tokio::time::{Interval, MissedTickBehavior};
use ttrpc::asynchronous::ServerStreamSender;

use super::Agent;
use crate::events::Watcher;

/// The shortest period of Stats events, by agent.proto.
const SHORTEST_PERIOD_MS: u32 = 100;

impl Agent {
    /// Ready, what ended before, and then what happens, until the client is gone or too slow.
    pub(super) async fn serve_watch(
        &self,
        request: &WatchRequest,
        stream: &ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut ready = Event::new();
        ready.set_ready(self.ready.clone());
        stream.send(&ready).await?;
        // The host knows now; what follows need not wait for its next request.
        self.prepare()?;
        let (replay, mut watcher) = self.events.watch(|| self.exits());
        for event in &replay {
            stream.send(event).await?;
        }
        let mut period = period(request.stats_period_ms);
        while let Some(event) = self.next_event(&mut watcher, period.as_mut()).await {
            stream.send(&event).await?;
        }
        Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
            ttrpc::Code::RESOURCE_EXHAUSTED,
            "watching events: this watcher fell behind, or there are too many; watch again for a full replay",
        )))
    }

    async fn next_event(
        &self,
        watcher: &mut Watcher,
        period: Option<&mut Interval>,
    ) -> Option<Event> {
        let Some(period) = period else {
            return watcher.recv().await;
        };
        tokio::select! {
            biased;
            event = watcher.recv() => event,
            _ = period.tick() => {
                let mut event = Event::new();
                event.set_stats(self.all_stats());
                Some(event)
            }
        }
    }
}

fn period(milliseconds: u32) -> Option<Interval> {
    if milliseconds == 0 {
        return None;
    }
    let period = Duration::from_millis(milliseconds.max(SHORTEST_PERIOD_MS).into());
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Some(interval)
}
