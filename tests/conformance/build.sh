#!/bin/bash
# Builds containerd, ctr, crictl, critest, runc's shim and the registry of stand-in images with the Go toolchain, from the
# modules that go.mod names, and in 1.7/ an older containerd; prints the directory that has them. What has been built before comes from the cache,
# ${CELLA_CACHE:-~/.cache/cella}/conformance, under a hash of everything the result depends on.
#
#   build.sh            builds if need be
#   build.sh --cached   prints nothing unless it has been built
set -euo pipefail
cd "$(dirname "$0")"
cache=${CELLA_CACHE:-${HOME:-/root}/.cache/cella}/conformance

command -v go >/dev/null || { [ "${1:-}" = --cached ] || echo 'SKIPPED: conformance (Go)' >&2; exit 0; }
# go.sum has the hash of every module.
key=$({ go version; sha256sum build.sh go.mod go.sum ./*/*.go ./*/go.mod ./*/go.sum; } | sha256sum | cut -c 1-32)
entry=$cache/$key
if [ -d "$entry" ] || [ "${1:-}" = --cached ]; then
    [ ! -d "$entry" ] || echo "$entry"
    exit 0
fi

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ ! -d "$entry" ]; then
    rm -rf "$cache"/build.* # left by builds that were killed: the lock is ours, so nobody works there
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    echo "building containerd, crictl and critest (some minutes; once)" >&2
    export CGO_ENABLED=0
    # Builds the daemon of a module, what goes with it, and the packages named after it.
    build() {
        local module=$1 out=$2 version
        shift 2
        mkdir -p "$out"
        version=$(go list -m -f '{{.Version}}' "$module")
        nice go build -trimpath -ldflags "-s -w -X $module/version.Version=${version#v}" -o "$out/" \
            "$module/cmd/containerd" "$module/cmd/ctr" "$module/cmd/containerd-shim-runc-v2" "$@" >&2
    }
    build github.com/containerd/containerd/v2 "$work" sigs.k8s.io/cri-tools/cmd/crictl ./images ./standin
    nice go test -c -trimpath -ldflags '-s -w' -o "$work/critest" sigs.k8s.io/cri-tools/cmd/critest >&2
    (cd containerd-1.7 && build github.com/containerd/containerd "$work/1.7")
    mv "$work" "$entry"
    trap - EXIT
fi
echo "$entry"
