//! What a running request tells its caller, and how the caller stops it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{
    error::{Error, Result},
    pixels::Picture,
    plan::Plan,
};

/// Stops a request from another thread; honoured within one transformer block.
///
/// ```
/// let cancel = pentimento::CancelToken::new();
/// let handle = cancel.clone();
/// handle.cancel();
/// assert!(cancel.check().is_err());
/// ```
#[derive(Debug, Clone, Default)]
pub struct CancelToken {
    flag: Arc<AtomicBool>,
    /// The token that this one is a [`child`](Self::child) of.
    parent: Option<Arc<CancelToken>>,
}

impl CancelToken {
    /// A token that is not cancelled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A token that is cancelled when `flag` becomes true, for signal handlers.
    #[must_use]
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Self { flag, parent: None }
    }

    /// A token that is cancelled when this one is, or by itself.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { flag: Arc::default(), parent: Some(Arc::new(self.clone())) }
    }

    /// Asks every request that holds this token to stop.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
            || self.parent.as_ref().is_some_and(|parent| parent.is_cancelled())
    }

    /// # Errors
    /// [`Error::Cancelled`] after [`cancel`](Self::cancel).
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// The stages of a request, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Stage {
    /// Reading weights into memory.
    Load,
    /// The planner takes the request apart and orders its steps.
    Plan,
    /// The vision-language model reads prompt and pictures.
    EncodePrompt,
    /// The autoencoder turns the pictures into latents.
    EncodePicture,
    /// The denoising loop.
    Denoise,
    /// The autoencoder turns latents into a picture.
    Decode,
    /// The vision-language model writes an answer.
    Generate,
    /// Edits are made and judged.
    Measure,
    /// Weights are written as another file; a step is a MiB of the numbers that are read, as f32.
    Convert,
    /// Weight files are read through and checked; a step is a MiB.
    Verify,
}

impl Stage {
    /// The name in JSON and metadata.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Plan => "plan",
            Self::EncodePrompt => "encode_prompt",
            Self::EncodePicture => "encode_picture",
            Self::Denoise => "denoise",
            Self::Decode => "decode",
            Self::Generate => "generate",
            Self::Measure => "measure",
            Self::Convert => "convert",
            Self::Verify => "verify",
        }
    }

    /// A word for a person.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Load => "loading",
            Self::Plan => "planning",
            Self::EncodePrompt => "reading the request",
            Self::EncodePicture => "encoding the picture",
            Self::Denoise => "denoising",
            Self::Decode => "decoding",
            Self::Generate => "answering",
            Self::Measure => "measuring",
            Self::Convert => "converting",
            Self::Verify => "checking",
        }
    }
}

/// One thing that happened in a request.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Step `step` (from 0) of `of` is about to begin; `elapsed` since the stage began.
    Step {
        /// The stage.
        stage: Stage,
        /// Steps finished so far.
        step: usize,
        /// Steps in the stage.
        of: usize,
        /// Time since the stage began.
        elapsed: Duration,
    },
    /// A stage ended.
    StageDone {
        /// The stage.
        stage: Stage,
        /// How long it took.
        elapsed: Duration,
    },
    /// A plan was made, or the one that came with the request is carried out.
    Planned(&'a Plan),
    /// A pass of several begins.
    StepStarted {
        /// Its number, from 0.
        index: usize,
        /// Passes in all.
        of: usize,
        /// What the editor is told.
        prompt: &'a str,
    },
    /// A pass of several ended.
    StepDone {
        /// Its number, from 0.
        index: usize,
        /// Passes in all.
        of: usize,
        /// The picture so far, as it would be returned.
        picture: &'a Picture,
    },
    /// Something was done, but not quite as asked.
    Note(&'a str),
    /// A piece of generated text.
    Text(&'a str),
}

/// Receives the events of a request, on the thread that runs it.
///
/// ```
/// use pentimento::{Event, Observer};
///
/// let observer = |event: &Event<'_>| {
///     if let Event::Step { stage, step, of, elapsed } = event {
///         eprintln!("{} {step}/{of} after {elapsed:?}", stage.label());
///     }
/// };
/// observer.event(&Event::Note("closures hear every event"));
/// ```
pub trait Observer {
    /// Called for each event; should return at once.
    fn event(&self, event: &Event<'_>);
}

/// Hears nothing.
impl Observer for () {
    fn event(&self, _: &Event<'_>) {}
}

/// A closure hears everything.
impl<F: Fn(&Event<'_>)> Observer for F {
    fn event(&self, event: &Event<'_>) {
        self(event);
    }
}
