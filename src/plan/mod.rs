//! The planner: what a request asks for, in which order, and in which words the editor hears it.
//!
//! A request goes through two agents of one vision-language model. The **decomposition agent** names
//! the actions, subjects and goals of the request ([`Decomposition`]); the **sequencing agent**
//! aligns them and writes ordered sub-requests ([`Step`]). A grammar keeps both replies well-formed,
//! and code checks that the steps cover the decomposition and invent nothing. The result, a
//! [`Plan`], is plain data: it can be printed, changed by hand and read back.
//!
//! ```
//! use pentimento::plan::{Action, Plan, Step};
//!
//! let steps = vec![
//!     Step::new(Action::Delete, "car", "gone", "remove the car"),
//!     Step::new(Action::Recolor, "house", "blue", "recolor the house to blue"),
//! ];
//! let plan = Plan::new("paint the house blue and take away the car", steps);
//! plan.check()?;
//! assert_eq!(plan.merged("; "), "remove the car; recolor the house to blue");
//! # Ok::<(), pentimento::Error>(())
//! ```

mod action;
mod coverage;
mod decomposition;
mod document;
mod grammar;
mod order;
mod planner;
mod prompts;
mod score;
mod text;

pub use action::Action;
pub use coverage::{Gap, align};
pub use decomposition::{Decomposition, LIST_ITEMS_MAX, Malformed};
pub use document::{PLAN_VERSION, Plan, STEPS_MAX, Step};
pub use grammar::{decomposition_grammar, steps_grammar};
pub use order::ordered;
pub use planner::{PlanOptions, PlannedBy, Planner, Planning};
pub use prompts::Prompts;
pub use score::{Score, set_f1};
