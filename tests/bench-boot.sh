#!/bin/bash
# What a boot costs, in figures that are the same on every machine: guest instructions from reset to the agent's
# readiness (counted by QEMU's software emulation, -icount), and VM exits on KVM (counted by our VMM, console off).
# Writes target/bench/boot.json. Called by `make bench-boot`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/bench

# One instruction is one nanosecond of guest time and one TSC tick, so the agent's reading of the TSC is the count.
# The command line is the VMM's, but for what the platform needs: the waits for real time are told instead of measured.
instructions() {
    local console=target/bench/console
    timeout 120 qemu-system-x86_64 -M microvm,acpi=off,x-option-roms=off -accel tcg,tb-size=64 -cpu max,-erms,-fsrm -m 128 -smp 1 \
        -icount shift=0,sleep=off -rtc base=2026-01-01,clock=vm -seed 1 \
        -display none -nodefaults -no-user-config -no-reboot -serial "file:$console" \
        -kernel target/guest/vmlinux -initrd target/guest/initrd.cpio \
        -append "$(guest-kernel/cmdline.sh qemu) tsc_early_khz=1000000 nolapic_timer 8250.nr_uarts=1 console=ttyS0 cella_icount=1"
    sed -n 's/.*cella-agent: ready tsc=\([0-9]*\).*/\1/p' "$console"
}

first=$(instructions)
second=$(instructions)
[ -n "$first" ] || { echo "the guest did not reach the agent: see target/bench/console" >&2; exit 1; }
[ "$first" = "$second" ] || echo "warning: the count does not repeat: $first, $second" >&2

if [ -w /dev/kvm ]; then
    kvm=$(target/release/cella bench boot --memory 128M --cpus 1 --json)
else
    echo "SKIPPED: VM exits: no usable /dev/kvm"
    kvm='{}'
fi
printf '{"guest_instructions":%s,%s\n' "$first" "${kvm#\{}" | sed 's/,}$/}/' > target/bench/boot.json
cat target/bench/boot.json
