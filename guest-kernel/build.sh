#!/bin/bash
# Builds the guest kernel: build.sh [OUTDIR]
#
# Writes OUTDIR/vmlinux (an ELF file without debug information) and OUTDIR/System.map (its symbols). OUTDIR is
# target/guest at the top of the repository unless given. What has been built before comes from the cache,
# ${CELLA_CACHE:-~/.cache/cella}/guest-kernel, under a hash of everything the result depends on.
#
# Environment: CELLA_CACHE where the cache is; CELLA_KERNEL_SOURCE a linux-source-6.12.tar.xz to use instead of the
# Debian package's; JOBS how many compilers to run at once (default: one a processor).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$here/../target/guest}
cache=${CELLA_CACHE:-${HOME:-/root}/.cache/cella}/guest-kernel
package=linux-source-6.12
tarball=${CELLA_KERNEL_SOURCE:-/usr/src/$package.tar.xz}
packages="build-essential flex bison bc libelf-dev xz-utils patch"

say() { echo "guest-kernel: $*" >&2; }
die() { say "$*"; exit 1; }

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

# --- what is needed ---------------------------------------------------------------------------------------------

missing=()
for tool in gcc make flex bison bc xz patch; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
[ -e /usr/include/libelf.h ] || missing+=(libelf.h)
[ -e "$tarball" ] || missing+=("$package")
if [ ${#missing[@]} -gt 0 ]; then
    [ -n "${CELLA_KERNEL_SOURCE:-}" ] || packages="$packages $package"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing what is missing (${missing[*]})"
        # shellcheck disable=SC2086
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages; } >&2
    else
        die "missing: ${missing[*]}. On Debian 12, as root: apt-get install $packages"
    fi
fi
[ -e "$tarball" ] || die "no kernel source at $tarball"

# --- the key -------------------------------------------------------------------------------------------------------

# The package's version stands for the tarball's content: hashing 150 MB would make every call slow.
if [ -n "${CELLA_KERNEL_SOURCE:-}" ]; then
    source_id=$(stat -c '%n %s %Y' "$tarball")
else
    source_id=$(dpkg-query -W -f '${Version}' "$package")
fi
key=$(
    {
        echo "$source_id"
        gcc --version | head -n 1
        ld --version | head -n 1
        cd "$here" && sha256sum build.sh config $(LC_ALL=C ls patches/*.patch)
    } | sha256sum | cut -c 1-32
)
entry=$cache/$key

install_from_cache() {
    mkdir -p "$out"
    for file in vmlinux System.map config; do
        cmp -s "$entry/$file" "$out/$file" && continue
        cp "$entry/$file" "$out/.$file.$$"
        mv "$out/.$file.$$" "$out/$file"
    done
}

if [ -e "$entry/vmlinux" ]; then
    install_from_cache
    exit 0
fi

# --- build ---------------------------------------------------------------------------------------------------------

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [ -e "$entry/vmlinux" ]; then # another build finished it while this one waited
    install_from_cache
    exit 0
fi

rm -rf "$cache"/build.* # left by builds that were killed: the lock is ours, so nobody works there
work=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$work"' EXIT

say "unpacking $package $source_id"
# Only what an x86 build reads: a third of the files.
tar -C "$work" -xf "$tarball" --strip-components=1 --wildcards --wildcards-match-slash \
    --exclude='*/Documentation/*/*' --exclude='*/tools/testing/*' --exclude='*/tools/perf/*' \
    --exclude='*/drivers/gpu/*/*.[ch]' --exclude='*/arch/*/boot/dts/*' --exclude='*/sound/*.[ch]'
for patch in "$here"/patches/*.patch; do
    patch -d "$work" -p1 -s --no-backup-if-mismatch <"$patch" || die "$(basename "$patch") does not apply"
done

# Nothing of this machine and this minute goes into the result.
export KBUILD_BUILD_USER=cella KBUILD_BUILD_HOST=cella KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_TIMESTAMP='2026-01-01 00:00:00 UTC'
jobs=${JOBS:-$(nproc)}

cat "$work/kernel/configs/tiny-base.config" "$here/config" >"$work/all.config"
make -C "$work" -s KCONFIG_ALLCONFIG=all.config allnoconfig >"$work/config.log" 2>&1 || { cat "$work/config.log" >&2; die "configuring failed"; }
lost=0
while IFS= read -r line; do
    case "$line" in
    CONFIG_*)
        grep -qxF -- "$line" "$work/.config" || { say "config: '$line' did not take effect"; lost=1; }
        ;;
    "# CONFIG_"*" is not set")
        name=${line#\# }
        ! grep -q "^${name%% *}=" "$work/.config" || { say "config: '$line' did not take effect"; lost=1; }
        ;;
    esac
done <"$here/config"
[ $lost = 0 ] || die "the kernel dropped lines of the config fragment"

say "building with $jobs jobs (a few minutes; once)"
nice make -C "$work" -s -j "$jobs" vmlinux >"$work/make.log" 2>&1 || { tail -n 40 "$work/make.log" >&2; die "the build failed"; }

mkdir "$work/done"
strip --strip-all -o "$work/done/vmlinux" "$work/vmlinux"
cp "$work/System.map" "$work/done/System.map"
cp "$work/.config" "$work/done/config"
rm -rf "$entry"
mv "$work/done" "$entry"
install_from_cache
say "built $out/vmlinux"
