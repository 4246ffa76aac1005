# The Debian system that guests boot from a disk. Sourced by common.sh.
# shellcheck shell=bash

# What the image is made from, as one checksum: the image is made again when it changes.
guest_image_recipe() {
    (cd "$HWVMM_ROOT/scripts" && find in-guest/files lib/guest-image.sh -type f -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum; cat "$HWVMM_LAB/kernel/version" "$HWVMM_LAB/guest/root.cpio.gz.recipe") | sha256sum | cut -d ' ' -f 1
}

# guest_image FORCE: makes $HWVMM_LAB/guest/debian.img, a disk of 2 GiB (sparse) with a Debian 12 system: GPT, and a partition (ext4) with
# the root, the kernel, an initramfs and GRUB's configuration, but no GRUB. And debian.key, a key for ssh that root in it accepts.
# FORCE (yes or no): also where they are up to date.
guest_image() {
    need_packages cpio busybox-static
    # The usual kernel, whatever other one this is for.
    HWVMM_GUEST_KERNEL='' HWVMM_KERNEL_DIR=$HWVMM_LAB/kernel guest_kernel
    HWVMM_GUEST_KERNEL='' HWVMM_KERNEL_DIR=$HWVMM_LAB/kernel guest_root_initramfs
    [ "$1" = no ] && have_guest_image && return 0
    need_packages mmdebstrap e2fsprogs fdisk openssh-client
    locked debian-image make_guest_image "$1"
}

have_guest_image() {
    local out=$HWVMM_LAB/guest/debian.img
    [ -s "$out" ] && [ "$(cat "$out.recipe" 2>/dev/null)" = "$(guest_image_recipe)" ]
}

make_guest_image() {
    # By another script, while this one waited.
    if [ "$1" = no ] && have_guest_image; then return 0; fi
    local out=$HWVMM_LAB/guest/debian.img recipe
    recipe=$(guest_image_recipe)
    mkdir -p "$HWVMM_LAB/work" "$HWVMM_LAB/guest"
    # What a killed script has left. The lock is held: no other script makes an image.
    as_root rm -rf "$HWVMM_LAB/work/image."*
    local work; work=$(mktemp -d "$HWVMM_LAB/work/image.XXXXXX")
    say "making a Debian 12 system: about 2 minutes and 1 GB of disk, once"
    say "  1/3 downloading and installing its packages (about 110 MB)"
    local packages=systemd-sysv,udev,dbus,openssh-server,iproute2,iputils-ping,fio,iperf3,kmod,tcc,libc6-dev,socat,procps
    packages+=,systemd-resolved,cloud-init
    as_root mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='APT::Install-Recommends "false"' \
        bookworm "$work/root" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2; as_root rm -rf "$work"; die "mmdebstrap failed"; }
    say "  2/3 the kernel and its modules, units and the key for ssh"
    as_root cp -R "$HWVMM_ROOT/scripts/in-guest/files/." "$work/root/"
    guest_image_modules "$work/root"
    guest_image_units "$work/root"
    local uuid; uuid=$(cat /proc/sys/kernel/random/uuid)
    guest_image_boot "$work/root" "$uuid"
    ssh-keygen -q -t ed25519 -N '' -C hwvmm-guest -f "$work/debian.key"
    as_root install -d -m 700 "$work/root/root/.ssh"
    as_root install -m 600 "$work/debian.key.pub" "$work/root/root/.ssh/authorized_keys"
    say "  3/3 the partition and its file system"
    as_root truncate -s 2G "$work/debian.img"
    # A MiB in front of the partition, and one behind it for the second copy of the table.
    printf 'label: gpt\nstart=1MiB, size=2046MiB, name=root\n' | as_root /sbin/sfdisk --quiet "$work/debian.img"
    as_root /sbin/mkfs.ext4 -q -F -L root -U "$uuid" -E offset=$((1 << 20)) -d "$work/root" "$work/debian.img" 2046M
    as_root chown "$(id -u)" "$work/debian.img"
    rm -f "$out.recipe"
    mv -f "$work/debian.key" "$HWVMM_LAB/guest/debian.key"
    mv -f "$work/debian.key.pub" "$HWVMM_LAB/guest/debian.key.pub"
    mv -f "$work/debian.img" "$out"
    echo "$recipe" >"$out.recipe"
    as_root rm -rf "$work"
}

# guest_image_modules ROOT: the modules that a guest of hwvmm has a use for: all of them are 400 MB.
guest_image_modules() {
    local root=$1 version folder
    version=$(cat "$HWVMM_LAB/kernel/version")
    as_root mkdir -p "$root/lib/modules/$version"
    for folder in drivers/virtio drivers/block drivers/net drivers/char/hw_random drivers/firmware drivers/cdrom fs/fuse fs/ext4 fs/overlayfs \
        fs/fat fs/isofs fs/nls fs/autofs fs/jbd2 fs/mbcache.ko net/vmw_vsock net/core crypto lib arch/x86/crypto; do
        [ -e "$HWVMM_LAB/kernel/modules/kernel/$folder" ] || continue
        as_root mkdir -p "$root/lib/modules/$version/kernel/$(dirname "$folder")"
        as_root cp -R "$HWVMM_LAB/kernel/modules/kernel/$folder" "$root/lib/modules/$version/kernel/$folder"
    done
    as_root rm -rf "$root/lib/modules/$version/kernel/drivers/net/"{wireless,ethernet,usb,can}
    as_root cp "$HWVMM_LAB"/kernel/modules/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$version/"
    as_root chroot "$root" depmod "$version"
}

# guest_image_boot ROOT UUID: what a boot loader starts the system by: kernel, initramfs, the links to them, and the configuration as
# Debian's grub-mkconfig writes it. UUID: of its file system.
guest_image_boot() {
    local root=$1 uuid=$2 version
    version=$(cat "$HWVMM_LAB/kernel/version")
    as_root mkdir -p "$root/boot/grub"
    as_root install -m 644 "$HWVMM_LAB/kernel/vmlinuz" "$root/boot/vmlinuz-$version"
    as_root install -m 644 "$HWVMM_LAB/guest/root.cpio.gz" "$root/boot/initrd.img-$version"
    as_root ln -s "boot/vmlinuz-$version" "$root/vmlinuz"
    as_root ln -s "boot/initrd.img-$version" "$root/initrd.img"
    echo "UUID=$uuid / ext4 defaults 0 1" | as_root tee "$root/etc/fstab" >/dev/null
    as_root tee "$root/boot/grub/grub.cfg" >/dev/null <<EOF
if [ -s \$prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
set default="0"
if [ x"\${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
set timeout=0
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux --class gnu --class os \$menuentry_id_option 'gnulinux-simple-$uuid' {
	insmod gzio
	insmod part_gpt
	insmod ext2
	search --no-floppy --fs-uuid --set=root $uuid
	echo	'Loading Linux $version ...'
	linux	/boot/vmlinuz-$version root=UUID=$uuid ro quiet console=ttyS0
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-$version
}
submenu 'Advanced options for Debian GNU/Linux' \$menuentry_id_option 'gnulinux-advanced-$uuid' {
	menuentry 'Debian GNU/Linux, with Linux $version (recovery mode)' --class debian --class gnu-linux \$menuentry_id_option 'gnulinux-$version-recovery-$uuid' {
		insmod part_gpt
		insmod ext2
		search --no-floppy --fs-uuid --set=root $uuid
		linux	/boot/vmlinuz-$version root=UUID=$uuid ro single console=ttyS0
		initrd	/boot/initrd.img-$version
	}
}
EOF
}

# guest_image_units ROOT: which of systemd's units run.
guest_image_units() {
    local root=$1
    as_root chroot "$root" systemctl --quiet enable hwvmm-guest.service
    # A udev rule starts these where there is a network card to configure (in-guest/files/etc/udev/rules.d).
    as_root chroot "$root" systemctl --quiet disable systemd-networkd.service systemd-networkd.socket \
        systemd-networkd-wait-online.service systemd-network-generator.service systemd-resolved.service
    as_root ln -sf /run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"
    # None of these has work in a guest like this.
    as_root chroot "$root" systemctl --quiet mask e2scrub_reap.service systemd-pstore.service apt-daily.timer \
        apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer getty@tty1.service \
        proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount systemd-binfmt.service
}
