//! Exit codes, and how an error is shown.

use std::process::ExitCode;

use pentimento::{Error, RequestError};

/// The exit code that an error's group asks for.
pub(crate) fn code(error: &Error) -> u8 {
    match error {
        Error::Request(RequestError::Field { .. } | RequestError::Plan { .. }) => 2,
        Error::Model(_) => 3,
        Error::OutOfMemory { .. } => 4,
        Error::Cancelled => 130,
        _ => 1,
    }
}

/// The group's name in JSON.
fn kind(error: &Error) -> &'static str {
    match error {
        Error::Request(_) => "request",
        Error::Picture(_) => "picture",
        Error::Model(_) => "model",
        Error::OutOfMemory { .. } => "out_of_memory",
        Error::Cancelled => "cancelled",
        Error::NotFinite { .. } => "not_finite",
        Error::Device { .. } => "device",
        Error::Io(_) => "io",
        _ => "internal",
    }
}

/// Shows an error on stderr, and as JSON on stdout where that was asked for.
pub(crate) fn report(error: &Error, json: bool) -> ExitCode {
    super::say(&format!("error: {error}"));
    if json {
        let text = error.to_string();
        let (message, hint) = match text.split_once("\nhint: ") {
            Some((message, hint)) => (message, Some(hint)),
            None => (text.as_str(), None),
        };
        let value = serde_json::json!({
            "error": { "kind": kind(error), "message": message, "hint": hint, "exit_code": code(error) }
        });
        // Where stdout is what failed, stderr and the exit code tell.
        drop(super::print_line(&value.to_string()));
    }
    ExitCode::from(code(error))
}
