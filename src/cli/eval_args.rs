//! What can be typed for `pentimento eval` and `bench`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::args::{CacheArgs, LoraArgs, ModelArgs, PlannerArgs, ReportArgs, StrategyArg};

/// `pentimento eval`
#[derive(Debug, Subcommand)]
pub(crate) enum EvalCommand {
    /// Held-out scenes of the miniature world, judged by its strict readout
    Scenes(Box<ScenesArgs>),
    /// What many passes do to a picture: an object recolored to and fro, handed on in either way
    Drift(Box<DriftArgs>),
}

/// `pentimento eval drift`
#[derive(Debug, Args)]
pub(crate) struct DriftArgs {
    /// Draws the scenes
    #[arg(short, long, value_name = "N", default_value_t = 7)]
    pub(crate) seed: u32,
    /// Scenes
    #[arg(short = 'N', long, value_name = "N", default_value_t = 20)]
    pub(crate) count: u32,
    /// Passes on each, an even number
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) passes: usize,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// `pentimento eval scenes`
#[derive(Debug, Args)]
pub(crate) struct ScenesArgs {
    /// Draws the held-out cases; the same seed gives the same cases and the same pictures
    #[arg(short, long, value_name = "N", default_value_t = 7)]
    pub(crate) seed: u32,
    /// Cases of each row of the table, or pairs on the contact sheet
    #[arg(short = 'N', long, value_name = "N", default_value_t = 30)]
    pub(crate) count: u32,
    /// Only these parts; may be repeated or separated by commas [default: all]
    #[arg(long, value_enum, value_name = "PART", value_delimiter = ',')]
    pub(crate) only: Vec<PartArg>,
    /// Denoising steps of each edit [default: the model's]
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<usize>,
    /// Draw inputs beside results of the first cases into this file instead of measuring
    #[arg(long, value_name = "FILE")]
    pub(crate) contact_sheet: Option<PathBuf>,
    /// How the requests of the contact sheet are carried out
    #[arg(long, value_enum, default_value_t = StrategyArg::Direct, requires = "contact_sheet")]
    pub(crate) strategy: StrategyArg,
    /// Replace the contact sheet if it exists
    #[arg(long, requires = "contact_sheet")]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    #[command(flatten)]
    pub(crate) lora: LoraArgs,
    #[command(flatten)]
    pub(crate) planner: PlannerArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// Parts of `--only`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PartArg {
    /// One wish, said directly: each operation
    Single,
    /// One wish, said in other ways, also in ones that training never sees
    Wordings,
    /// Two to four wishes in one request: without the planner, through it, and with faultless plans
    Many,
    /// What the decomposition agent makes of a request, without a grammar
    Decomposition,
}

/// `pentimento bench`
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Width of the working size [default: that of a square of the model's area]
    #[arg(short = 'W', long, value_name = "PX", requires = "height")]
    pub(crate) width: Option<u32>,
    /// Height of the working size
    #[arg(short = 'H', long, value_name = "PX", requires = "width")]
    pub(crate) height: Option<u32>,
    /// Denoising steps to measure; their mean is shown
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) steps: usize,
    /// Tokens of the answer to measure
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) answer_tokens: usize,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}
