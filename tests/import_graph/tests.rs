//! The reader of imports, on small crates.

use super::*;

#[test]
fn imports_are_found_in_every_form() {
    let a = r##"
        //! crate::none::X
        use crate::{b::{self, Item}, c::d::{Deep as Other}, std_like};
        use super::none;
        mod inline { use super::super::e::Thing; }
        /* use crate::f::X; */
        const TEXT: &str = "crate::f::X"; const RAW: &str = r#"crate::"f"::X"#;
        fn f<'a>(x: &'a str) -> char { let _ = crate::g::call::<u8>(x); 'x' }
        #[cfg(test)]
        mod tests { use crate::f::X; }
    "##;
    let plain = "pub struct X;";
    let graph = Graph::new([
        ("lib.rs", "mod a; mod b; mod c; mod e; mod f; mod g;"),
        ("a.rs", a),
        ("b.rs", plain),
        ("c/mod.rs", "mod d;"),
        ("c/d.rs", plain),
        ("e.rs", plain),
        ("f.rs", plain),
        ("g.rs", plain),
    ]);
    let found: Vec<&str> = graph.imports["a.rs"].iter().map(String::as_str).collect();
    assert_eq!(found, ["b.rs", "c/d.rs", "e.rs", "g.rs", "lib.rs"]);
    assert!(graph.circles().is_empty());
}

#[test]
fn a_circle_is_found_whichever_way_it_is_written() {
    for (name, files) in [
        ("two files", &[("a.rs", "use crate::b::B;"), ("b.rs", "use super::a::A;")][..]),
        (
            "three files",
            &[("a.rs", "use crate::b::B;"), ("b.rs", "use crate::c::C;"), ("c.rs", "fn f() { crate::a::f() }")],
        ),
        ("by a module's name", &[("a.rs", "use crate::{b}; fn f() { b::g() }"), ("b.rs", "use crate::{a::{f}};")]),
        (
            "by a re-export",
            &[
                ("a/mod.rs", "mod x; mod y; pub use x::X; pub use y::Y;"),
                ("a/x.rs", "use super::Y;"),
                ("a/y.rs", "use crate::a::X;"),
            ],
        ),
        ("parent and child", &[("a/mod.rs", "mod x; pub struct A; fn f() { x::g() }"), ("a/x.rs", "use super::A;")]),
        ("parent and child by use", &[("a/mod.rs", "mod x; use x::X; pub struct A;"), ("a/x.rs", "use super::A;")]),
    ] {
        let graph = Graph::new(files.iter().copied().chain([("lib.rs", "mod a; mod b; mod c;")]));
        let circles = graph.circles();
        assert_eq!(circles.len(), 1, "{name}: {:?}", graph.imports);
        assert!(circles[0].len() >= 2, "{name}: {circles:?}");
    }
}

#[test]
fn what_is_no_circle_is_none() {
    for (name, files) in [
        ("one way", &[("a.rs", "use crate::b::B;"), ("b.rs", "pub struct B;")][..]),
        (
            "a parent that only re-exports",
            &[("a/mod.rs", "mod x; pub use x::X; pub struct A;"), ("a/x.rs", "use super::A;")],
        ),
        ("a parent that only uses", &[("a/mod.rs", "mod x; use x::X;"), ("a/x.rs", "pub struct X;")]),
        (
            "siblings by the parent",
            &[("a/mod.rs", "mod x; mod y; pub use y::Y;"), ("a/x.rs", "use super::Y;"), ("a/y.rs", "")],
        ),
        ("tests", &[("a.rs", "use crate::b::B;"), ("b.rs", "#[cfg(test)] mod tests { use crate::a::A; }")]),
    ] {
        let graph = Graph::new(files.iter().copied().chain([("lib.rs", "mod a; mod b;")]));
        assert!(graph.circles().is_empty(), "{name}: {:?}", graph.circles());
    }
}
