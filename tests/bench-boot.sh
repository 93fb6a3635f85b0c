#!/bin/bash
# What a boot and a container's start cost, in figures that are the same on every machine: guest instructions by phase
# (counted under QEMU) and VM exits by reason (counted by our VMM). Writes target/bench/boot.json and compares with
# tests/budgets.toml. Called by `make bench-boot`; arguments are boot-budget's (tests/src/bin/boot-budget.rs).
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${CARGO:-cargo}" run --quiet --locked -p cella-tests --bin boot-budget -- "$@"
