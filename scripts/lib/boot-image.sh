# Disk images with a boot loader's configuration, as vendors ship them. Sourced by scripts that use them.
# shellcheck shell=bash

# debian_qcow2 OUT: makes OUT, an ext4 file system with the system of guest_image as debian.qcow2, and room for what a guest writes to it. A
# block device would have none: a qcow2 file grows.
debian_qcow2() {
    local dir=$1.root
    mkdir "$dir"
    qemu-img convert -O qcow2 "$HWVMM_LAB/guest/debian.img" "$dir/debian.qcow2"
    truncate -s 1536M "$1"
    mke2fs -q -F -t ext4 -d "$dir" "$1"
    rm -r "$dir"
}

# boot_images DIR: makes DIR/disk.img and DIR/disk.qcow2, a disk with an MBR and two partitions: an ext4 file system with other files, and
# one with the root of a small system, the kernel of $HWVMM_KERNEL_DIR with the modules for a command, an initramfs and grub.cfg in it; and DIR/xfs.img, which has the
# magic number of xfs alone. Needs mke2fs, qemu-img and a busybox without libraries.
boot_images() {
    local dir=$1 uuid=6c1f3a52-0d37-4b7e-9a52-2f0a6b1c9d10
    mkdir -p "$dir/root/"{boot/grub,bin,etc,dev,proc,sys,tmp,run} "$dir/other/lost"
    cp "$HWVMM_KERNEL_DIR/vmlinuz" "$dir/root/boot/vmlinuz-1"
    cp "$HWVMM_LAB/guest/initramfs.cpio.gz" "$dir/root/boot/initrd.img-1"
    ln -s boot/vmlinuz-1 "$dir/root/vmlinuz"
    guest_modules "$dir/root/lib/modules/$(cat "$HWVMM_KERNEL_DIR/version")"
    cp /bin/busybox "$dir/root/bin/busybox"
    for name in sh cat id mkdir mount touch uname; do ln -s busybox "$dir/root/bin/$name"; done
    echo 'of the image' >"$dir/root/etc/marker"
    printf 'root:x:0:0::/root:/bin/sh\nguest:x:1000:5::/tmp:/bin/sh\n' >"$dir/root/etc/passwd"
    cat >"$dir/root/boot/grub/grub.cfg" <<EOF
if [ -s \$prefix/grubenv ]; then load_env; fi
set default="0"
if [ x"\${feature_menuentry_id}" = xy ]; then menuentry_id_option="--id"; else menuentry_id_option=""; fi
menuentry 'Small system' --class gnu-linux \$menuentry_id_option 'small' {
	search --no-floppy --fs-uuid --set=root $uuid
	linux /boot/vmlinuz-1 root=UUID=$uuid ro test=from-the-first-entry
	initrd /boot/initrd.img-1
}
submenu 'Advanced' {
	menuentry 'Small system, by its link' {
		linux (hd0,msdos2)/vmlinuz test=from-the-second-entry
		initrd (hd0,msdos2)/boot/initrd.img-1
	}
}
EOF
    mke2fs -q -F -t ext4 -d "$dir/other" "$dir/other.part" 8M
    mke2fs -q -F -t ext4 -U "$uuid" -L system -d "$dir/root" "$dir/root.part" 96M
    # From sector 2048 on, one behind the other: an entry each with state, type 0x83, first sector and length.
    truncate -s 1M "$dir/disk.img"
    printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\x40\0\0\0\0\0\0\x83\0\0\0\0\x48\0\0\0\0\x03\0' |
        dd of="$dir/disk.img" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$dir/disk.img" bs=1 seek=510 conv=notrunc status=none
    cat "$dir/other.part" "$dir/root.part" >>"$dir/disk.img"
    qemu-img convert -O qcow2 -c "$dir/disk.img" "$dir/disk.qcow2"
    truncate -s 1M "$dir/xfs.img"
    printf XFSB | dd of="$dir/xfs.img" conv=notrunc status=none
    rm -r "$dir/root" "$dir/other" "$dir/root.part" "$dir/other.part"
}
