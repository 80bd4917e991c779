//! What the new files hold: a layout for each family and format.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value as Json};

use super::{ConvertRequest, source::Transformer};
use crate::{
    diffusion::qwen_image::{export as transformer_export, header},
    editor::assemble::version::{by_name, version_name},
    error::{Error, RequestError, Result},
    vlm::export::Exported,
    weights::{
        Checkpoint, WriteFormat, WriteType,
        write::{Choice, Content, Draft, Fallback, Item, Key, Layout, Part, Role, Wish},
    },
};

/// The version of ggml's types of blocks.
const QUANTIZATION_VERSION: u32 = 2;
/// Most names in a note.
const NAMES_MAX: usize = 3;

/// A file that is going to be written.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) path: PathBuf,
    pub(super) layout: Layout,
}

/// What the user should know about the types.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub(super) texts: Vec<String>,
    fallbacks: BTreeMap<Fallback, Vec<String>>,
    /// Matrices that were quantized before, in another type.
    again: usize,
}

impl Notes {
    /// All notes.
    pub(super) fn finish(mut self) -> Vec<String> {
        for (fallback, names) in &self.fallbacks {
            let more = if names.len() > NAMES_MAX { ", …" } else { "" };
            let shown = names[..names.len().min(NAMES_MAX)].join(", ");
            let what = match names.len() {
                1 => "1 matrix whose rows are not whole blocks".to_owned(),
                count => format!("{count} matrices whose rows are not whole blocks"),
            };
            self.texts.push(format!("{what}: {fallback} ({shown}{more})"));
        }
        if self.again > 0 {
            self.texts.push(format!(
                "{} matrices were quantized before and lose a second time; the published file in \
                 bf16 gives a better one",
                self.again
            ));
        }
        self.texts
    }
}

/// The format that is asked for, by flag or name.
pub(super) fn format(request: &ConvertRequest) -> Result<WriteFormat> {
    let Some(format) = request.format.or_else(|| WriteFormat::from_path(&request.output)) else {
        let found = request.output.display();
        return Err(Error::field(
            "--output",
            found,
            "a name that ends in .gguf or .safetensors, or --format",
        ));
    };
    let mut kinds = std::iter::once(request.kind).chain(request.rules.kinds());
    match kinds.find(|kind| !format.holds(*kind)) {
        None => Ok(format),
        Some(kind) => Err(RequestError::Unsupported {
            model: format!("the format {}", format.name()),
            what: format!("the type {kind}"),
            hint: match format {
                WriteFormat::Gguf => "write .safetensors for fp8, or .gguf with q8_0",
                WriteFormat::Safetensors => "write .gguf for blocks, or .safetensors with fp8",
            }
            .to_owned(),
        }
        .into()),
    }
}

/// All tensors under their own names.
pub(super) fn whole(checkpoint: &Checkpoint, role: impl Fn(&str) -> Role) -> Vec<Draft> {
    let draft = |(name, entry): (&str, &crate::weights::TensorEntry)| Draft {
        name: name.to_owned(),
        source: name.to_owned(),
        part: Part::Whole,
        shape: entry.shape.clone(),
        role: role(name),
    };
    checkpoint.tensors().map(draft).collect()
}

/// The transformer with what tells its version.
pub(super) fn transformer(
    request: &ConvertRequest,
    wish: &Wish,
    transformer: &Transformer,
    notes: &mut Notes,
) -> (String, Planned) {
    let checkpoint = &transformer.checkpoint;
    let mut config = transformer.config.clone();
    let mut name = transformer.name.clone();
    if let Some((kind, zero_cond_t)) = transformer.version {
        if by_name(&name) != Some((kind, zero_cond_t)) {
            version_name(kind, zero_cond_t).clone_into(&mut name);
        }
        if let Some(config) = &mut config {
            config.insert("zero_cond_t".to_owned(), zero_cond_t.into());
        }
    }
    notes.texts.extend(transformer.note.clone());
    let mark = transformer_export::ZERO_COND_MARK;
    let mut drafts = whole(checkpoint, transformer_export::role);
    drafts.retain(|draft| draft.name != mark);
    let mut items = items(wish, checkpoint, drafts, notes);
    let is_marked = match transformer.version {
        Some((_, zero_cond_t)) => zero_cond_t,
        None => checkpoint.contains(mark),
    };
    if is_marked {
        let content = Content::Bytes { kind: ("F32", 0), bytes: vec![0; 4] };
        items.push(Item { name: mark.to_owned(), shape: vec![1], content });
    }
    let config = config.map(|config: Map<String, Json>| Json::Object(config).to_string());
    let mut layout = Layout { format: wish.format, keys: Vec::new(), texts: Vec::new(), items };
    match wish.format {
        WriteFormat::Gguf => {
            let key = |name: &str, value: &Key<'_>| (name.to_owned(), value.bytes());
            let architecture = transformer_export::ARCHITECTURE;
            layout.keys = vec![
                key("general.architecture", &Key::Text(architecture)),
                key("general.type", &Key::Text("model")),
            ];
            layout.keys.extend(general_keys(wish.kind, &name));
            layout.keys.extend(config.map(|text| key(header::CONFIG_KEY, &Key::Text(&text))));
        }
        WriteFormat::Safetensors => {
            layout.texts = texts(&name);
            layout.texts.extend(config.map(|text| (header::CONFIG_KEY.to_owned(), text)));
            arrange(&mut layout.items);
        }
    }
    (name, Planned { path: request.output.clone(), layout })
}

/// A language model and its vision tower as two GGUF files.
pub(super) fn gguf_pair(
    request: &ConvertRequest,
    wish: &Wish,
    checkpoint: &Checkpoint,
    (name, exported): (&str, [Exported; 2]),
    notes: &mut Notes,
) -> Result<Vec<Planned>> {
    let beside = || {
        let stem = request.output.file_name().unwrap_or_default().to_string_lossy();
        request.output.with_file_name(format!("mmproj-{stem}"))
    };
    let tower_path = request.mmproj_output.clone().unwrap_or_else(beside);
    if tower_path == request.output {
        return Err(Error::field(
            "--mmproj-output",
            tower_path.display(),
            "another file than --output",
        ));
    }
    let paths = [request.output.clone(), tower_path];
    let mut planned = Vec::with_capacity(paths.len());
    for (path, exported) in paths.into_iter().zip(exported) {
        let items = items(wish, checkpoint, exported.drafts, notes);
        let mut keys = exported.keys;
        keys.extend(general_keys(main_type(&items).unwrap_or(wish.kind), name));
        let layout = Layout { format: wish.format, keys, texts: Vec::new(), items };
        planned.push(Planned { path, layout });
    }
    Ok(planned)
}

/// Tensors under the names that they have, as safetensors.
pub(super) fn safetensors(
    path: &Path,
    wish: &Wish,
    checkpoint: &Checkpoint,
    (name, drafts): (&str, Vec<Draft>),
    notes: &mut Notes,
) -> Planned {
    let mut items = items(wish, checkpoint, drafts, notes);
    arrange(&mut items);
    let layout = Layout { format: wish.format, keys: Vec::new(), texts: texts(name), items };
    Planned { path: path.to_owned(), layout }
}

/// The type that most matrices have, where they are not copied.
fn main_type(items: &[Item]) -> Option<WriteType> {
    let mut counts = BTreeMap::new();
    for item in items.iter().filter(|item| item.shape.len() == 2) {
        match &item.content {
            Content::Numbers { kind, .. } => *counts.entry(Some(*kind)).or_insert(0) += 1,
            _ => *counts.entry(None).or_insert(0) += 1,
        }
    }
    counts.into_iter().max_by_key(|(_, count)| *count).and_then(|(kind, _)| kind)
}

fn general_keys(kind: WriteType, name: &str) -> Vec<(String, Vec<u8>)> {
    let file_type = kind.file_type().unwrap_or(0);
    [
        ("general.name", Key::Text(name)),
        ("general.file_type", Key::U32(file_type)),
        ("general.quantization_version", Key::U32(QUANTIZATION_VERSION)),
    ]
    .map(|(name, value)| (name.to_owned(), value.bytes()))
    .to_vec()
}

fn texts(name: &str) -> Vec<(String, String)> {
    let text = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    vec![text("format", "pt"), text("modelspec.title", name)]
}

/// Chooses a type for every tensor.
fn items(wish: &Wish, checkpoint: &Checkpoint, drafts: Vec<Draft>, notes: &mut Notes) -> Vec<Item> {
    let mut items = Vec::with_capacity(drafts.len());
    for Draft { name, source, part, shape, role } in drafts {
        let Some(entry) = checkpoint.entry(&source) else { continue };
        let (choice, fallback) = wish.choose(&name, &shape, entry, role);
        if let Some(fallback) = fallback {
            notes.fallbacks.entry(fallback).or_default().push(name.clone());
        }
        if let Choice::As(kind) = choice {
            notes.again += usize::from(kind.is_blocks() && entry.is_blocks());
        }
        let is_fp8 = wish.format == WriteFormat::Safetensors
            && match &choice {
                Choice::As(kind) => *kind == WriteType::Fp8,
                Choice::Copied => true,
            };
        let copied = choice == Choice::Copied;
        let content = choice.content(&source, part);
        items.push(Item { name: name.clone(), shape, content });
        let Some(layer) = name.strip_suffix(".weight").filter(|_| is_fp8) else { continue };
        // ComfyUI's newer form: a scale and a description for each matrix.
        let content = match copied {
            true => {
                Content::Bytes { kind: ("F32", 0), bytes: entry.scale().to_le_bytes().to_vec() }
            }
            false => Content::Scale(name.clone()),
        };
        items.push(Item { name: format!("{layer}.weight_scale"), shape: Vec::new(), content });
        let bytes = br#"{"format": "float8_e4m3fn"}"#.to_vec();
        let shape = vec![bytes.len()];
        let content = Content::Bytes { kind: ("U8", 0), bytes };
        items.push(Item { name: format!("{layer}.comfy_quant"), shape, content });
    }
    items
}

/// Puts tensors in an order in which each is aligned to its numbers without gaps: f32, then fp8,
/// whose sizes are multiples of four, then their scales, then what is of two bytes and of one.
fn arrange(items: &mut [Item]) {
    let place = |item: &Item| match &item.content {
        Content::Numbers { kind: WriteType::F32, .. } => 0,
        Content::Numbers { kind: WriteType::Fp8, .. } | Content::Copied { .. } => 1,
        Content::Scale(_) | Content::Bytes { kind: ("F32", _), .. } => 2,
        Content::Numbers { .. } => 3,
        Content::Bytes { .. } => 4,
    };
    items.sort_by_key(place);
}
