#!/bin/bash
# Measures this host with `cella bench`, and our devices against the stock daemons; one JSON file a measurement in
# target/bench, and a picture of them all. Called by `make bench`.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p target/bench
measure() {
    for what in memory start exec stdio vsock fs block net; do
        echo "== $what on $1"
        target/release/cella bench "$what" --hypervisor "$1" --memory 128M --json | tee "target/bench/$what$2.json"
    done
}

# Our vsock and virtiofs against vhost-device-vsock and virtiofsd, in the same guest.
peers() {
    local daemon=target/peers/bin/vhost-device-vsock virtiofsd target=x86_64-unknown-linux-gnu
    # It fails where only one of the two is there.
    virtiofsd=$(ls /usr/libexec/virtiofsd /usr/lib/qemu/virtiofsd 2>/dev/null | head -1) || true
    [ -n "$virtiofsd" ] || { echo "SKIPPED: no virtiofsd (Debian: virtiofsd, or qemu-system-common)"; return; }
    if [ ! -x "$daemon" ] && ! cargo install --quiet --locked --version 0.3.0 --root target/peers vhost-device-vsock; then
        echo "SKIPPED: vhost-device-vsock could not be built"
        return
    fi
    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static" \
        cargo build --quiet --locked --profile guest --target "$target" -p cella-tests --bin peers-guest
    agent/initramfs.sh "target/$target/guest/peers-guest" target/peers/guest.cpio
    cargo build --quiet --locked --release -p cella-tests --bin peers
    echo "== vsock and virtiofs, ours and the stock daemons'"
    if ! target/release/peers "$daemon" "$virtiofsd" target/peers/guest.cpio | tee target/bench/peers.json; then
        rm -f target/bench/peers.json
        echo "FAILED: the measurement against the stock daemons"
    fi
}

if [ -w /dev/kvm ]; then
    measure kvm ""
else
    echo "SKIPPED: no usable /dev/kvm"
fi
if command -v qemu-system-x86_64 > /dev/null; then
    measure qemu -qemu
    peers
    echo "== the shim under containerd on qemu"
    target/release/bench-containerd qemu | tee target/bench/containerd.json
else
    echo "SKIPPED: no QEMU (qemu-system-x86)"
fi
cargo run --quiet --locked --release -p cella-tests --bin plot target/bench
