//! Why a profile cannot be rendered.

use thiserror::Error;

/// Why a profile cannot be rendered.
#[derive(Debug, Error)]
pub enum RenderError {
    /// The profile cannot be written as JSON.
    #[error("cannot write the profile as JSON")]
    Json(#[from] serde_json::Error),
    /// A flame graph of no exits.
    #[error("this profile has no exits: there is nothing to draw")]
    NoExits,
    /// The flame graph cannot be drawn.
    #[error("cannot draw the flame graph")]
    Flame(#[source] std::io::Error),
}
