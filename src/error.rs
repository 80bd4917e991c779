//! Errors, grouped by who can mend them; the program's exit code follows from the group.

use std::path::PathBuf;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, grouped by who can mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request asks for something that cannot be done: another prompt, size or option mends it.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A picture cannot be read or written.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// A model file is missing, damaged or of another kind.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The work does not fit into memory.
    #[error(
        "not enough memory for {what}: needs {} ({needed_bytes} bytes), {} available\nhint: {hint}", gib(*needed_bytes), gib(*available_bytes)
    )]
    OutOfMemory {
        /// What was about to be placed.
        what: String,
        /// Bytes it needs.
        needed_bytes: u64,
        /// Bytes that are free or allowed.
        available_bytes: u64,
        /// The nearest setting that would fit.
        hint: String,
    },
    /// The caller cancelled the request.
    #[error("cancelled")]
    Cancelled,
    /// A stage produced NaN or infinity; nothing was written.
    #[error("{stage} produced {count} values that are not finite, of {total}\nhint: {hint}")]
    NotFinite {
        /// The stage that produced them.
        stage: &'static str,
        /// How many values are NaN or infinite.
        count: usize,
        /// How many values were looked at.
        total: usize,
        /// What may help.
        hint: &'static str,
    },
    /// A file operation failed; the source names the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A tensor operation failed inside the engine or its device.
    #[error("tensor operation failed: {0}")]
    Tensor(#[source] candle_core::Error),
    /// The GPU failed while it computed; this process cannot use it any more.
    #[error("the GPU failed: {reason}\nhint: {hint}")]
    Device {
        /// What the driver said.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
}

/// What is wrong with a request.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum RequestError {
    /// A field's value is outside what is accepted.
    #[error("{field}: {found}, expected {expected}")]
    Field {
        /// The field or flag.
        field: &'static str,
        /// What was given.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A plan that cannot be carried out.
    #[error("plan, {place}: {found}, expected {expected}")]
    Plan {
        /// Where in the plan.
        place: String,
        /// What is there.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A planning agent's reply that was cut off.
    #[error(
        "the planner's {what} was not finished after {tokens} tokens: {produced:?}\nhint: allow more with --planner-tokens, or ask for less at once"
    )]
    Unfinished {
        /// What it was writing.
        what: &'static str,
        /// Tokens written.
        tokens: usize,
        /// What they say.
        produced: String,
    },
    /// A planning agent's reply that breaks its format.
    #[error(
        "the planner's {what} cannot be read: {reason}, in {reply:?}\nhint: leave the grammar on, or edit with --strategy direct"
    )]
    Malformed {
        /// What it was writing.
        what: &'static str,
        /// What is wrong.
        reason: String,
        /// The reply.
        reply: String,
    },
    /// A file cannot be written; nothing is left behind.
    #[error("{path}: cannot write the file: {reason}\nhint: {hint}")]
    Output {
        /// The output.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The model cannot do what is asked.
    #[error("{model} does not support {what}\nhint: {hint}")]
    Unsupported {
        /// The model's class or name.
        model: String,
        /// What was asked.
        what: String,
        /// What to do instead.
        hint: String,
    },
}

/// What is wrong with a picture or its file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// The file cannot be read.
    #[error("{name}: cannot read the picture: {reason}\nhint: {hint}")]
    Read {
        /// The file.
        name: String,
        /// What the system said.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// The bytes are not a picture that can be decoded.
    #[error("{name}: cannot decode the picture: {reason}\nhint: {hint}")]
    Decode {
        /// The file, or how the bytes came in.
        name: String,
        /// What the decoder said.
        reason: String,
        /// What to do.
        hint: String,
    },
    /// A limit is exceeded.
    #[error("{name}: {what} {found} is over the limit of {limit}\nhint: {hint}")]
    Limit {
        /// The file, or how the bytes came in.
        name: String,
        /// What is limited: bytes, side, pixels.
        what: &'static str,
        /// What was found.
        found: u64,
        /// The limit.
        limit: u64,
        /// What to do.
        hint: String,
    },
    /// The output exists already.
    #[error("{path}: already exists\nhint: choose another name or pass --force")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output cannot be written; nothing is left behind.
    #[error("{path}: cannot write the picture: {reason}\nhint: {hint}")]
    Write {
        /// The output.
        path: PathBuf,
        /// What the system said.
        reason: String,
        /// What to do.
        hint: String,
    },
}

/// What is wrong with a model's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file is not there.
    #[error("{path}: not found ({what})\nhint: {hint}")]
    Missing {
        /// Where it was looked for.
        path: String,
        /// What it is for.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A file is there but is not what it should be.
    #[error("{path}: {found}, expected {expected}\nhint: {hint}")]
    Corrupt {
        /// The file.
        path: String,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
        /// What to do.
        hint: String,
    },
    /// A config's field has a value that the engine does not compute.
    #[error("{path}: field {field}: {found}, expected {expected}")]
    Config {
        /// The config file.
        path: String,
        /// The field.
        field: String,
        /// What it holds.
        found: String,
        /// What is supported.
        expected: String,
    },
    /// The folder holds a pipeline of another kind.
    #[error("{path}: found {found}, expected one of: {expected}")]
    Kind {
        /// The file that names the class.
        path: String,
        /// The class found.
        found: String,
        /// The classes supported.
        expected: String,
    },
    /// A tensor that the model needs is not in the file.
    #[error("{path}: tensor {tensor} is missing{near}")]
    TensorMissing {
        /// The weight file or folder.
        path: String,
        /// The tensor's name.
        tensor: String,
        /// The closest name that is there, as ` (closest: …)`, or nothing.
        near: String,
    },
    /// A tensor has another shape than the config says.
    #[error("{path}: tensor {tensor} has shape {found:?}, expected {expected:?}")]
    TensorShape {
        /// The weight file or folder.
        path: String,
        /// The tensor's name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape the config asks for.
        expected: Vec<usize>,
    },
    /// A tensor has a type that is not supported.
    #[error(
        "{path}: tensor {tensor} has type {found}, supported: {supported}\nhint: use a file in another type, such as bf16, Q8_0 or Q4_K_M"
    )]
    TensorType {
        /// The weight file or folder.
        path: String,
        /// The tensor's name.
        tensor: String,
        /// The type in the file.
        found: String,
        /// The types supported.
        supported: &'static str,
    },
    /// Tensors of the file that nothing has read.
    #[error(
        "{path}: {count} tensors are not part of the model: {names}\nhint: the file belongs to another model or version"
    )]
    TensorsUnused {
        /// The weight file or folder.
        path: String,
        /// How many.
        count: usize,
        /// The first few names.
        names: String,
    },
}

/// Bytes as flags take them.
fn gib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three places are shown")]
    let gib = bytes as f64 / f64::from(1 << 30);
    format!("{gib:.3} GiB")
}

impl Error {
    /// Whether the file is at fault, for a caller that tries another one.
    #[must_use]
    pub fn is_model(&self) -> bool {
        matches!(self, Self::Model(_))
    }

    /// A request field with an unacceptable value.
    pub(crate) fn field(
        field: &'static str,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        RequestError::Field { field, found: found.to_string(), expected: expected.to_string() }
            .into()
    }
}
