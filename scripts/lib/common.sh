# Shared by the scripts: where things are kept, what must be installed, the guest and its kernel.
# Source it; it sets -euo pipefail and defines functions only (plus the variables below).
# shellcheck shell=bash
set -euo pipefail

HWVMM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
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

# need_rust [COMPONENT...]: checks that cargo is there, new enough for Cargo.toml, and has the components (clippy, rustfmt).
# A rustup that is not on the PATH is used where the PATH has no cargo that will do.
need_rust() {
    local least have component
    least=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$HWVMM_ROOT/Cargo.toml" | head -n 1)
    if ! rust_is_at_least "$least" && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
    command -v cargo >/dev/null ||
        die "Rust $least or newer is needed, and there is no cargo on the PATH: install Rust from https://rustup.rs, then run this again"
    have=$(rust_version)
    [ -n "$have" ] || die "\`rustc --version\` fails: $(rustc --version 2>&1 | head -n 1); install Rust $least or newer from https://rustup.rs"
    rust_is_at_least "$least" ||
        die "Rust $least or newer is needed, this is $have ($(command -v cargo)): install it from https://rustup.rs, then run this again"
    for component in "$@"; do
        case $component in
            rustfmt) cargo fmt --version >/dev/null 2>&1 ;;
            *) cargo "$component" --version >/dev/null 2>&1 ;;
        esac || die "Rust has no $component here, and it is needed: rustup component add $component"
    done
}

# The version of rustc (1.88.0), or nothing.
rust_version() { rustc --version 2>/dev/null | awk '$1 == "rustc" { print $2 }'; }

# rust_is_at_least VERSION: cargo is there, and rustc is of VERSION or newer.
rust_is_at_least() {
    local have; have=$(rust_version)
    command -v cargo >/dev/null && [ -n "$have" ] && [ "$(printf '%s\n' "$1" "${have%%-*}" | sort -V | head -n 1)" = "$1" ]
}

# The packages that the lab and its guest are made from.
lab_packages() { need_packages qemu-system-x86 seabios busybox-static cpio; }

# Where the guest's kernel is: another flavour of Debian's beside the usual one, such as HWVMM_GUEST_KERNEL=cloud.
HWVMM_GUEST_KERNEL=${HWVMM_GUEST_KERNEL:-}
HWVMM_KERNEL_DIR=$HWVMM_LAB/kernel${HWVMM_GUEST_KERNEL:+-$HWVMM_GUEST_KERNEL}

# guest_kernel: fetches Debian's kernel (no install) into $HWVMM_KERNEL_DIR: vmlinuz, modules/, version.
guest_kernel() {
    local dir=$HWVMM_KERNEL_DIR meta=linux-image-${HWVMM_GUEST_KERNEL:+$HWVMM_GUEST_KERNEL-}amd64
    [ -s "$dir/version" ] && [ -s "$dir/modules/modules.dep" ] && return 0
    need_packages kmod
    mkdir -p "$HWVMM_LAB/work"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/kernel.XXXXXX")
    local package
    package=$(apt-cache depends "$meta" 2>/dev/null | awk '/Depends: linux-image/ {print $2; exit}')
    if [ -z "$package" ]; then
        as_root apt-get -qq update
        package=$(apt-cache depends "$meta" | awk '/Depends: linux-image/ {print $2; exit}')
    fi
    say "fetching Debian's kernel: $package (about 70 MB, once)"
    (cd "$work" && apt-get -qq download "$package" 2>/dev/null) ||
        { as_root apt-get -qq update; (cd "$work" && apt-get -qq download "$package" 2>/dev/null); } ||
        die "cannot download $package with apt-get: check the network and /etc/apt/sources.list"
    dpkg -x "$work"/"$package"_*.deb "$work/root"
    local version=${package#linux-image-}
    PATH=$PATH:/sbin depmod -b "$work/root" "$version"
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

# guest_initramfs: makes $HWVMM_LAB/guest/initramfs.cpio.gz, a busybox guest (scripts/in-guest/init).
guest_initramfs() {
    local out=$HWVMM_LAB/guest/initramfs.cpio.gz
    [ -s "$out" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/in-guest/init" ] && return 0
    mkdir -p "$HWVMM_LAB/work" "$HWVMM_LAB/guest"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/guest.XXXXXX")
    mkdir -p "$work"/{bin,dev,proc,sys,tmp,etc,root}
    cp "$(command -v busybox)" "$work/bin/busybox"
    local applet
    for applet in $(busybox --list); do
        [ "$applet" = busybox ] || ln -sf busybox "$work/bin/$applet"
    done
    cp "$HWVMM_ROOT/scripts/in-guest/init" "$work/init"
    chmod 755 "$work/init"
    make_cpio "$work" "$work.cpio"
    gzip -9n <"$work.cpio" >"$out.new"
    mv "$out.new" "$out"
    rm -rf "$work" "$work.cpio"
}

# guest_vmlinux: makes $HWVMM_LAB/kernel/vmlinux, the kernel of guest_kernel unpacked. Needs $HWVMM_BIN.
guest_vmlinux() {
    local out=$HWVMM_LAB/kernel/vmlinux
    [ -s "$out" ] && return 0
    "$HWVMM_BIN" unpack "$HWVMM_LAB/kernel/vmlinuz" -o "$out.$$" >&2
    mv "$out.$$" "$out"
}

# guest_folder: makes $HWVMM_LAB/guest, with the names that README.md uses: vmlinuz, vmlinux, initramfs.cpio.gz.
guest_folder() {
    guest_kernel
    guest_vmlinux
    guest_initramfs
    ln -sf ../kernel/vmlinuz ../kernel/vmlinux "$HWVMM_LAB/guest/"
}

# build_hwvmm: builds the release binary where it is not given by HWVMM_BIN.
build_hwvmm() {
    (cd "$HWVMM_ROOT" && cargo build --release --quiet)
}

# add_modules ROOT MODULE...: puts kernel modules and all that they need into ROOT/modules, in the order to load them.
add_modules() {
    local root=$1 module path line
    shift
    mkdir -p "$root/modules"
    for module in "$@"; do
        line=$(grep -E "(^|/)${module}\.ko(\.xz|\.zst)?:" "$HWVMM_KERNEL_DIR/modules/modules.dep" | head -n 1 || true)
        # Built in, then.
        [ -n "$line" ] || continue
        # The file itself, then what it needs; the last must be loaded first.
        for path in $(printf '%s\n' "${line/:/}" | tr ' ' '\n' | tac); do
            [ -e "$root/modules/${path##*/}" ] && continue
            cp "$HWVMM_KERNEL_DIR/modules/$path" "$root/modules/"
            echo "${path##*/}" >>"$root/modules/order"
        done
    done
}

# guest_root_initramfs: makes $HWVMM_LAB/guest/root.cpio.gz (scripts/in-guest/root-init).
guest_root_initramfs() {
    local out=$HWVMM_LAB/guest/root.cpio.gz
    [ -s "$out" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/in-guest/root-init" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/lib/common.sh" ] && return 0
    guest_kernel
    mkdir -p "$HWVMM_LAB/work" "$HWVMM_LAB/guest"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/root.XXXXXX")
    mkdir -p "$work"/{bin,dev,proc,sys}
    cp "$(command -v busybox)" "$work/bin/busybox"
    local applet
    for applet in sh mount umount insmod sleep mkdir switch_root poweroff cat echo; do ln -s busybox "$work/bin/$applet"; done
    add_modules "$work" virtio_pci virtio_mmio virtio_console virtio_blk virtio_rng crc32c_generic crc32c-intel ext4
    cp "$HWVMM_ROOT/scripts/in-guest/root-init" "$work/init"
    chmod 755 "$work/init"
    make_cpio "$work" "$work.cpio"
    gzip -9n <"$work.cpio" >"$out.new"
    mv "$out.new" "$out"
    rm -rf "$work" "$work.cpio"
}

# guest_console_initramfs: makes $HWVMM_LAB/guest/console.cpio.gz: the busybox guest with a driver for hvc0.
guest_console_initramfs() {
    local out=$HWVMM_LAB/guest/console${HWVMM_GUEST_KERNEL:+-$HWVMM_GUEST_KERNEL}.cpio.gz
    [ -s "$out" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/in-guest/init" ] && [ "$out" -nt "$HWVMM_ROOT/scripts/lib/common.sh" ] && return 0
    guest_kernel
    mkdir -p "$HWVMM_LAB/work" "$HWVMM_LAB/guest"
    local work; work=$(mktemp -d "$HWVMM_LAB/work/console.XXXXXX")
    mkdir -p "$work/modules"
    : >"$work/modules/order"
    mkdir -p "$work"/{bin,dev,proc,sys,tmp,etc,root}
    cp "$(command -v busybox)" "$work/bin/busybox"
    local applet
    for applet in sh mount insmod sleep poweroff reboot halt echo cat; do ln -s busybox "$work/bin/$applet"; done
    add_modules "$work" virtio_pci virtio_mmio virtio_console
    {
        printf '#!/bin/sh\nmount -t devtmpfs dev /dev\n'
        while read -r module; do printf 'insmod /modules/%s\n' "$module"; done <"$work/modules/order"
        printf 'exec </dev/console >/dev/console 2>&1\nexec /guest-init\n'
    } >"$work/init"
    cp "$HWVMM_ROOT/scripts/in-guest/init" "$work/guest-init"
    chmod 755 "$work/init" "$work/guest-init"
    make_cpio "$work" "$work.cpio"
    gzip -9n <"$work.cpio" >"$out.new"
    mv "$out.new" "$out"
    rm -rf "$work" "$work.cpio"
}

# shellcheck source=scripts/lib/guest-image.sh
source "$HWVMM_ROOT/scripts/lib/guest-image.sh"
