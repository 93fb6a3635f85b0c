#!/bin/bash
# Runs every fuzz target for a minute (SECONDS_EACH), or those named as arguments. Called by `make fuzz`.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_EACH:-60}

command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
# What the targets need of a nightly compiler, its sanitizer flags, a stable one has too, if it is told to.
toolchain=()
if rustup toolchain list 2>/dev/null | grep -q '^nightly'; then
    toolchain=(+nightly)
else
    export RUSTC_BOOTSTRAP=1
fi
for crate in vmm host; do
    for target in $(cd "$crate" && cargo "${toolchain[@]}" fuzz list); do
        [ $# -eq 0 ] || [[ " $* " == *" $target "* ]] || continue
        echo "== $crate: $target"
        (cd "$crate" && cargo "${toolchain[@]}" fuzz run "$target" -- -max_total_time="$seconds" -rss_limit_mb=2048)
    done
done
