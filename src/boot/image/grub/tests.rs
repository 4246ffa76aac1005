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

    fn read(&self, _: &str, path: &str) -> Result<Option<String>, SourceError> {
        match path {
            "/boot/grub/custom.cfg" => {
                Ok(Some("set default=own\nmenuentry Own --id own { linux /own $word; }\n".into()))
            }
            "/boot/grub/itself.cfg" => Ok(Some("source $prefix/itself.cfg\n".into())),
            "/boot/grub/damaged.cfg" => {
                Err(SourceError { path: path.into(), why: "the file system cannot be read".into() })
            }
            "/boot/grub/open.cfg" => Ok(Some("menuentry 'x".into())),
            _ => Ok(None),
        }
    }

    fn bls(&self, device: &str, expand: &dyn Fn(&str) -> String) -> Result<Vec<BlsEntry>, SourceError> {
        let text = "title Fedora\nlinux /vmlinuz\noptions $kernelopts\n";
        Ok(BlsEntry::parse("fedora-1.conf", text, expand).into_iter().filter(|_| device == "vol1").collect())
    }
}

fn try_read(text: &str, environment: &str) -> Result<Menu, String> {
    let config = Config { text, environment, device: "vol0", folder: "/boot/grub" };
    menu(&config, &One).map_err(|error| error.to_string())
}

fn read(text: &str, environment: &str) -> Menu {
    try_read(text, environment).expect("a script")
}

#[test]
fn files_that_a_script_reads_are_part_of_it() {
    for command in ["source", ".", "configfile"] {
        let text = format!("menuentry First {{ linux /first; }}\nword=x\n{command} $prefix/custom.cfg\n");
        let menu = read(&text, "");
        let entry = menu.choose(None).expect("an entry");
        assert_eq!((entry.kernel.as_deref(), entry.cmdline.as_str()), (Some("/own"), "x"), "{command}");
    }
    assert!(read("menuentry First { linux /first; }\nsource $prefix/none.cfg\n", "").has_linux(), "there is none");
    for (file, why) in [
        ("itself", "within each other"),
        ("damaged", "/boot/grub/damaged.cfg: the file system cannot be read"),
        ("open", "/boot/grub/open.cfg: line 1: the quote has no end"),
    ] {
        let text = format!("menuentry First {{ linux /first; }}\nsource ($root)/boot/grub/{file}.cfg\n");
        let error = try_read(&text, "").expect_err(file);
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn another_entry_than_the_default_is_not_taken() {
    let text = "function b { linux /good; }\nset default=0\nmenuentry A { b; }\nmenuentry R { linux /bad; }";
    let menu = read(text, "");
    assert!(menu.choose(None).is_none() && menu.has_linux());
    assert_eq!(menu.choose(Some("R")).and_then(|entry| entry.kernel.as_deref()), Some("/bad"));
}

#[test]
fn entries_of_a_submenu_see_its_variables() {
    let menu =
        read("submenu S { set o=\"root=UUID=x\"; menuentry E { linux /k $o; } }\nmenuentry F { linux /f $o; }", "");
    let lines: Vec<_> = menu.entries.iter().map(|entry| entry.cmdline.as_str()).collect();
    assert_eq!(lines, ["root=UUID=x", ""]);
}

#[test]
fn long_conditions_end() {
    let many = |word: &str| word.repeat(40_000);
    for (condition, holds) in [
        (format!("{}true", many("! ")), true),
        (format!("! {}true", many("! ")), false),
        (format!("[ {}x ]", many("! ")), true),
        (format!("[ {}x ]", many("'' -o ")), true),
        (format!("[ {}'' ]", many("x -a ")), false),
    ] {
        let menu = read(&format!("if {condition}; then menuentry A {{ linux /a; }}; fi"), "");
        assert_eq!(menu.has_linux(), holds, "{}", &condition[..20]);
    }
}

#[test]
fn what_is_too_much_is_an_error() {
    let entries = "menuentry A { linux /a; }\n".repeat(257);
    assert!(try_read(&entries, "").expect_err("too many").contains("256 entries"));
    let words = format!("set a={}\n{}", "x".repeat(200_000), "echo $a\n".repeat(100));
    assert!(try_read(&words, "").expect_err("too many").contains("16 MiB"));
    let titles = format!("set a={}\n{}{}", "x".repeat(200_000), "submenu \"$a\" { ".repeat(20), "} ".repeat(20));
    assert!(try_read(&titles, "").is_ok());
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
    let most = "menuentry a { linux /a; }\n".repeat(256);
    assert_eq!(read(&most, "").entries.len(), 256);
    let nested = format!("{}menuentry a {{ linux /a; }}{}", "submenu s { ".repeat(20), "\n}".repeat(20));
    assert_eq!(read(&nested, "").entries[0].numbers.len(), 21);
    // The values of variables have a budget.
    let grows = format!(
        "menuentry a {{ linux /a $a; }}\na=aaaaaaaaaaaaaaaa\n{}menuentry $a {{ true; }}",
        "a=$a$a\n".repeat(30_000)
    );
    assert!(try_read(&grows, "").expect_err("too much").contains("16 MiB"));
}
