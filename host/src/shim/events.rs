//! Events to containerd, complete and in order: one queue, one publisher, and an event that cannot be delivered waits at
//! the head until containerd is back.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::sync::Notify;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use super::time::timestamp_now;

/// Events that wait at most; the oldest goes first.
const MAX_WAITING: usize = 4096;
/// Between two attempts to reach containerd.
const RETRY: Duration = Duration::from_millis(500);
/// How long containerd may take to accept one event.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where events are published. Cheap to clone.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    queue: Arc<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<VecDeque<Envelope>>,
    changed: Notify,
    delivered: Notify,
}

impl Publisher {
    /// Publishes to the ttrpc socket `address`; nowhere if that is empty.
    pub fn new(namespace: &str, address: &str) -> Self {
        let publisher = Self {
            namespace: namespace.to_owned(),
            queue: Arc::default(),
        };
        if !address.is_empty() {
            let address = address.trim_start_matches("unix://").to_owned();
            tokio::spawn(deliver(address, Arc::clone(&publisher.queue)));
        }
        publisher
    }

    /// Adds an event to the queue.
    pub fn publish<E: Message>(&self, topic: &str, event: &E) {
        let Ok(value) = event.write_to_bytes() else {
            return;
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp_now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                // containerd's own urls have no "type.googleapis.com/" in front.
                type_url: format!("containerd.events.{}", E::NAME),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        let mut waiting = self.queue.lock();
        if waiting.len() >= MAX_WAITING {
            waiting.pop_front();
            tracing::warn!("containerd has not taken {MAX_WAITING} events: the oldest is lost");
        }
        waiting.push_back(envelope);
        drop(waiting);
        self.queue.changed.notify_one();
    }

    /// Returns when every event has been delivered.
    pub async fn flush(&self) {
        loop {
            let delivered = self.queue.delivered.notified();
            if self.queue.lock().is_empty() {
                return;
            }
            delivered.await;
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn deliver(address: String, queue: Arc<Queue>) {
    let mut client = None;
    loop {
        let Some(envelope) = queue.lock().front().cloned() else {
            queue.changed.notified().await;
            continue;
        };
        let topic = envelope.topic.clone();
        match send(&address, &mut client, envelope).await {
            Ok(()) => {
                queue.lock().pop_front();
                queue.delivered.notify_waiters();
            }
            Err(error) => {
                tracing::debug!("publishing {topic}: {error}; trying again");
                client = None;
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Sends one event. An answer that containerd gives is final: the same event would get it again.
async fn send(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: Envelope,
) -> Result<(), String> {
    let client = match client {
        Some(client) => client,
        None => {
            let stream = tokio::net::UnixStream::connect(address)
                .await
                .map_err(|e| format!("connecting to {address}: {e}"))?;
            client.insert(EventsClient::new(Client::new(Socket::new(stream))))
        }
    };
    let request = ForwardRequest {
        envelope: MessageField::some(envelope),
        ..Default::default()
    };
    let context = context::with_timeout(TIMEOUT.as_nanos().try_into().unwrap_or(i64::MAX));
    match client.forward(context, &request).await {
        Ok(_) => Ok(()),
        Err(ttrpc::Error::RpcStatus(status))
            if status.code() != ttrpc::Code::UNAVAILABLE
                && status.code() != ttrpc::Code::DEADLINE_EXCEEDED =>
        {
            tracing::warn!("containerd refuses an event: {}", status.message);
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}
