//! Options as given on the command line or in TOML, and how both are joined.

use super::value::{Items, Scalar, Value};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use std::ffi::OsStr;
use std::fmt;
use std::marker::PhantomData;

/// The value of a key in a table of TOML.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Entry {
    One(Scalar),
    Many(Vec<Scalar>),
}

/// Reads a [`Value`] from TOML.
struct FromToml<T>(T);

impl<'de, T: Value> Deserialize<'de> for FromToml<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor(PhantomData)).map(Self)
    }
}

struct OneVisitor<T>(PhantomData<T>);

impl<'de, T: Value> Visitor<'de> for OneVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")?;
        if T::NUMBER {
            f.write_str(", a number")?;
        }
        if T::BOOLEAN {
            f.write_str(", true or false")?;
        }
        if T::usage().is_some() {
            f.write_str(", a table")?;
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        T::parse(OsStr::new(text)).map_err(E::custom)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<T, E> {
        Scalar::Boolean(value).read().map_err(E::custom)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<T, E> {
        Scalar::Integer(value).read().map_err(E::custom)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<T, E> {
        Scalar::Float(value).read().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let mut items = Items::default();
        while let Some((key, entry)) = map.next_entry::<String, Entry>()? {
            match entry {
                Entry::One(value) => items.push(key, value),
                Entry::Many(values) => values.into_iter().for_each(|value| items.push(key.clone(), value)),
            }
        }
        T::from_items(items).map_err(A::Error::custom)
    }
}

struct ListVisitor<T>(PhantomData<T>);

impl<'de, T: Value> Visitor<'de> for ListVisitor<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list, or ")?;
        OneVisitor::<T>(PhantomData).expecting(f)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<T>, E> {
        OneVisitor(PhantomData).visit_str(text).map(|value| vec![value])
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        OneVisitor(PhantomData).visit_map(map).map(|value| vec![value])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
        let mut values = Vec::new();
        while let Some(FromToml(value)) = list.next_element()? {
            values.push(value);
        }
        Ok(values)
    }
}

/// An option as given: `Option<T>` if it is given once at most, `Vec<T>` if it may be given again.
pub(super) trait Given: Sized {
    /// True if it may be given again.
    const REPEATS: bool;

    /// Joins what the command line has with what the file has. One value of the command line replaces that of the file;
    /// a list of the command line comes behind that of the file.
    fn merge(command_line: Self, file: Self) -> Self;

    /// Deserializes the option from TOML: one value, or for an option that may be given again a value or a list.
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error>;
}

impl<T: Value> Given for Option<T> {
    const REPEATS: bool = false;

    fn merge(command_line: Self, file: Self) -> Self {
        command_line.or(file)
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor(PhantomData)).map(Some)
    }
}

impl<T: Value> Given for Vec<T> {
    const REPEATS: bool = true;

    fn merge(command_line: Self, file: Self) -> Self {
        file.into_iter().chain(command_line).collect()
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListVisitor(PhantomData))
    }
}

/// Deserializes an option from TOML, as a function for serde's `deserialize_with`.
pub(super) fn from_toml<'de, D: Deserializer<'de>, G: Given>(deserializer: D) -> Result<G, D::Error> {
    G::read(deserializer)
}
