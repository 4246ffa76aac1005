# Shared by the scripts: where things are kept, what ends with a script, what must be installed, the guest's kernel.
# Source it; it sets -euo pipefail and an EXIT trap, and defines functions and the variables below.
# shellcheck shell=bash
set -euo pipefail

HWVMM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that is downloaded or made lives here; deleting it is always safe.
HWVMM_LAB=${HWVMM_LAB:-${XDG_CACHE_HOME:-$HOME/.cache}/hwvmm-lab}
HWVMM_BIN=${HWVMM_BIN:-${CARGO_TARGET_DIR:-$HWVMM_ROOT/target}/release/hwvmm}
# The scripts that wait for this one, then this one: a lab ends when one of them is gone (see scripts/lab).
[[ " ${HWVMM_OWNERS-} " = *" $$ "* ]] || export HWVMM_OWNERS="${HWVMM_OWNERS:+$HWVMM_OWNERS }$$"

say() { printf '%s\n' "$*" >&2; }
die() { say "${0##*/}: $*"; exit 125; }

# plan WHAT TIME DISK: says what the script is about to do. Only in the script that a person started.
plan() {
    [ "$HWVMM_OWNERS" != "$$" ] || say "${0##*/}: $1. Time: $2. Disk: $3."
}

# For loops over arguments: need_value "$@" checks that the option $1 has a value, refuse "$1" ends with the usage on stderr.
need_value() { [ $# -ge 2 ] || die "$1 takes a value (see --help)"; }
refuse() {
    usage >&2
    die "unknown argument '$1'"
}
# one_of OPTION VALUE ALLOWED...: checks that VALUE is one of the others.
one_of() {
    local option=$1 value=$2 allowed
    shift 2
    for allowed in "$@"; do [ "$value" != "$allowed" ] || return 0; done
    die "$option takes one of: $*; not '$value'"
}
# whole_number OPTION VALUE: checks that it is one.
whole_number() { case $2 in '' | *[!0-9]*) die "$1 takes a whole number, not '$2'" ;; esac; }

# What ends with the script, however it ends (the EXIT trap runs for SIGINT, SIGTERM and SIGHUP too).
hwvmm_folders=() hwvmm_children=()
hwvmm_terminal=$(stty -g 2>/dev/null) || hwvmm_terminal=''
finish() {
    local status=$? child
    trap - EXIT
    trap '' INT TERM HUP
    for child in ${hwvmm_children[@]+"${hwvmm_children[@]}"}; do end_tree "$child"; done
    for child in ${hwvmm_children[@]+"${hwvmm_children[@]}"}; do wait "$child" || true; done
    [ -z "$hwvmm_terminal" ] || stty "$hwvmm_terminal" 2>/dev/null || true
    [ ${#hwvmm_folders[@]} = 0 ] || rm -rf "${hwvmm_folders[@]}"
    exit "$status"
}
trap finish EXIT

# make_work PREFIX: makes a folder PREFIX.XXXXXX, removed when the script ends, and sets $work to it.
make_work() {
    mkdir -p "${1%/*}"
    work=$(mktemp -d "$1.XXXXXX")
    hwvmm_folders+=("$work")
}

# end_tree PID: sends SIGTERM to a process and to all that it started.
end_tree() {
    local child children
    children=$(cat "/proc/$1/task/$1/children" 2>/dev/null) || true
    kill "$1" 2>/dev/null || true
    for child in $children; do end_tree "$child"; done
}

# wait_for PID: waits for a child that is in hwvmm_children, takes it out of there, and returns its status.
wait_for() {
    local status=0 child left=()
    wait "$1" || status=$?
    for child in "${hwvmm_children[@]}"; do [ "$child" = "$1" ] || left+=("$child"); done
    hwvmm_children=(${left[@]+"${left[@]}"})
    return "$status"
}

# interruptible COMMAND...: runs a program or a function so that a signal ends this script, and the command with it, at once. A shell
# that waits for a foreground command handles a signal only after that.
interruptible() {
    if [ "$(type -t "$1")" = function ]; then "$@" <&0 &
    else env --default-signal=INT,QUIT "$@" <&0 &
    fi
    local child=$!
    hwvmm_children+=("$child")
    wait_for "$child"
}

# run_lab ARGUMENT...: scripts/lab, ended with this script.
run_lab() { interruptible "$HWVMM_ROOT/scripts/lab" "$@"; }

# locked NAME COMMAND...: runs it while no other script runs one of this NAME.
locked() {
    local lock=$HWVMM_LAB/work/$1.lock
    shift
    mkdir -p "${lock%/*}"
    (
        flock 9
        "$@"
    ) 9>"$lock"
}

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
    # What dpkg says comes through apt's terminal, to stdout.
    local said
    said=$(as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}") ||
        die "apt-get cannot install ${missing[*]}: $(tail -n 30 <<<"$said")"
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

# Where the guest's kernel is: another flavour of Debian's beside the usual one, such as HWVMM_GUEST_KERNEL=cloud; or `backports`, that of
# Debian 12's backports (Linux 6.12), whatever this host is.
HWVMM_GUEST_KERNEL=${HWVMM_GUEST_KERNEL:-}
HWVMM_KERNEL_DIR=$HWVMM_LAB/kernel${HWVMM_GUEST_KERNEL:+-$HWVMM_GUEST_KERNEL}

# guest_kernel: fetches Debian's kernel (no install) into $HWVMM_KERNEL_DIR: vmlinuz, modules/, version.
guest_kernel() {
    if have_kernel; then return 0; fi
    need_packages kmod
    locked kernel fetch_kernel
}

have_kernel() { [ -s "$HWVMM_KERNEL_DIR/version" ] && [ -s "$HWVMM_KERNEL_DIR/modules/modules.dep" ]; }

# backports_apt DIR: sets $apt to options with which apt knows Debian 12's backports alone, and keeps what it keeps in DIR.
backports_apt() {
    mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
    echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main' >"$1/list"
    apt=(-o "Dir::Etc::SourceList=$1/list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$1/lists" -o "Dir::Cache=$1/cache"
        -o APT::Sandbox::User=root)
}

fetch_kernel() {
    # By another script, while this one waited.
    if have_kernel; then return 0; fi
    local work package dir=$HWVMM_KERNEL_DIR meta=linux-image-${HWVMM_GUEST_KERNEL:+$HWVMM_GUEST_KERNEL-}amd64
    local apt=() update=(as_root apt-get -qq update)
    work=$(mktemp -d "$HWVMM_LAB/work/kernel.XXXXXX")
    if [ "$HWVMM_GUEST_KERNEL" = backports ]; then
        meta=linux-image-amd64
        backports_apt "$work/apt"
        update=(apt-get "${apt[@]}" -qq update)
    fi
    # Nothing, where apt has no lists yet.
    of_meta() { { apt-cache ${apt[@]+"${apt[@]}"} depends "$meta" 2>/dev/null || true; } | awk '/Depends: linux-image/ && !found {print $2; found = 1}'; }
    package=$(of_meta)
    if [ -z "$package" ]; then
        "${update[@]}"
        package=$(of_meta)
    fi
    [ -n "$package" ] || die "apt has no package $meta: check the network and /etc/apt/sources.list"
    say "fetching Debian's kernel: $package (about 70 MB, once)"
    download() { (cd "$work" && apt-get ${apt[@]+"${apt[@]}"} -qq download "$package" 2>/dev/null); }
    download || { "${update[@]}"; download; } ||
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

# guest_modules DIR: copies those modules of the guest's kernel to DIR that a guest with a command needs, with depmod's files.
guest_modules() {
    local dir=$1 path
    mkdir -p "$dir"
    cp "$HWVMM_KERNEL_DIR"/modules/modules.{dep,builtin,softdep,order} "$dir/"
    awk -F: '
        { name = $1; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name) }
        name ~ /^(virtio_pci|virtio_mmio|vmw_vsock_virtio_transport|virtio_console|virtiofs|overlay|virtio_blk|crc32c_generic|ext4|sha256_ssse3)$/ { print $1; n = split($2, need, " "); for (i = 1; i <= n; i++) print need[i] }
        ' "$dir/modules.dep" | sort -u >"$dir/needed"
    while read -r path; do
        mkdir -p "$dir/${path%/*}"
        cp "$HWVMM_KERNEL_DIR/modules/$path" "$dir/$path"
    done <"$dir/needed"
    rm "$dir/needed"
}

# guest_vmlinux: unpacks $HWVMM_LAB/kernel/vmlinux, the ELF file in Debian's vmlinuz. Needs $HWVMM_BIN.
guest_vmlinux() {
    local out=$HWVMM_LAB/kernel/vmlinux new
    [ ! -s "$out" ] || return 0
    new=$(mktemp "$out.XXXXXX")
    "$HWVMM_BIN" unpack "$HWVMM_LAB/kernel/vmlinuz" -o "$new" >&2
    chmod 644 "$new"
    mv "$new" "$out"
}

# guest_folder: makes $HWVMM_LAB/guest, with the names that README.md uses: vmlinuz, vmlinux, modules, initramfs.cpio.gz.
guest_folder() {
    guest_kernel
    guest_vmlinux
    guest_initramfs
    ln -sf ../kernel/vmlinuz ../kernel/vmlinux "$HWVMM_LAB/guest/"
    ln -sfn ../kernel/modules "$HWVMM_LAB/guest/modules"
}

# result_folder DIR: makes a folder for results, in which files of earlier runs are deleted. One with other files is refused.
result_folder() {
    local mark=$1/.hwvmm-results
    mkdir -p "$1"
    [ -e "$mark" ] || [ -z "$(ls -A "$1")" ] ||
        die "$1 has files that are no results of an earlier run, and would be deleted: name a new folder"
    : >"$mark"
}

# build_hwvmm: builds the release binary, unless HWVMM_BIN names another one.
build_hwvmm() {
    [ "$HWVMM_BIN" = "${CARGO_TARGET_DIR:-$HWVMM_ROOT/target}/release/hwvmm" ] || return 0
    [ -x "$HWVMM_BIN" ] || say "building hwvmm (about two minutes)"
    (cd "$HWVMM_ROOT" && cargo build --release --quiet)
}

# test_program NAME FILE: copies the test executable of that name, without its debug information. What an instruction of a guest exits for
# does not depend on how the host's side was optimized, and the build for "unit and host tests" is there.
test_program() {
    local program
    program=$(cd "$HWVMM_ROOT" && cargo test --no-run --test "$1" --message-format=json 2>/dev/null |
        sed -n "s/.*\"executable\":\"\([^\"]*$1-[^\"]*\)\".*/\1/p" | tail -n 1)
    [ -n "$program" ] || die "cannot build the test $1: cargo test --no-run --test $1 says why"
    strip -o "$2" "$program"
}

# shellcheck source=initramfs.sh
source "$HWVMM_ROOT/scripts/lib/initramfs.sh"
# shellcheck source=guest-image.sh
source "$HWVMM_ROOT/scripts/lib/guest-image.sh"
