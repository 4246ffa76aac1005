# The archives that Linux starts from: the guests' and the lab's. Sourced by common.sh.
# shellcheck shell=bash

# make_cpio FOLDER OUT: packs FOLDER as a newc archive whose bytes depend on its contents only. Sets the times of its files.
make_cpio() {
    find "$1" -exec touch -h -d @0 {} +
    (cd "$1" && find . -print0 | LC_ALL=C sort -z |
        cpio --null --quiet --create --format=newc --reproducible --owner=0:0) >"$2"
}

# recipe INPUT...: prints a checksum of what something is made from: the contents of files, the text of functions, other words.
recipe() {
    local input
    for input in "$@"; do
        if [ "$(type -t "$input")" = function ]; then declare -f "$input"
        elif [ -f "$input" ]; then sha256sum <"$input"
        else printf '%s\n' "$input"
        fi
    done | sha256sum | cut -d ' ' -f 1
}

# initramfs OUT FILL INPUT...: makes the archive OUT (compressed, if its name ends in .gz): busybox, the usual folders, and what the
# function FILL adds to the folder that it is given. It is made again when FILL or the contents of an INPUT change: OUT.recipe has
# their checksum. It is made elsewhere and moved into place, so that another script finds the old archive or the new one, and whole.
initramfs() {
    local out=$1 fill=$2 made_from
    shift 2
    made_from=$(recipe make_initramfs make_cpio add_applets add_modules "$fill" "$(command -v busybox)" "$@")
    is_made_from "$made_from" "$out" || locked "${out##*/}" make_initramfs "$out" "$fill" "$made_from"
}

# is_made_from RECIPE OUT
is_made_from() { [ -s "$2" ] && [ "$(cat "$2.recipe" 2>/dev/null)" = "$1" ]; }

# make_initramfs OUT FILL RECIPE
make_initramfs() {
    local out=$1 fill=$2 work
    # By another script, while this one waited.
    if is_made_from "$3" "$out"; then return 0; fi
    umask 022
    mkdir -p "${out%/*}"
    work=$(mktemp -d "$HWVMM_LAB/work/${out##*/}.XXXXXX")
    mkdir -p "$work/root"/{bin,dev,proc,sys,tmp,etc,root}
    cp "$(command -v busybox)" "$work/root/bin/busybox"
    "$fill" "$work/root"
    make_cpio "$work/root" "$work/out"
    case $out in *.gz)
        gzip -9n "$work/out"
        mv "$work/out.gz" "$work/out"
        ;;
    esac
    echo "$3" >"$work/recipe"
    rm -f "$out.recipe"
    mv "$work/out" "$out"
    mv "$work/recipe" "$out.recipe"
    rm -rf "$work"
}

# add_applets ROOT APPLET...: links to busybox in ROOT/bin.
add_applets() {
    local root=$1 applet
    shift
    for applet in "$@"; do [ "$applet" = busybox ] || ln -sf busybox "$root/bin/$applet"; done
}

# add_modules ROOT MODULE...: puts kernel modules and all that they need into ROOT/modules, in the order to load them. A module's file may have - for _.
add_modules() {
    local root=$1 lists=$HWVMM_KERNEL_DIR/modules module name path line
    shift
    mkdir -p "$root/modules"
    for module in "$@"; do
        name="(^|/)${module//[_-]/[_-]}\.ko(\.xz|\.zst)?"
        line=$(grep -E "$name:" "$lists/modules.dep" | head -n 1 || true)
        if [ -z "$line" ]; then
            grep -qE "$name\$" "$lists/modules.builtin" || die "the kernel in $HWVMM_KERNEL_DIR has no module $module"
            continue
        fi
        # The file itself, then what it needs; the last must be loaded first.
        for path in $(printf '%s\n' "${line/:/}" | tr ' ' '\n' | tac); do
            [ -e "$root/modules/${path##*/}" ] && continue
            cp "$HWVMM_KERNEL_DIR/modules/$path" "$root/modules/"
            echo "${path##*/}" >>"$root/modules/order"
        done
    done
}

# The busybox guest: scripts/in-guest/init.
guest_initramfs() {
    initramfs "$HWVMM_LAB/guest/initramfs.cpio.gz" fill_guest "$HWVMM_ROOT/scripts/in-guest/init"
}
fill_guest() {
    # shellcheck disable=SC2046 # names of applets
    add_applets "$1" $(busybox --list)
    install -m 755 "$HWVMM_ROOT/scripts/in-guest/init" "$1/init"
}

# For a guest with a root file system of its own: scripts/in-guest/root-init.
guest_root_initramfs() {
    guest_kernel
    initramfs "$HWVMM_LAB/guest/root.cpio.gz" fill_root "$HWVMM_ROOT/scripts/in-guest/root-init" "$HWVMM_KERNEL_DIR/version"
}
fill_root() {
    add_applets "$1" sh mount umount insmod sleep mkdir switch_root poweroff cat echo findfs
    add_modules "$1" virtio_pci virtio_mmio virtio_console virtio_blk crc32c_generic crc32c_intel ext4
    install -m 755 "$HWVMM_ROOT/scripts/in-guest/root-init" "$1/init"
}

# The busybox guest with a driver for hvc0.
guest_console_initramfs() {
    guest_kernel
    initramfs "$HWVMM_LAB/guest/console${HWVMM_GUEST_KERNEL:+-$HWVMM_GUEST_KERNEL}.cpio.gz" fill_console \
        "$HWVMM_ROOT/scripts/in-guest/init" "$HWVMM_KERNEL_DIR/version" start_guest_init
}
fill_console() {
    add_applets "$1" sh mount insmod sleep poweroff reboot halt echo cat
    add_modules "$1" virtio_pci virtio_mmio virtio_console
    start_guest_init "$1"
}

# The busybox guest with drivers for a disk, an entropy device and shared folders, too.
guest_devices_initramfs() {
    guest_kernel
    initramfs "$HWVMM_LAB/guest/devices.cpio.gz" fill_devices "$HWVMM_ROOT/scripts/in-guest/init" "$HWVMM_KERNEL_DIR/version" \
        start_guest_init
}
fill_devices() {
    # shellcheck disable=SC2046 # names of applets
    add_applets "$1" $(busybox --list)
    add_modules "$1" virtio_pci virtio_mmio virtio_console virtio_blk virtio_rng virtiofs
    start_guest_init "$1"
}

# start_guest_init ROOT: an /init that loads the modules, and starts scripts/in-guest/init.
start_guest_init() {
    local module
    {
        printf '#!/bin/sh\nmount -t devtmpfs dev /dev\n'
        if [ -e "$1/modules/order" ]; then while read -r module; do printf 'insmod /modules/%s\n' "$module"; done <"$1/modules/order"; fi
        printf 'exec </dev/console >/dev/console 2>&1\nexec /guest-init\n'
    } >"$1/init"
    chmod 755 "$1/init"
    install -m 755 "$HWVMM_ROOT/scripts/in-guest/init" "$1/guest-init"
}

# The part of the lab that is the same in every run: busybox, KVM's modules, the guest.
lab_initramfs() {
    guest_kernel
    guest_initramfs
    guest_vmlinux
    initramfs "$HWVMM_LAB/l1-base.cpio" fill_lab "$HWVMM_ROOT/scripts/in-lab/init" "$HWVMM_LAB/guest/initramfs.cpio.gz" \
        "$HWVMM_LAB/kernel/version" guest_modules
}
fill_lab() {
    local module file
    mkdir -p "$1"/{out,guest,modules,lib,usr/local/bin,usr/share}
    # shellcheck disable=SC2046 # names of applets
    add_applets "$1" $(busybox --list)
    for module in virt/lib/irqbypass drivers/crypto/ccp/ccp arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
        file=$(find "$HWVMM_LAB/kernel/modules/kernel/${module%/*}" -name "${module##*/}.ko*" 2>/dev/null | head -n 1)
        [ -z "$file" ] || cp "$file" "$1/modules/"
    done
    add_modules "$1/disk" virtio_pci virtio_blk crc32c_generic crc32c-intel ext4
    add_modules "$1/devices" tun vhost_net vhost_vsock loop
    install -m 755 "$HWVMM_ROOT/scripts/in-lab/init" "$1/init"
    install -m 644 "$HWVMM_LAB/kernel/vmlinuz" "$HWVMM_LAB/kernel/vmlinux" "$HWVMM_LAB/guest/initramfs.cpio.gz" "$1/guest/"
    # Beside the kernel, where `hwvmm run /guest/vmlinuz -- COMMAND` looks for them.
    HWVMM_KERNEL_DIR=$HWVMM_LAB/kernel guest_modules "$1/guest/modules"
}
