#!/bin/sh
# Makes the guest's initramfs: the agent as /init, the directories it mounts on, and two device nodes.
#
#   initramfs.sh AGENT OUTPUT
#
# The archive is uncompressed newc, which the kernel copies and need not unpack, and the same for the same agent: its
# headers are written here, so that neither privileges (for the nodes) nor times or inode numbers of this machine go in.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 AGENT OUTPUT" >&2
    exit 2
fi
agent=$1
output=$2
inode=0

if readelf -d "$agent" | grep -q NEEDED; then
    echo "$0: $agent needs shared libraries, which a guest does not have (LIBSECCOMP_LINK_TYPE=static?)" >&2
    exit 1
fi

zeros() { # COUNT
    head -c "$1" /dev/zero
}

pad() { # to a multiple of 4 bytes, from a length
    zeros $(((4 - $1 % 4) % 4))
}

# The fields, by Documentation/driver-api/early-userspace/buffer-format.rst in Linux: magic, inode, mode, uid, gid, links,
# time, size, the device it is on (major, minor), the device it is (major, minor), length of the name with its NUL, checksum.
header() { # NAME MODE SIZE MAJOR MINOR [NULS after the name, 1 if not given]
    inode=$((inode + 1))
    nuls=${6:-1}
    printf '070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s' \
        "$inode" "$((0$2))" 0 0 1 0 "$3" 0 0 "$4" "$5" "$((${#1} + nuls))" 0 "$1"
    zeros "$nuls"
    pad "$((110 + ${#1} + nuls))"
}

directory() { header "$1" 40755 0 0 0; }

temporary=$output.new
mkdir -p "$(dirname "$output")"
{
    for name in dev proc sys run tmp newroot; do
        directory "$name"
    done
    header dev/console 20600 0 5 1
    header dev/null 20666 0 1 3
} >"$temporary"
{
    # The agent's content begins at a page's start: there the guest kernel takes the archive's pages as the file's, instead
    # of copying millions of bytes (guest-kernel/README.md). The NULs after the name make up the distance.
    size=$(wc -c <"$agent")
    before=$(($(wc -c <"$temporary") + 110 + 4))
    header init 100755 "$size" 0 0 $((4096 - before % 4096))
    cat "$agent"
    pad "$size"
    header 'TRAILER!!!' 0 0 0 0
} >>"$temporary"
mv "$temporary" "$output"
