//! What a cold boot and an idle sandbox cost.

use serde_json::{Value, json};

use super::{Context, Error, Options, sandbox};
use crate::timeline::Timeline;

/// VM exits by reason from the first guest instruction to the agent's readiness, and the phases.
pub async fn boot(context: &Context, options: &Options) -> Result<Value, Error> {
    let timeline = Timeline::new();
    let sandbox = sandbox(context, options, &timeline).await?;
    let stats = sandbox.vm_stats().await?;
    let phases = timeline.phases();
    sandbox.stop().await?;
    let total: u64 = stats.exits.values().sum();
    Ok(json!({
        "vm_exits": total,
        "exits": stats.exits,
        "phases": phases,
    }))
}

/// Resident memory at rest.
pub async fn memory(context: &Context, options: &Options) -> Result<Value, Error> {
    let sandbox = sandbox(context, options, &Timeline::new()).await?;
    let info = sandbox.info().await?;
    let stats = sandbox.vm_stats().await?;
    sandbox.stop().await?;
    Ok(json!({
        "vmm_rss_kib": stats.rss_kib,
        "agent_rss_kib": info.agent_rss_kib,
        "guest_rss_kib": stats.guest_rss_kib,
        "guest_memory_total_kib": info.memory_total_kib,
        "guest_memory_available_kib": info.memory_available_kib,
    }))
}
