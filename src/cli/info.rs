//! `pentimento info`: what a weight file, a model folder or a picture holds.

use std::{collections::BTreeMap, path::Path};

use pentimento::{
    EditVersion, ModelInfo, ModelSource, Result,
    library::{self, Want},
    pixels::{self, Limits},
    weights::{Checkpoint, Family, family, identify},
};
use serde_json::{Value, json};

use super::{args::InfoArgs, places};

/// How much of a value in the metadata is shown.
const VALUE_CHARS: usize = 100;
/// How many bytes of a file are looked at to tell what it is.
const START_BYTES: usize = 16;

pub(crate) fn run(args: &InfoArgs) -> Result<()> {
    let places = places::places(&args.places)?;
    tell(&library::resolve("FILE", &args.path, Want::Any, &places)?, args.json)
}

/// Prints what is at `path`.
pub(crate) fn tell(path: &Path, json: bool) -> Result<()> {
    if path.is_dir() && !path.join("model_index.json").is_file() && has_weights(path) {
        let checkpoint = library::part(path)?;
        return show(&checkpoint, None, json);
    }
    if path.is_dir() {
        let info = ModelInfo::read(&ModelSource::Folder(path.to_owned()))?;
        return if json {
            super::print_json(&info)
        } else {
            super::print(folder(&info).as_bytes())
        };
    }
    let is_named =
        path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("safetensors"));
    // Why something is no file, or cannot be opened, is told as it is for weights. Opening a named pipe would
    // wait for whoever writes into it.
    if is_named || !path.is_file() || starts_like_weights(path).unwrap_or(true) {
        let checkpoint = Checkpoint::open_file(path)?;
        let version = match family(&checkpoint) {
            Some(Family::Transformer) => EditVersion::of_file(path).ok(),
            _ => None,
        };
        return show(&checkpoint, version.as_ref(), json);
    }
    picture(path, json)
}

fn show(checkpoint: &Checkpoint, version: Option<&EditVersion>, json: bool) -> Result<()> {
    if json {
        return super::print_json(&weights_json(checkpoint, version));
    }
    super::print(weights(checkpoint, version).as_bytes())
}

/// Whether the folder is that of a part, or of a model in one folder.
fn has_weights(folder: &Path) -> bool {
    let is_weights = |entry: std::io::Result<fs_err::DirEntry>| {
        entry.is_ok_and(|it| it.path().extension().is_some_and(|end| end == "safetensors"))
    };
    fs_err::read_dir(folder).is_ok_and(|mut entries| entries.any(is_weights))
}

/// A GGUF file, or a safetensors header under another name: a small length and an opening brace.
fn starts_like_weights(path: &Path) -> std::io::Result<bool> {
    use std::io::Read;
    let mut start = Vec::new();
    fs_err::File::open(path)?.take(START_BYTES as u64).read_to_end(&mut start)?;
    Ok(start.get(6..9) == Some(&[0, 0, b'{']) || start.starts_with(b"GGUF"))
}

fn shape(shape: &[usize]) -> String {
    let sides: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("[{}]", sides.join(", "))
}

fn weights(checkpoint: &Checkpoint, version: Option<&EditVersion>) -> String {
    let width = checkpoint.tensors().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, entry) in checkpoint.tensors() {
        text += &format!("{name:<width$}  {:<7} {}\n", entry.kind.to_string(), shape(&entry.shape));
    }
    for (key, value) in checkpoint.metadata() {
        let value = value.to_string();
        let shown: String = value.chars().take(VALUE_CHARS).collect();
        let more = if shown.len() < value.len() { " …" } else { "" };
        text += &format!("metadata {key}: {}{more}\n", shown.replace('\n', "\\n"));
    }
    text += &types(checkpoint);
    let version = version
        .map_or_else(String::new, |it| format!("version: {}, since {}\n", it.version, it.reason));
    text + &format!(
        "{} tensors, {} parameters, {}\nmodel: {}\n{version}fingerprint: {}\n",
        checkpoint.tensors().count(),
        checkpoint.elements(),
        indicatif::BinaryBytes(checkpoint.stored_bytes()),
        model(checkpoint),
        checkpoint.fingerprint(),
    )
}

fn model(checkpoint: &Checkpoint) -> &'static str {
    match family(checkpoint) {
        Some(Family::Lora) => "LoRA",
        _ => identify(checkpoint).unwrap_or("unknown"),
    }
}

/// How many tensors there are of each type, and which types are not read.
fn types(checkpoint: &Checkpoint) -> String {
    let mut types: BTreeMap<String, (usize, usize, bool)> = BTreeMap::new();
    for (_, entry) in checkpoint.tensors() {
        let (count, bytes, is_read) = types.entry(entry.kind.to_string()).or_default();
        (*count, *bytes, *is_read) = (*count + 1, *bytes + entry.bytes(), entry.kind.is_read());
    }
    let line = |(kind, (count, bytes, is_read)): (String, (usize, usize, bool))| {
        let hint = if is_read { "" } else { " (not read)" };
        format!("{kind:<8} {count} tensors, {}{hint}\n", indicatif::BinaryBytes(bytes as u64))
    };
    types.into_iter().map(line).collect()
}

fn weights_json(checkpoint: &Checkpoint, version: Option<&EditVersion>) -> Value {
    let tensors: BTreeMap<&str, Value> = checkpoint
        .tensors()
        .map(|(name, entry)| {
            (name, json!({ "type": entry.kind.to_string(), "shape": entry.shape }))
        })
        .collect();
    json!({
        "model": identify(checkpoint),
        "family": family(checkpoint),
        "version": version,
        "fingerprint": checkpoint.fingerprint(),
        "parameters": checkpoint.elements(),
        "stored_bytes": checkpoint.stored_bytes(),
        "metadata": checkpoint.metadata().iter().map(|(key, value)| (*key, value.to_string())).collect::<BTreeMap<_, _>>(),
        "tensors": tensors,
    })
}

fn folder(info: &ModelInfo) -> String {
    let mut text = format!("{}: {} ({})\n", info.name, info.version, info.class);
    if info.untrained {
        text += "untrained: random weights\n";
    }
    for part in &info.parts {
        let types: Vec<String> =
            part.types.iter().map(|(name, count)| format!("{count} {name}")).collect();
        text += &format!(
            "{:<13} {} tensors ({}), {} parameters, {}\n",
            part.name,
            part.tensors,
            types.join(", "),
            part.parameters,
            indicatif::BinaryBytes(part.stored_bytes),
        );
    }
    text + &format!(
        "defaults      {} px² ({} px² for the language model), {} steps, CFG {}\ndigest        {}\n",
        info.area, info.vl_area, info.steps, info.cfg_scale, info.digest
    )
}

fn picture(path: &Path, as_json: bool) -> Result<()> {
    let bytes = pixels::read_file(path, &Limits::default())?;
    let info = pixels::read_metadata(&bytes, &path.display().to_string(), &Limits::default())?;
    if as_json {
        return super::print_json(&info);
    }
    let mut text = format!("{} {}\n", info.format, info.size);
    if info.orientation != 1 {
        text += &format!("EXIF orientation {}\n", info.orientation);
    }
    if let Some(bytes) = info.icc_bytes {
        text += &format!("ICC profile of {bytes} bytes\n");
    }
    if info.several_frames {
        text += "several frames or pages; the first is used\n";
    }
    for note in &info.notes {
        text += &format!("note: {note}\n");
    }
    for entry in &info.texts {
        text += &format!("{}: {}\n", entry.keyword, entry.text);
    }
    super::print(text.as_bytes())
}
