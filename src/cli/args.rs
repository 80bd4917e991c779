//! What can be typed.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use pentimento::{LoraSource, Rng, StepCache, Strategy, diffusion::noise::CudaGrid};

use super::{
    eval_args::{BenchArgs, EvalCommand},
    memory_args::MemoryArgs,
    weights_args::{ConvertArgs, ModelsCommand, PlacesArgs},
};

/// The most threads that may be asked for; far more would never be started.
pub(super) const THREADS_MAX: i64 = 1024;

/// Edit pictures on this machine: one sentence says what should change.
#[derive(Debug, Parser)]
#[command(name = "pentimento", version, arg_required_else_help = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 the request failed, 2 wrong usage, 3 model files, \
                          4 out of memory, 130 cancelled";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Edit a picture
    Edit(Box<EditArgs>),
    /// Show how a request would be carried out, without editing
    Plan(Box<PlanArgs>),
    /// Ask a question about pictures
    Ask(Box<AskArgs>),
    /// Measure a model on pictures whose exact edits are known
    Eval {
        #[command(subcommand)]
        what: EvalCommand,
    },
    /// Measure how fast each stage is with a model
    Bench(Box<BenchArgs>),
    /// Show what a weight file, a model folder or a picture holds
    Info(InfoArgs),
    /// Write a part of a model as another file: in another format, in other types
    Convert(Box<ConvertArgs>),
    /// Find models on this machine, show what they are, check that they are whole
    Models {
        #[command(subcommand)]
        what: ModelsCommand,
    },
    /// Show the devices, features and packs that this program sees
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Which model, and where and how it runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Model folder in the published layout, for all parts that have no file of their own; without
    /// any of them the miniature pack is used. This and the files below may also be names, as `models
    /// list` shows them
    #[arg(long, value_name = "DIR", env = "PENTIMENTO_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Transformer in one file, safetensors or GGUF
    #[arg(long, value_name = "FILE")]
    pub(crate) diffusion_model: Option<PathBuf>,
    /// Vision-language model in one file, safetensors or GGUF
    #[arg(long, value_name = "FILE", alias = "qwen2vl")]
    pub(crate) llm: Option<PathBuf>,
    /// Vision tower of a GGUF --llm [default: looked for beside it]
    #[arg(long, value_name = "FILE", aliases = ["llm_vision", "qwen2vl_vision"])]
    pub(crate) mmproj: Option<PathBuf>,
    /// Autoencoder in one file
    #[arg(long, value_name = "FILE")]
    pub(crate) vae: Option<PathBuf>,
    /// What files do not tell: qwen_image_zero_cond_t=true for a 2511 transformer, =false for others
    #[arg(long, value_name = "KEY=VALUE", value_parser = zero_cond_t)]
    pub(crate) model_args: Option<bool>,
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Device of the computation: auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: String,
    /// Type in which the large matrices are kept in memory
    #[arg(long, alias = "type", value_enum, default_value_t = DtypeArg::Auto)]
    pub(crate) dtype: DtypeArg,
    /// Where the transformer's weights are fp8 (e4m3), multiply them by activations in fp8: faster on
    /// Hopper, and less exact
    #[arg(long)]
    pub(crate) fp8_matmul: bool,
    /// Threads of the computation [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    pub(crate) threads: Option<u16>,
    #[command(flatten)]
    pub(crate) memory: MemoryArgs,
}

/// Types of `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    /// On the CPU as stored, computed in f32; bf16 on a GPU
    Auto,
    /// 4 bytes a weight
    F32,
    /// 2 bytes a weight
    Bf16,
    /// 2 bytes a weight, a smaller range than bf16
    F16,
    /// 1.06 bytes a weight; quantized while loading
    #[value(name = "q8_0", alias = "q8-0")]
    Q8_0,
    /// 0.56 bytes a weight; quantized while loading
    #[value(name = "q4_k", alias = "q4-k")]
    Q4K,
}

/// How a request is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum StrategyArg {
    /// The planner takes the request apart; one pass carries out all sub-requests
    Single,
    /// The planner takes the request apart; each sub-request is a pass of its own
    Sequential,
    /// The prompt goes to the editor as it is, in one pass, without the planner
    Direct,
    /// Direct for a request that turns out to be one step, single otherwise
    Auto,
}

impl StrategyArg {
    pub(crate) fn strategy(self) -> Strategy {
        match self {
            Self::Single => Strategy::Single,
            Self::Sequential => Strategy::Sequential,
            Self::Direct => Strategy::Direct,
            Self::Auto => Strategy::Auto,
        }
    }
}

/// What a pass of `--strategy sequential` gets from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum HandOverArg {
    /// The latents as they are
    Latents,
    /// The picture, which is encoded again
    Pixels,
}

/// What should change.
#[derive(Debug, Args)]
pub(crate) struct PromptArgs {
    /// What should change
    #[arg(short, long, value_name = "TEXT", conflicts_with_all = ["prompt_file", "prompt_words"])]
    pub(crate) prompt: Option<String>,
    /// Read the prompt from a UTF-8 file
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_words")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// What should change
    #[arg(value_name = "PROMPT")]
    pub(crate) prompt_words: Option<String>,
}

/// What is edited, and what should change.
#[derive(Debug, Args)]
pub(crate) struct WishArgs {
    /// Picture to edit; repeat for models that take several; `-` reads stdin
    #[arg(
        short = 'i',
        long = "image",
        alias = "ref-image",
        short_alias = 'r',
        required = true,
        value_name = "FILE"
    )]
    pub(crate) images: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// Area of the working size: square pixels, or WxH [default: the model's]; beside -W or -H the area at
    /// which the editor is shown the pictures [default: the working size for the edited one]
    #[arg(long, value_name = "AREA", value_parser = area)]
    pub(crate) area: Option<u64>,
    /// Area of the copies that the vision-language model sees [default: the model's]
    #[arg(long, value_name = "AREA", value_parser = area)]
    pub(crate) vl_area: Option<u64>,
}

/// Who plans, and how.
#[derive(Debug, Args)]
#[command(next_help_heading = "Planner")]
pub(crate) struct PlannerArgs {
    /// Folder or name of another vision-language model that plans; where its weights are the text
    /// encoder's, they are loaded once [default: the text encoder]
    #[arg(long, value_name = "MODEL")]
    pub(crate) planner: Option<PathBuf>,
    /// Folder of a PEFT adapter for the decomposition agent
    #[arg(long, value_name = "DIR")]
    pub(crate) planner_adapter: Option<PathBuf>,
    /// Prompts of the agents, in sections that begin with lines such as [decompose.system]
    #[arg(long, value_name = "FILE")]
    pub(crate) planner_prompt: Option<PathBuf>,
    /// The longest reply of an agent in tokens
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) planner_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.0)]
    pub(crate) planner_temperature: f32,
    /// Seed of the planner's sampling, where its temperature is above 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) planner_seed: u64,
    /// Let the agents write without a grammar, to see what the model does by itself
    #[arg(long)]
    pub(crate) no_planner_grammar: bool,
}

/// What a person sees while it runs, and what is printed.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct ReportArgs {
    /// Print the result as JSON on stdout
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress bar and no notes
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// More about what happens; twice for every step
    #[arg(short, long, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
}

/// `pentimento edit`
#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    #[command(flatten)]
    pub(crate) wish: WishArgs,
    /// Carry out this plan, as `plan --json` prints it, instead of making one; `-` reads stdin
    #[arg(long, value_name = "FILE")]
    pub(crate) plan: Option<PathBuf>,
    /// What should not appear; guidance runs only with this (it may be empty) and --cfg-scale above 1
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) negative_prompt: Option<String>,
    /// Where the result goes: .png, .jpg or .webp; `-` writes PNG to stdout
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Replace the output if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Tell what the edit would take in memory and how it would be placed, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave prompt, seed and timings out of the picture's metadata
    #[arg(long, alias = "disable-image-metadata")]
    pub(crate) no_metadata: bool,
    /// Denoising steps [default: the model's]
    #[arg(long, value_name = "N")]
    pub(crate) steps: Option<usize>,
    /// Seed of the noise; -1 or absent draws one, which is reported
    #[arg(short, long, value_name = "N", allow_hyphen_values = true, value_parser = seed)]
    pub(crate) seed: Option<SeedArg>,
    /// Whose random numbers the seed draws: cpu or cuda, as torch draws them there; for noise of
    /// more values than the device has threads, cuda:SMSxTHREADS (128x1536 for an RTX 4090)
    #[arg(long, value_name = "RNG", default_value = "cpu", value_parser = rng)]
    pub(crate) rng: Rng,
    /// True classifier-free guidance; above 1 with a negative prompt doubles the work [default: the model's]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub(crate) cfg_scale: Option<f64>,
    /// Width of the working size and of the result [default: auto, which follows the input]
    #[arg(short = 'W', long, value_name = "PX", value_parser = side)]
    pub(crate) width: Option<SideArg>,
    /// Height of the working size and of the result [default: auto, which follows the input]
    #[arg(short = 'H', long, value_name = "PX", value_parser = side)]
    pub(crate) height: Option<SideArg>,
    /// Both: WxH, or auto
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with_all = ["width", "height"])]
    pub(crate) size: Option<[SideArg; 2]>,
    /// How the request is carried out
    #[arg(long, value_enum, default_value_t = StrategyArg::Single)]
    pub(crate) strategy: StrategyArg,
    /// Write the picture after each pass of --strategy sequential into this folder, as step-1.png, …
    #[arg(long, value_name = "DIR")]
    pub(crate) keep_steps: Option<PathBuf>,
    /// What a pass of --strategy sequential gets from the one before
    #[arg(long, value_enum, default_value_t = HandOverArg::Latents)]
    pub(crate) hand_over: HandOverArg,
    /// Folder of the files that <lora:NAME> and <lora:NAME:SCALE> in the prompt stand for
    #[arg(long, value_name = "DIR", help_heading = "LoRA")]
    pub(crate) lora_model_dir: Option<PathBuf>,
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

/// Low-rank changes of the editor.
#[derive(Debug, Args)]
#[command(next_help_heading = "LoRA")]
pub(crate) struct LoraArgs {
    /// LoRA file (safetensors) for the editor, and its strength [default: 1]; repeat for several,
    /// which add up. What is there under the whole text is meant as a path. A file with Lightning and 4steps or
    /// 8steps in its name sets steps, guidance and schedule unless they are asked for
    #[arg(long = "lora", value_name = "FILE[:SCALE]", value_parser = lora)]
    pub(crate) files: Vec<LoraSource>,
    /// Keep the model's own steps, guidance and schedule with a Lightning file
    #[arg(long)]
    pub(crate) no_lightning_defaults: bool,
}

/// Steps that may be left out.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Step cache")]
pub(crate) struct CacheArgs {
    /// Leave out most of a step that differs little from the one before: faster, but another picture
    #[arg(long, value_enum, default_value_t = CacheModeArg::None)]
    pub(crate) cache_mode: CacheModeArg,
    /// threshold=X: how much the first block's change may differ, as a share of itself
    #[arg(long, value_name = "KEY=VALUE", requires = "cache_mode", default_value = "threshold=0.1", value_parser = cache_option)]
    pub(crate) cache_option: StepCache,
}

impl CacheArgs {
    pub(crate) fn settings(self) -> Option<StepCache> {
        match self.cache_mode {
            CacheModeArg::None => None,
            CacheModeArg::FirstBlock => Some(self.cache_option),
        }
    }
}

/// Modes of `--cache-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheModeArg {
    /// Every step is computed
    None,
    /// The first block tells whether the others are needed
    FirstBlock,
}

/// `pentimento plan`
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) wish: WishArgs,
    /// Tell what planning would take in memory, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) planner: PlannerArgs,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// `pentimento ask`
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    /// Picture to look at; repeat for several; `-` reads stdin
    #[arg(short = 'i', long = "image", value_name = "FILE")]
    pub(crate) images: Vec<PathBuf>,
    /// The question
    #[arg(value_name = "QUESTION")]
    pub(crate) question: String,
    /// The longest answer in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_tokens: usize,
    /// 0 takes the likeliest token each time
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Seed of the sampling; -1 or absent draws one
    #[arg(short, long, value_name = "N", allow_hyphen_values = true, value_parser = seed)]
    pub(crate) seed: Option<SeedArg>,
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
}

/// `pentimento info`
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A safetensors or GGUF file, a model folder or a picture; models also by name
    #[arg(value_name = "FILE")]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// `pentimento doctor`
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Also look into this model: its folder or its name
    #[arg(long, value_name = "MODEL", env = "PENTIMENTO_MODEL")]
    pub(crate) model: Option<PathBuf>,
    /// Tell whether this planner would share the text encoder's weights
    #[arg(long, value_name = "MODEL")]
    pub(crate) planner: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) places: PlacesArgs,
    /// Print as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A seed as typed: a number, or -1 for a random one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SeedArg {
    Random,
    Number(u64),
}

impl SeedArg {
    pub(crate) fn number(self) -> Option<u64> {
        match self {
            Self::Random => None,
            Self::Number(number) => Some(number),
        }
    }
}

/// A side of the working size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SideArg {
    /// Follows the input.
    Auto,
    Px(u32),
}

impl SideArg {
    pub(crate) fn px(self) -> Option<u32> {
        match self {
            Self::Auto => None,
            Self::Px(px) => Some(px),
        }
    }
}

fn side(text: &str) -> Result<SideArg, String> {
    match text {
        "auto" => Ok(SideArg::Auto),
        px => {
            let px = px.parse().ok().map(SideArg::Px);
            px.ok_or_else(|| "expected pixels, such as 1024, or auto".to_owned())
        }
    }
}

fn size(text: &str) -> Result<[SideArg; 2], String> {
    let both = || {
        let (width, height) = text.split_once(['x', 'X'])?;
        Some([SideArg::Px(width.parse().ok()?), SideArg::Px(height.parse().ok()?)])
    };
    match text {
        "auto" => Ok([SideArg::Auto; 2]),
        _ => both().ok_or_else(|| "expected WIDTHxHEIGHT, such as 1024x768, or auto".to_owned()),
    }
}

fn seed(text: &str) -> Result<SeedArg, String> {
    if text == "-1" {
        return Ok(SeedArg::Random);
    }
    let number =
        text.parse().map_err(|error| format!("{error}; a seed is 0 to {} or -1", u64::MAX))?;
    Ok(SeedArg::Number(number))
}

pub(super) fn zero_cond_t(text: &str) -> Result<bool, String> {
    match text.split_once('=') {
        Some(("qwen_image_zero_cond_t", "true")) => Ok(true),
        Some(("qwen_image_zero_cond_t", "false")) => Ok(false),
        _ => Err("expected qwen_image_zero_cond_t=true or qwen_image_zero_cond_t=false".to_owned()),
    }
}

/// A path, or a path, a colon and a number.
fn lora(text: &str) -> Result<LoraSource, String> {
    let is_name = std::path::Path::new(text).exists(); // what is there under that name is meant
    let scaled = text.rsplit_once(':').filter(|_| !is_name).and_then(|(path, scale)| {
        Some(LoraSource { path: path.into(), strength: scale.parse().ok()? })
    });
    let source = scaled.unwrap_or_else(|| LoraSource::new(text));
    if !source.strength.is_finite() || source.path.as_os_str().is_empty() {
        return Err("expected FILE or FILE:SCALE with a finite number".to_owned());
    }
    Ok(source)
}

fn cache_option(text: &str) -> Result<StepCache, String> {
    let threshold = text.strip_prefix("threshold=").and_then(|number| number.parse().ok());
    threshold
        .and_then(|threshold| StepCache::new(threshold).ok())
        .ok_or_else(|| "expected threshold=X with a number from 0".to_owned())
}

fn rng(text: &str) -> Result<Rng, String> {
    let device = |text: &str| {
        let (multiprocessors, threads) = text.split_once('x')?;
        let number = |text: &str| text.parse().ok().filter(|&number: &u32| number > 0);
        Some(CudaGrid::of_device(number(multiprocessors)?, number(threads)?))
    };
    match text {
        "cpu" => Ok(Rng::Cpu),
        "cuda" => Ok(Rng::Cuda(CudaGrid::UNLIMITED)),
        _ => text
            .strip_prefix("cuda:")
            .and_then(device)
            .map(Rng::Cuda)
            .ok_or_else(|| "expected cpu, cuda or cuda:SMSxTHREADS".to_owned()),
    }
}

fn area(text: &str) -> Result<u64, String> {
    let number = |part: &str| {
        let parsed = part.trim().parse::<u64>();
        parsed.map_err(|error| format!("{error}; expected square pixels or WIDTHxHEIGHT"))
    };
    let pixels = match text.split_once(['x', 'X']) {
        Some((width, height)) => number(width)?.checked_mul(number(height)?),
        None => Some(number(text)?),
    };
    pixels
        .filter(|&pixels| pixels > 0)
        .ok_or_else(|| "an area is a number of pixels above 0".to_owned())
}

/// The arguments of the process.
pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let mut command = without_empty_variables(Cli::command());
    let mut matches = command.try_get_matches_from_mut(arguments)?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
}

/// A variable of the environment that is set to nothing counts as not set.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let check = |arg: clap::Arg| {
        let value = arg.get_env().and_then(std::env::var_os);
        if value.is_some_and(|value| value.is_empty()) { arg.env(None::<&str>) } else { arg }
    };
    command.mut_args(check).mut_subcommands(without_empty_variables)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn areas_seeds_and_sizes_are_checked() {
        assert_eq!(area("96x96"), Ok(9216));
        assert_eq!(area("9216"), Ok(9216));
        assert!(
            area("0").is_err() && area("x").is_err() && area("99999999999x99999999999").is_err()
        );
        assert_eq!(side("auto"), Ok(SideArg::Auto));
        assert_eq!(side("640").map(SideArg::px), Ok(Some(640)));
        assert!(side("-16").is_err() && side("2x").is_err());
        assert_eq!(size("640X480"), Ok([SideArg::Px(640), SideArg::Px(480)]));
        assert_eq!(size("auto"), Ok([SideArg::Auto; 2]));
        assert!(size("640").is_err() && size("640x").is_err() && size("autox64").is_err());
        assert_eq!(seed("-1"), Ok(SeedArg::Random));
        assert_eq!(seed("18446744073709551615"), Ok(SeedArg::Number(u64::MAX)));
        assert!(seed("-2").is_err() && seed("1.5").is_err());
        assert_eq!(zero_cond_t("qwen_image_zero_cond_t=true"), Ok(true));
        assert!(zero_cond_t("qwen_image_zero_cond_t").is_err() && zero_cond_t("x=true").is_err());
        assert_eq!(rng("cuda"), Ok(Rng::Cuda(CudaGrid::UNLIMITED)));
        assert_eq!(rng("cuda:128x1536"), Ok(Rng::Cuda(CudaGrid::of_device(128, 1536))));
        assert_eq!(cache_option("threshold=0.25"), Ok(StepCache::new(0.25).unwrap()));
        assert!(cache_option("threshold=-1").is_err() && cache_option("0.1").is_err());
        assert_eq!(lora("a.safetensors"), Ok(LoraSource::new("a.safetensors")));
        assert_eq!(lora("C:\\a.b"), Ok(LoraSource::new("C:\\a.b")));
        let (path, strength) = ("a:b".into(), -0.5);
        assert_eq!(lora("a:b:-0.5"), Ok(LoraSource { path, strength }));
        assert!(lora("a:nan").is_err() && lora("a:1e999").is_err() && lora(":1").is_err());
        assert!(rng("cuda:128").is_err() && rng("gpu").is_err());
    }
}
