#!/bin/bash
# Measures this host with `cella bench`; one JSON file a measurement in target/bench. Called by `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/bench
if [ ! -w /dev/kvm ]; then
    echo "SKIPPED: no usable /dev/kvm"
    exit 0
fi
for what in memory start exec stdio; do
    echo "== $what"
    target/release/cella bench "$what" --memory 128M --json | tee "target/bench/$what.json"
done
