#!/bin/bash
# Boots the guest kernel under QEMU (software emulation: works anywhere) and checks that it has what a pod needs:
# run.sh [VMLINUX]. Prints what failed, then "N passed, N failed" for 1 and for 2 processors; exits 0 when nothing failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kernel=${1:-$here/../../target/guest/vmlinux}
needed=()
command -v gcc >/dev/null || needed+=(build-essential)
command -v cpio >/dev/null || needed+=(cpio)
command -v qemu-system-x86_64 >/dev/null || needed+=(qemu-system-x86)
command -v mke2fs >/dev/null || needed+=(e2fsprogs)
if [ ${#needed[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${needed[@]}" >&2
    else
        echo "guest-kernel test: needs ${needed[*]}" >&2
        exit 2
    fi
fi
[ -e "$kernel" ] || { echo "guest-kernel test: no kernel at $kernel (guest-kernel/build.sh makes it)" >&2; exit 2; }

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"/root/{dev,proc,sys,tmp}
gcc -static -Os -Wall -Wno-unused-result -o "$tmp/root/init" "$here/check.c"
(cd "$tmp/root" && find . -print0 | cpio --null -o -H newc -R 0:0 --quiet) >"$tmp/initrd"
truncate -s 16M "$tmp/disk" && mke2fs -q -t ext4 "$tmp/disk"

# Time is counted in instructions (-icount): a loaded machine changes nothing, and the TSC's frequency is known.
bad=0
for cpus in 1 2; do
    echo "== $cpus processor(s)"
    timeout 120 qemu-system-x86_64 -M microvm,acpi=off,x-option-roms=off -accel tcg,tb-size=32 -icount shift=0,sleep=off -cpu max -smp "$cpus" -m 256 \
        -global virtio-mmio.force-legacy=false -display none -nodefaults -no-user-config -no-reboot -serial "file:$tmp/log" \
        -drive "file=$tmp/disk,format=raw,if=none,id=d" -device virtio-blk-device,drive=d -device virtio-rng-device \
        -kernel "$kernel" -initrd "$tmp/initrd" \
        -append "$("$here/../cmdline.sh" qemu console) quiet tsc_early_khz=1000000" || true
    tr -d '\r' <"$tmp/log" | grep -E '^(FAILED|clock|processors|[0-9]+ passed)' || true
    if ! grep -q ' 0 failed' "$tmp/log"; then
        bad=1
        grep -q 'passed,' "$tmp/log" || { echo "the check did not finish:"; tail -n 20 "$tmp/log"; }
    fi
done
exit $bad
