#!/bin/bash
# Runs every fuzz target for a minute (SECONDS_EACH). Called by `make fuzz`.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_EACH:-60}

if ! rustup toolchain list 2>/dev/null | grep -q nightly; then
    echo "SKIPPED: a nightly toolchain (rustup toolchain install nightly)"
    exit 0
fi
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
for crate in vmm host; do
    for target in $(cd "$crate" && cargo +nightly fuzz list); do
        echo "== $crate: $target"
        (cd "$crate" && cargo +nightly fuzz run "$target" -- -max_total_time="$seconds" -rss_limit_mb=2048)
    done
done
