#!/bin/bash
# Measures this host with `cella bench`; one JSON file a measurement in target/bench. Called by `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/bench
measure() {
    for what in memory start exec stdio; do
        echo "== $what on $1"
        target/release/cella bench "$what" --hypervisor "$1" --memory 128M --json | tee "target/bench/$what$2.json"
    done
}
if [ -w /dev/kvm ]; then
    measure kvm ""
else
    echo "SKIPPED: no usable /dev/kvm"
fi
if command -v qemu-system-x86_64 > /dev/null; then
    measure qemu -qemu
    echo "== the shim under containerd on qemu"
    target/release/bench-containerd qemu | tee target/bench/containerd.json
else
    echo "SKIPPED: no QEMU (qemu-system-x86)"
fi
