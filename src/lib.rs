//! Pentimento edits pictures on this machine: one sentence says what should change.
//!
//! | to | use | example |
//! |---|---|---|
//! | edit a picture | [`Engine::edit`] with an [`EditRequest`] | on [`Engine`] |
//! | look at a plan first, change it | [`Assistant::plan`], [`EditRequest::plan`] | on [`plan`] |
//! | ask about a picture | [`Assistant::ask`] with an [`AskRequest`] | on [`Assistant`] |
//! | stop a request | [`CancelToken`] | on [`CancelToken`] |
//! | follow a request | [`Observer`] | on [`Observer`] |
//! | look into a model without loading it | [`ModelInfo::read`] | on [`ModelInfo`] |
//! | read and write pictures | [`pixels`] | on [`pixels::Picture`] |
//!
//! Everything runs on the caller's thread and rayon's pool; nothing is fetched, and nothing leaves
//! the machine. How the crate is laid out: docs/ARCHITECTURE.md.

#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub mod check;
pub mod diffusion;
pub mod editor;
pub mod error;
pub mod eval;
pub mod layers;
pub mod library;
pub mod memory;
pub mod ops;
pub mod pixels;
pub mod plan;
pub mod progress;
pub mod request;
pub mod vlm;
pub mod weights;
mod whole_file;

pub use diffusion::StepCache;
pub use editor::{
    Assistant, BENCH_VERSION, BenchReport, BenchRequest, BenchRow, ConvertOutcome, ConvertRequest,
    EditVersion, Engine, EngineOptions, LoraSource, ModelInfo, ModelParts, ModelSource,
    PlacementOptions, PlannerSource, convert,
};
pub use error::{Error, ModelError, PictureError, RequestError, Result};
pub use memory::Device;
pub use plan::{Plan, PlanOptions, PlannedBy, Planner};
pub use progress::{CancelToken, Event, Observer, Stage};
pub use request::{
    AskOutcome, AskRequest, EditOutcome, EditRequest, HandOver, MemoryPlan, Placement, PlanOutcome,
    PlanRequest, Rng, StageMemory, StageReport, Strategy, WeightShare,
};

pub use whole_file::Overwrite;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Sets how many threads the computation uses, for the whole process. Call it once, before the
/// first request; without it every core is used.
///
/// # Errors
/// When the threads have been started already.
pub fn set_threads(count: usize) -> Result<()> {
    let built = rayon::ThreadPoolBuilder::new().num_threads(count).build_global();
    built.map_err(|error| {
        Error::field(
            "threads",
            count,
            format!("a number set once, before the first request ({error})"),
        )
    })
}
