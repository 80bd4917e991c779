//! Writes a part of a model as another file: in another format, in other types.

mod plan;
mod source;

use std::{path::PathBuf, time::Instant};

use serde::Serialize;

use self::{
    plan::{Notes, Planned},
    source::{Hints, Source},
};
use super::assemble::version::version_name;
use crate::{
    error::{RequestError, Result},
    progress::{CancelToken, Event, Observer, Stage},
    vlm::export,
    weights::{
        Checkpoint, TypeRules, WriteFormat, WriteType, WrittenFile,
        write::{self, Item, Role, Staged, Wish},
    },
    whole_file::Overwrite,
};

/// What to write.
///
/// ```no_run
/// use pentimento::{ConvertRequest, convert, weights::WriteType};
///
/// let folder = "/models/Qwen-Image-Edit-2511/transformer";
/// let request = ConvertRequest::new(folder, "edit-2511-q4_k.gguf", WriteType::Q4K);
/// for file in convert(&request, &())?.files {
///     println!("{} {}", file.sha256, file.path.display());
/// }
/// # Ok::<(), pentimento::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ConvertRequest {
    /// The folder of a part (`transformer/`), or the files that together hold one.
    pub inputs: Vec<PathBuf>,
    /// The new file.
    pub output: PathBuf,
    /// Where the vision tower of a language model goes, which is a file of its own in GGUF; without
    /// it `mmproj-NAME` beside the new file.
    pub mmproj_output: Option<PathBuf>,
    /// The new file's format; without it its name tells.
    pub format: Option<WriteFormat>,
    /// The type of matrices.
    pub kind: WriteType,
    /// Types of single tensors.
    pub rules: TypeRules,
    /// Every matrix in the type, also those that the model's rules keep plain.
    pub pure: bool,
    /// What the new file calls the model; without it what the input calls it.
    pub name: Option<String>,
    /// Whether a transformer is of the 2511 version; without it the files tell.
    pub zero_cond_t: Option<bool>,
    /// What happens to files that are there already.
    pub overwrite: Overwrite,
    /// Stops it; nothing is left behind.
    pub cancel: CancelToken,
}

impl ConvertRequest {
    /// One input, with nothing else asked for.
    #[must_use]
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>, kind: WriteType) -> Self {
        Self {
            inputs: vec![input.into()],
            output: output.into(),
            mmproj_output: None,
            format: None,
            kind,
            rules: TypeRules::default(),
            pure: false,
            name: None,
            zero_cond_t: None,
            overwrite: Overwrite::default(),
            cancel: CancelToken::default(),
        }
    }
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ConvertOutcome {
    /// The files; a vision-language model in GGUF is two.
    pub files: Vec<WrittenFile>,
    /// What the files call the model.
    pub name: String,
    /// The published version of a transformer, where it is known.
    pub version: Option<&'static str>,
    /// What was done, but not quite as asked.
    pub notes: Vec<String>,
}

/// Reads the inputs tensor by tensor and writes them as asked. Memory stays at a few chunks of
/// tensors; the files appear when they are whole, and are read back before.
///
/// # Errors
/// Inputs that are missing, damaged or of a model that is not converted; types that the format does
/// not hold; numbers that are not finite or beyond a type's range; an output that exists or cannot
/// be written; [`Error::Cancelled`](crate::Error::Cancelled). Nothing is left behind then.
pub fn convert(request: &ConvertRequest, observer: &dyn Observer) -> Result<ConvertOutcome> {
    let format = plan::format(request)?;
    write::check_output(&request.output, request.overwrite)?;
    let wish =
        Wish { format, kind: request.kind, rules: request.rules.clone(), pure: request.pure };
    let mut notes = Notes::default();
    let hints = Hints { zero_cond_t: request.zero_cond_t, name: request.name.as_deref() };
    let (checkpoint, name, version, planned) = match source::open(&request.inputs, hints)? {
        Source::Transformer(transformer) => {
            let (name, planned) = plan::transformer(request, &wish, &transformer, &mut notes);
            let version = transformer.version.map(|(kind, zero)| version_name(kind, zero));
            (transformer.checkpoint, name, version, vec![planned])
        }
        Source::VisionLanguage { checkpoint, files, folder, name } => {
            let name = request.name.clone().unwrap_or(name);
            let planned = match format {
                WriteFormat::Gguf => {
                    let exported = export::gguf_files(&files, &folder, &checkpoint)?;
                    plan::gguf_pair(request, &wish, &checkpoint, (&name, exported), &mut notes)?
                }
                WriteFormat::Safetensors => {
                    let drafts = plan::whole(&checkpoint, language_role);
                    let named = (name.as_str(), drafts);
                    vec![plan::safetensors(&request.output, &wish, &checkpoint, named, &mut notes)]
                }
            };
            (checkpoint, name, None, planned)
        }
        Source::Autoencoder { checkpoint, name } => {
            refuse_small(request, format, &checkpoint)?;
            let name = request.name.clone().unwrap_or(name);
            let named = (name.as_str(), plan::whole(&checkpoint, |_| Role::Usual));
            let planned = plan::safetensors(&request.output, &wish, &checkpoint, named, &mut notes);
            (checkpoint, name, None, vec![planned])
        }
    };
    for file in &planned {
        write::check_output(&file.path, request.overwrite)?;
    }
    let names: Vec<&str> =
        planned.iter().flat_map(|it| &it.layout.items).map(|item| item.name.as_str()).collect();
    for rule in request.rules.without_tensor(&names) {
        notes.texts.push(format!("no tensor has a name that the rule {rule} finds"));
    }
    let notes = notes.finish();
    notes.iter().for_each(|note| observer.event(&Event::Note(note)));
    let files = write_all(request, &checkpoint, &planned, observer)?;
    Ok(ConvertOutcome { files, name, version, notes })
}

/// What is to be known of a vision-language model's tensor when its type is chosen.
fn language_role(name: &str) -> Role {
    match name {
        "lm_head.weight" => Role::SixBits,
        name if name.starts_with("visual.") => Role::Kept,
        _ => Role::Usual,
    }
}

fn refuse_small(
    request: &ConvertRequest,
    format: WriteFormat,
    checkpoint: &Checkpoint,
) -> Result<()> {
    if format == WriteFormat::Safetensors && request.kind != WriteType::Fp8 {
        return Ok(());
    }
    Err(RequestError::Unsupported {
        model: format!("{} (an autoencoder)", checkpoint.name()),
        what: format!("{} in {}", request.kind, format.name()),
        hint: "its weights are convolutions, which stay plain: write .safetensors in f32, f16 or \
               bf16"
            .to_owned(),
    }
    .into())
}

/// Writes all files, and gives them their names when the last is complete.
fn write_all(
    request: &ConvertRequest,
    checkpoint: &Checkpoint,
    planned: &[Planned],
    observer: &dyn Observer,
) -> Result<Vec<WrittenFile>> {
    /// f32 numbers of a MiB.
    const STEP: u64 = 1 << 18;
    let count = |item: &Item| item.shape.iter().map(|&n| n as u64).product::<u64>();
    let all: u64 = planned.iter().flat_map(|file| &file.layout.items).map(count).sum();
    let steps = |numbers: u64| usize::try_from(numbers.div_ceil(STEP)).unwrap_or(usize::MAX);
    let (start, mut done) = (Instant::now(), 0);
    let stage = Stage::Convert;
    let tell = |done| {
        let (step, of) = (steps(done), steps(all));
        observer.event(&Event::Step { stage, step, of, elapsed: start.elapsed() });
    };
    tell(0);
    let mut staged = Vec::with_capacity(planned.len());
    for Planned { path, layout } in planned {
        let target = (path.as_path(), request.overwrite);
        staged.push(write::stage(checkpoint, layout, target, &request.cancel, &mut |numbers| {
            done += numbers;
            tell(done);
        })?);
    }
    let files = staged.into_iter().map(Staged::finish).collect::<Result<_>>()?;
    observer.event(&Event::StageDone { stage, elapsed: start.elapsed() });
    Ok(files)
}
