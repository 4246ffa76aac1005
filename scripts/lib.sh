# Shared by the scripts in this folder: where things are kept, what must be installed, the guest and its kernel.
# Source it; it sets -euo pipefail and defines functions only (plus the variables below).
# shellcheck shell=bash
set -euo pipefail

HWVMM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that is downloaded or made lives here; deleting it is always safe.
HWVMM_LAB=${HWVMM_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/hwvmm-lab}
HWVMM_BIN=${HWVMM_BIN:-${CARGO_TARGET_DIR:-$HWVMM_ROOT/target}/release/hwvmm}

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 125; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo "$@"
    else die "needs root to run '$*': run it as root, or install sudo"; fi
}

# need_packages PACKAGE...: installs the Debian packages that are missing.
need_packages() {
    local missing=() p
    for p in "$@"; do
        dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} = 0 ] && return 0
    command -v apt-get >/dev/null || die "these Debian packages are needed, and there is no apt-get here: ${missing[*]}"
    say "installing Debian packages: ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# The packages that the lab and its guest are made from.
lab_packages() { need_packages qemu-system-x86 seabios busybox-static cpio; }

# guest_kernel: fetches Debian's kernel (no install) into $HWVMM_LAB/kernel: vmlinuz, modules/, version.
guest_kernel() {
    local dir=$HWVMM_LAB/kernel
    [ -s "$dir/version" ] && return 0
    mkdir -p "$HWVMM_LAB/work"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/kernel.XXXXXX")
    local package
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
    if [ -z "$package" ]; then
        as_root apt-get -qq update
        package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ {print $2; exit}')
    fi
    say "fetching Debian's kernel: $package (about 70 MB, once)"
    (cd "$work" && apt-get -qq download "$package" 2>/dev/null) ||
        { as_root apt-get -qq update; (cd "$work" && apt-get -qq download "$package" 2>/dev/null); } ||
        die "cannot download $package with apt-get: check the network and /etc/apt/sources.list"
    dpkg -x "$work"/"$package"_*.deb "$work/root"
    local version=${package#linux-image-}
    mkdir -p "$work/kernel"
    cp -p "$work/root/boot/vmlinuz-$version" "$work/kernel/vmlinuz"
    mv "$work/root/lib/modules/$version" "$work/kernel/modules"
    echo "$version" >"$work/kernel/version"
    rm -rf "$dir"
    mv "$work/kernel" "$dir"
    rm -rf "$work"
}

# make_cpio DIR OUT: packs DIR as a newc archive whose bytes depend on its contents only.
make_cpio() {
    (cd "$1" && find . -print0 | LC_ALL=C sort -z |
        cpio --null --quiet --create --format=newc --reproducible --owner=0:0) >"$2"
}

# guest_initramfs: makes $HWVMM_LAB/guest/initramfs.cpio.gz, a busybox guest (see guest-init beside this file).
guest_initramfs() {
    local out=$HWVMM_LAB/guest/initramfs.cpio.gz
    [ -s "$out" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/guest-init" ] && return 0
    mkdir -p "$HWVMM_LAB/work" "$HWVMM_LAB/guest"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/guest.XXXXXX")
    mkdir -p "$work"/{bin,dev,proc,sys,tmp,etc,root}
    cp "$(command -v busybox)" "$work/bin/busybox"
    local applet
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$work/bin/$applet"
    done
    cp "$HWVMM_ROOT/scripts/guest-init" "$work/init"
    chmod 755 "$work/init"
    make_cpio "$work" "$work.cpio"
    gzip -9n <"$work.cpio" >"$out.new"
    mv "$out.new" "$out"
    rm -rf "$work" "$work.cpio"
}

# build_hwvmm: builds the release binary where it is not given by HWVMM_BIN.
build_hwvmm() {
    (cd "$HWVMM_ROOT" && cargo build --release --quiet)
}
