//! What can be typed about weight files.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use pentimento::weights::{TypeRules, WriteFormat, WriteType};

use super::args::{ReportArgs, THREADS_MAX, zero_cond_t};

/// `pentimento convert`
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Folder of a part (transformer/, text_encoder/, vae/), a weight file, or the files that together
    /// hold one part: shards, or a GGUF language model and its mmproj
    #[arg(value_name = "INPUT", required = true)]
    pub(crate) inputs: Vec<PathBuf>,
    /// The new file: .gguf or .safetensors
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Type of the large matrices: f32, f16, bf16; in GGUF q8_0, q6_k, q5_k, q5_0, q5_1, q4_k, q4_0,
    /// q4_1, q3_k, q2_k; in safetensors fp8
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: WriteType,
    /// Types for the tensors whose names a regular expression finds, the first that fits:
    /// "REGEX=type,REGEX=type"
    #[arg(long, value_name = "RULES", default_value = "", hide_default_value = true)]
    pub(crate) tensor_type_rules: TypeRules,
    /// Every matrix in the type, also those at the ends of the network
    #[arg(long)]
    pub(crate) pure: bool,
    /// Format of the new file [default: what its name says]
    #[arg(long, value_enum)]
    pub(crate) format: Option<FormatArg>,
    /// Where the vision tower of a language model in GGUF goes [default: mmproj-NAME beside it]
    #[arg(long, value_name = "FILE")]
    pub(crate) mmproj_output: Option<PathBuf>,
    /// What the new file calls the model [default: what the input is called]
    #[arg(long, value_name = "TEXT")]
    pub(crate) name: Option<String>,
    /// What files do not tell: qwen_image_zero_cond_t=true for a 2511 transformer, =false for others
    #[arg(long, value_name = "KEY=VALUE", value_parser = zero_cond_t)]
    pub(crate) model_args: Option<bool>,
    /// Replace files that exist
    #[arg(long)]
    pub(crate) force: bool,
    /// Threads that quantize [default: all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    pub(crate) threads: Option<u16>,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// Formats of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FormatArg {
    /// As llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF read it
    Gguf,
    /// As published
    Safetensors,
}

impl FormatArg {
    pub(crate) fn format(self) -> WriteFormat {
        match self {
            Self::Gguf => WriteFormat::Gguf,
            Self::Safetensors => WriteFormat::Safetensors,
        }
    }
}

/// Where models are looked for.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlacesArgs {
    /// Folder with models, beside Hugging Face's cache and ~/ComfyUI; may be repeated, adds to
    /// PENTIMENTO_MODELS_DIR
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    pub(crate) models_dir: Vec<PathBuf>,
}

/// `pentimento models`
#[derive(Debug, Subcommand)]
pub(crate) enum ModelsCommand {
    /// Show which models there are, and what each is
    List(ListArgs),
    /// Show what a weight file or a model folder holds, by name or path
    Info(ModelInfoArgs),
    /// Check that files are whole and hold what was published
    Verify(VerifyArgs),
}

/// `pentimento models list`
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pentimento models info`
#[derive(Debug, Args)]
pub(crate) struct ModelInfoArgs {
    /// A file, a folder, or the name of either, as `models list` shows it
    #[arg(value_name = "NAME")]
    pub(crate) name: PathBuf,
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pentimento models verify`
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// Files, folders, or names of either [default: all that is found]
    #[arg(value_name = "NAME")]
    pub(crate) names: Vec<PathBuf>,
    /// Also look at every number: none may be infinite or not a number
    #[arg(long)]
    pub(crate) deep: bool,
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress bar
    #[arg(short, long)]
    pub(crate) quiet: bool,
}
