//! The miniature world: small scenes, requests about them, their pixels, and the strict readout.
//!
//! A seed fixes everything: [`Case::sample`] draws a scene, a request with one to four wishes and
//! the exact target from one stream of random numbers and whole-number arithmetic, word for word
//! and pixel for pixel as the recipe in models/mini/recipe does. [`succeeds`] reads a picture back
//! and says whether it shows exactly the target; [`Measurement`] does so for an engine's pictures.
//!
//! ```
//! use pentimento::eval::scenes::{Case, Spec, held_out_seed, render, succeeds};
//!
//! let case = Case::sample(held_out_seed(1, 0), &Spec::default());
//! assert!(succeeds(&render(&case.target), &case.target));
//! assert!(!succeeds(&render(&case.scene), &case.target));
//! ```

mod case;
mod drift;
mod editing;
mod measure;
mod pointing;
mod readout;
mod render;
mod report;
mod rng;
mod scene;
mod sheet;
mod suites;
mod wish;
mod world;

#[cfg(test)]
mod tests;

pub use case::{Case, Spec, Style, held_out_seed};
pub use drift::{DRIFT_REPORT_VERSION, DriftMeasurement, DriftOfWay, DriftReport, DriftRow};
pub use measure::Measurement;
pub use readout::{Readout, readout, succeeds};
pub use render::{SIDE, render};
pub use report::{Pictures, PlanSource, REPORT_VERSION, Rate, Replies, Report, Reuse};
pub use scene::{Scene, Thing};
pub use sheet::ContactSheet;
pub use suites::Part;
pub use wish::{Edit, Operation, Wish};
