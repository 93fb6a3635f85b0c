#!/bin/bash
# The main job on real input: a pod with two containers of an OCI image in one virtual machine on /dev/kvm. Called by
# `make demo`, which has built everything.
set -euo pipefail
cd "$(dirname "$0")/.."

cella() { "$PWD/target/release/cella" "$@"; }
say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
fail() { echo "demo: $*" >&2; exit 1; }

work=$(mktemp -d)
export CELLA_RUN_DIR=$work/run CELLA_LIB_DIR=$work/lib
clean() {
    status=$?
    trap - EXIT
    cella stop demo --timeout 1 >/dev/null 2>&1 || true
    for id in a b; do cella rm "$id" >/dev/null 2>&1 || true; done
    cella gc || true
    rm -rf "$work"
    exit "$status"
}
trap clean EXIT

say "What this host can do"
cella check

say "An OCI image of Debian's busybox-static"
tests/busybox-image.sh "$work/busybox"
du -sh "$work/busybox" | sed "s|$work/||"

say "Pod demo: boot, create and start container A"
timeline=target/demo-timeline
cella run --timeline "$timeline.json" "oci:$work/busybox" -- sh -c 'echo "guest kernel: $(uname -r)"'
echo "host kernel:  $(uname -r)"
cella run --pod demo -d --name a "oci:$work/busybox" -- sh -c 'trap "exit 7" TERM; echo A is up; while :; do sleep 1; done'
say "Container B in the same virtual machine"
cella run --pod demo -d --name b "oci:$work/busybox" -- sh -c 'trap "exit 8" TERM; echo B is up; while :; do sleep 1; done'
cella ps

say "A and B share the pod's host name and IPC, but not their mounts and pids"
for namespace in uts ipc mnt pid; do
    a=$(cella exec a readlink /proc/self/ns/$namespace)
    b=$(cella exec b readlink /proc/self/ns/$namespace)
    [ "$a" = "$b" ] && relation=shared || relation="their own"
    printf '%-4s A %-20s B %-20s %s\n' "$namespace" "$a" "$b" "$relation"
    case $namespace in
        uts|ipc) [ "$relation" = shared ] || fail "$namespace is not shared" ;;
        *) [ "$relation" != shared ] || fail "$namespace is shared" ;;
    esac
done
echo "host name in A: $(cella exec a hostname), in B: $(cella exec b hostname)"

say "A file streamed through B"
head -c 1048576 /dev/urandom > "$work/file"
cella exec -i b cat < "$work/file" > "$work/copy"
cmp "$work/file" "$work/copy" && echo "1 MiB went through unchanged"

say "Stop both; their exit codes"
cella stop a
cella stop b
cella ps
cella ps --json | grep -q '"code":7' || fail "A did not exit with 7"
cella ps --json | grep -q '"code":8' || fail "B did not exit with 8"
cella logs a
cella logs b
cella rm a
cella rm b
cella stop demo

say "The timeline of a start, as a picture: $timeline.svg"
cella run --timeline "$timeline.svg" "oci:$work/busybox" -- true

say "Nothing is left behind"
cella gc
[ -z "$(cella ps | tail -n +2)" ] || fail "cella ps still lists something"
! grep -q "$work" /proc/self/mountinfo || fail "a mount is left"
[ -z "$(ls -A "$work/run")" ] || fail "$(ls -A "$work/run") is left in the run directory"
! pgrep -f -- "--share $work" >/dev/null || fail "a VMM is left"
echo "no process, no mount, no sandbox"
