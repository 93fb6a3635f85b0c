//! Times as protobuf has them.

use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::timestamp::Timestamp;

/// Nanoseconds since the epoch, now.
pub fn now_ns() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos().try_into().unwrap_or(i64::MAX))
}

/// `ns` nanoseconds since the epoch.
pub fn timestamp(ns: i64) -> Timestamp {
    Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        // Below 10^9, which fits.
        nanos: i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0),
        ..Default::default()
    }
}

/// The time now.
pub fn timestamp_now() -> Timestamp {
    timestamp(now_ns())
}
