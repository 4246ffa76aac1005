//! Reports of a suite. All text of a guest has been escaped when its result was made; each format adds the escapes of its own.

mod github;
mod html;
mod junit;
mod ktap;
mod text;

pub use github::{Annotations, annotation, step_summary};
pub use html::html;
pub use junit::junit;
pub use ktap::{ktap, ktap_lines};
pub use text::{Colour, line, summary, template_line};
