use super::super::bls::BlsEntry;
use super::super::menu::Menu;
use super::*;

/// One file system, `vol0`, with the UUID `1234`, the label `boot` and the file `/boot/grub/grubenv`.
struct One;

impl Volumes for One {
    fn search(&self, by: By, what: &str) -> Option<String> {
        let found = match by {
            By::Uuid => what == "1234",
            By::Label => what == "boot",
            By::File => what == "/boot/grub/grubenv",
        };
        found.then(|| "vol1".into())
    }

    fn exists(&self, device: &str, path: &str) -> bool {
        device == "vol0" && path == "/boot/grub/grubenv"
    }

    fn bls(&self, device: &str, expand: &dyn Fn(&str) -> String) -> Vec<BlsEntry> {
        let text = "title Fedora\nlinux /vmlinuz\noptions $kernelopts\n";
        BlsEntry::parse("fedora-1.conf", text, expand).into_iter().filter(|_| device == "vol1").collect()
    }
}

fn read(text: &str, environment: &str) -> Menu {
    menu(&Config { text, environment, device: "vol0", folder: "/boot/grub" }, &One).expect("a script")
}

/// As grub-mkconfig of Debian 12 writes it, shortened.
const DEBIAN: &str = r#"
### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="0"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
export menuentry_id_option
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
    save_env saved_entry
  fi
}
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  else
    insmod efi_gop
  fi
}
if loadfont unicode ; then
  set gfxmode=auto
fi
set linux_gfx_mode=
export linux_gfx_mode
menuentry 'Debian GNU/Linux' --class debian --class gnu-linux $menuentry_id_option 'gnulinux-simple-1234' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	set root='hd0,gpt1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  1234
	else
	  search --no-floppy --fs-uuid --set=root 1234
	fi
	echo	'Loading Linux 6.1.0-18-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-18-amd64 root=UUID=1234 ro  console=tty0 console=ttyS0,115200 "dyndbg=file a.c +p"
	echo	'Loading initial ramdisk ...'
	initrd	/boot/early.img /boot/initrd.img-6.1.0-18-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1234' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-17-amd64' --class debian $menuentry_id_option 'gnulinux-6.1.0-17-amd64-advanced-1234' {
		linux	/boot/vmlinuz-6.1.0-17-amd64 root=UUID=1234 ro single $vt_handoff
	}
}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
	fwsetup
}
"#;

#[test]
fn debians_menu_is_read() {
    let menu = read(DEBIAN, "");
    let first = menu.choose(None).expect("an entry");
    assert_eq!(first.titles, ["Debian GNU/Linux"]);
    assert_eq!((first.id.as_str(), first.device.as_str()), ("gnulinux-simple-1234", "vol1"));
    assert_eq!(first.kernel.as_deref(), Some("/boot/vmlinuz-6.1.0-18-amd64"));
    assert_eq!(first.initrds, ["/boot/early.img", "/boot/initrd.img-6.1.0-18-amd64"]);
    assert_eq!(first.cmdline, "root=UUID=1234 ro console=tty0 console=ttyS0,115200 \"dyndbg=file a.c +p\"");
    let listed: Vec<_> = menu.listed().into_iter().map(|entry| entry.number).collect();
    assert_eq!(listed, ["0", "1>0"]);
    let older = menu.choose(Some("1>0")).expect("an entry");
    assert_eq!((older.cmdline.as_str(), older.device.as_str()), ("root=UUID=1234 ro single", "vol0"));
    // What `grub-reboot` leaves.
    let next = read(DEBIAN, "next_entry=gnulinux-advanced-1234>gnulinux-6.1.0-17-amd64-advanced-1234\n");
    assert_eq!(next.choose(None).map(|entry| entry.listed().number).as_deref(), Some("1>0"));
}

#[test]
fn entries_of_the_boot_loader_specification_are_part_of_the_menu() {
    let text = "load_env\nsearch --label boot --set root\nset default=\"${saved_entry}\"\n\
        menuentry a { linux /a; }\nblscfg\n";
    let menu = read(text, "saved_entry=fedora-1\nkernelopts=root=UUID=1 ro\n");
    let entry = menu.choose(None).expect("an entry");
    assert_eq!((entry.listed().number.as_str(), entry.cmdline.as_str()), ("1", "root=UUID=1 ro"));
    assert_eq!((entry.device.as_str(), entry.titles[0].as_str()), ("vol1", "Fedora"));
}

#[test]
fn conditions_are_those_of_test() {
    let holds = |condition: &str| {
        let text = format!("a=b\nif {condition}; then set default=yes; else set default=no; fi");
        read(&text, "").default == "yes"
    };
    for yes in [
        "true",
        "[ $a = b ]",
        "test x$a == xb",
        "[ ! -z \"$a\" ]",
        "[ -n \"$a\" -a $a != c ]",
        "[ $none = b -o 2 -gt 1 ]",
        "[ -s $prefix/grubenv ]",
        "[ -f /boot/grub/grubenv ]",
        "! false",
        "[ \"$feature_all_video_module\" = y ]",
        "search --file /boot/grub/grubenv",
    ] {
        assert!(holds(yes), "{yes}");
    }
    for no in ["false", "[ $a = c ]", "[ \"$none\" ]", "[ -e /x ]", "loadfont x", "[ 1 -ge 2 ]", "search -u 9", "[ ]"] {
        assert!(!holds(no), "{no}");
    }
}

#[test]
fn commands_and_entries_have_a_limit() {
    let many = "menuentry a { linux /a; }\n".repeat(2000);
    assert_eq!(read(&many, "").entries.len(), 256);
    let nested = format!("{}menuentry a {{ linux /a; }}{}", "submenu s { ".repeat(20), "\n}".repeat(20));
    assert_eq!(read(&nested, "").entries[0].numbers.len(), 21);
    // The values of variables have a budget: what comes behind its end is left out.
    let grows = format!(
        "menuentry a {{ linux /a $a; }}\na=aaaaaaaaaaaaaaaa\n{}menuentry $a {{ true; }}",
        "a=$a$a\n".repeat(30_000)
    );
    let menu = read(&grows, "");
    assert_eq!((menu.entries.len(), menu.entries[0].kernel.as_deref()), (1, None));
}
