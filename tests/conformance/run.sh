#!/bin/bash
# Runs critest and the containerd suite against containerd 2, and that suite against containerd 1.7 too. Called by
# `make conformance`.
set -uo pipefail
cd "$(dirname "$0")/../.."
dir=$(tests/conformance/build.sh) || exit 1
[ -n "$dir" ] || exit 0

failed=0
suite() {
    cargo test -p cella-tests --locked --no-fail-fast --test "$1" -- --nocapture --test-threads=1 || failed=1
}
CELLA_CONFORMANCE=$dir CELLA_CONFORMANCE_ALL=1 suite conformance
for daemon in "$dir" "$dir/1.7"; do
    echo "== the containerd suite with $("$daemon/containerd" --version)"
    CELLA_TEST_CONTAINERD=$daemon/containerd suite containerd
done
exit $failed
