//! The readers of what comes from outside, each as a function of bytes.

use std::path::{Path, PathBuf};

use pentimento::{
    CancelToken, EditRequest, Engine, EngineOptions, Error, ModelParts, ModelSource, Plan,
    diffusion::{Transformer, qwen_image, schedule::ScheduleConfig, vae},
    pixels::{self, Limits, Picture, Size},
    plan::{Decomposition, Prompts, align, ordered},
    vlm::{Adapter, ChatTemplate, Config, Message, Preprocessor, Tokenizer},
    weights::{Checkpoint, LoraFile, ModelFiles, Precision, Weights},
};

use crate::{allocated, seeds};

/// A reader, and what it is held to.
pub(crate) struct Reader {
    pub(crate) name: &'static str,
    /// Inputs that are accepted.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Reads, checks what comes of it, and tells whether the input was accepted.
    pub(crate) read: fn(&Place, &[u8]) -> bool,
    /// What reading so many bytes may hold in memory at once.
    pub(crate) bytes_max: fn(usize) -> usize,
    /// Words of the format.
    pub(crate) words: &'static [&'static str],
    /// Whether the reader may accept everything.
    pub(crate) one_sided: bool,
}

const MIB: usize = 1 << 20;
/// What opening may allocate beyond the file's size, in bytes: names, shapes, messages.
const OPEN_BYTES_MAX: usize = MIB;
/// How much wider than its file a tensor may be: from two and a half bits to f32 in three copies.
const WIDER: usize = 64;

const JSON: &[&str] =
    &["{", "}", "[", "]", ",", ":", "null", "true", "\"", "{\"\":", "\\u0000", "[["];
const TENSORS: &[&str] = &[
    "\"dtype\":\"F8_E4M3\"",
    "\"shape\":[",
    "\"data_offsets\":[0,",
    "__metadata__",
    ".weight_scale",
    ".scale_weight",
    ".comfy_quant",
    ".input_scale",
    "scaled_fp8",
    "_quantization_metadata",
    "F64",
    "I64",
    "BOOL",
    "F4",
    ".lora_A.weight",
    ".lora_up.weight",
    ".alpha",
    "lora_adapter_metadata",
];
const GGUF: &[&str] = &[
    "GGUF",
    "general.alignment",
    "general.architecture",
    "qwen_image",
    "qwen2vl",
    "clip",
    "comfy.gguf.orig_shape.",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.model",
];

pub(crate) const READERS: &[Reader] = &[
    Reader { words: TENSORS, ..reader("safetensors", seeds::safetensors, safetensors) },
    Reader { words: TENSORS, ..reader("scaled", seeds::scaled, safetensors) },
    Reader { words: GGUF, ..reader("gguf", seeds::gguf, gguf) },
    Reader { words: TENSORS, ..reader("lora", seeds::lora, lora) },
    Reader { words: TENSORS, ..reader("transformer", seeds::transformer, transformer) },
    Reader { words: GGUF, ..reader("language_model", seeds::language_model, language_model) },
    reader("index", seeds::index, index),
    reader("lora_config", seeds::lora_config, lora_config),
    reader("adapter_config", seeds::adapter_config, adapter_config),
    reader("configs", seeds::configs, configs),
    Reader {
        bytes_max: |n| 400 * n + 64 * MIB,
        ..reader("tokenizer", seeds::tokenizer, tokenizer)
    },
    Reader {
        words: &[
            "{{",
            "}}",
            "{%",
            "%}",
            "for",
            "endfor",
            "if",
            "endif",
            "messages",
            "loop",
            "set",
            "|",
            "~",
            "range(",
            "namespace(",
        ],
        bytes_max: |n| 4000 * n + 64 * MIB,
        ..reader("template", seeds::template, template)
    },
    reader("plan", seeds::plan, plan),
    Reader {
        words: &[
            "<action>",
            "</action>",
            "<subject>",
            "</subject>",
            "<goal>",
            "</goal>",
            ";",
            "recolor",
            "delete",
            "\n",
        ],
        ..reader("decomposition", seeds::decomposition, decomposition)
    },
    Reader {
        words: &["[decompose.system]", "[sequence.user]", "{request}", "[", "]"],
        ..reader("prompts", seeds::prompts, prompts)
    },
    Reader {
        words: &[
            "IHDR", "IDAT", "iTXt", "zTXt", "tEXt", "iCCP", "eXIf", "acTL", "VP8X", "ICCP", "RIFF",
            "WEBP", "Exif\0\0", "P6", "P7", "BM", "GIF89a",
        ],
        bytes_max: |n| 16 * n + 96 * MIB,
        ..reader("picture", seeds::pictures, picture)
    },
    Reader {
        words: &["iTXt", "zTXt", "tEXt", "iCCP", "eXIf", "pentimento", "parameters"],
        bytes_max: |n| 16 * n + 96 * MIB,
        ..reader("metadata", seeds::pictures, metadata)
    },
    Reader { words: &[], one_sided: true, ..reader("sizes", seeds::sizes, sizes) },
];

const fn reader(
    name: &'static str,
    seeds: fn() -> Vec<Vec<u8>>,
    read: fn(&Place, &[u8]) -> bool,
) -> Reader {
    let bytes_max = |n: usize| 200 * n + 8 * MIB;
    Reader { name, seeds, read, bytes_max, words: JSON, one_sided: false }
}

/// A folder with what the readers need beside their input.
pub(crate) struct Place {
    folder: tempfile::TempDir,
    /// The miniature pack in memory.
    engine: Engine,
}

pub(crate) fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(path)
}

fn reference(path: &str) -> PathBuf {
    data("reference/tiny-qwen-2511").join(path)
}

impl Place {
    pub(crate) fn new() -> Self {
        let options = EngineOptions { device: pentimento::Device::Cpu, ..EngineOptions::default() };
        let engine = Engine::open(&ModelSource::Mini, &options, &()).unwrap();
        Self { folder: tempfile::tempdir().unwrap(), engine }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file of the folder, and the folders above it.
    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, bytes).unwrap();
        path
    }

    /// A file of the folder that is there from the second time on.
    fn once(&self, name: &str, bytes: impl FnOnce() -> Vec<u8>) -> PathBuf {
        let path = self.path(name);
        if path.is_file() { path } else { self.write(name, &bytes()) }
    }

    fn files(&self) -> ModelFiles {
        ModelFiles::Folder(self.folder.path().to_owned())
    }
}

/// Holds an error to what a model's files may fail with; `name` is the file's.
fn refused<T>(result: Result<T, Error>, name: &str) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error @ Error::Model(_)) => {
            let text = error.to_string();
            assert!(text.contains(name), "the error does not name {name}: {text}");
            None
        }
        Err(other) => panic!("no error of a model's file: {other:?}"),
    }
}

/// Opens a file of weights and reads every tensor.
fn weights(path: &Path, bytes: usize) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    let (opened, used) = allocated(|| Checkpoint::open_file(path));
    assert!(used <= 16 * bytes + OPEN_BYTES_MAX, "{used} bytes to open {bytes}");
    let Some(checkpoint) = refused(opened, name) else { return false };
    assert!(!checkpoint.fingerprint().is_empty());
    let tensors: Vec<(String, Vec<usize>)> =
        checkpoint.tensors().map(|(name, entry)| (name.to_owned(), entry.shape.clone())).collect();
    let weights = Weights::new(checkpoint, Precision::reference());
    let ((), used) = allocated(|| {
        for (tensor, shape) in &tensors {
            // A type that is not read is an error; a panic is not.
            drop(refused(weights.tensor(tensor, shape), name));
            if let &[rows, width] = shape.as_slice() {
                drop(refused(weights.linear_weight(tensor, [rows, width]), name));
            }
        }
    });
    assert!(used <= WIDER * bytes + OPEN_BYTES_MAX, "{used} bytes to read {bytes}");
    true
}

fn safetensors(place: &Place, input: &[u8]) -> bool {
    weights(&place.write("input.safetensors", input), input.len())
}

fn gguf(place: &Place, input: &[u8]) -> bool {
    weights(&place.write("input.gguf", input), input.len())
}

fn read_lora(place: &Place, path: &Path, name: &str) -> bool {
    let Some(file) = refused(LoraFile::open(path, 0.5), name) else { return false };
    let model = ModelFiles::Folder(place.folder.path().to_owned());
    let read = Transformer::read_loras(&model, &[file], &Precision::reference());
    let Some((_, reports)) = refused(read, name) else { return false };
    assert_eq!(reports.len(), 1);
    true
}

fn lora(place: &Place, input: &[u8]) -> bool {
    let model = "transformer/diffusion_pytorch_model.safetensors";
    place.once(model, seeds::small_transformer);
    read_lora(place, &place.write("loras/input.safetensors", input), "input.safetensors")
}

fn lora_config(place: &Place, input: &[u8]) -> bool {
    let model = "transformer/diffusion_pytorch_model.safetensors";
    place.once(model, seeds::small_transformer);
    place.write("loras/adapter_config.json", input);
    let path = place.once("loras/adapter_model.safetensors", seeds::bare_lora);
    // A rank of the config is held against the tensors, so either file may be named.
    read_lora(place, &path, "adapter_")
}

fn adapter_config(place: &Place, input: &[u8]) -> bool {
    place.once("text_encoder/config.json", || {
        fs_err::read(data("vlm/flat/text_encoder/config.json")).unwrap()
    });
    place.once("qv/adapter_model.safetensors", || {
        fs_err::read(data("vlm/adapters/qv/adapter_model.safetensors")).unwrap()
    });
    place.write("qv/adapter_config.json", input);
    let text = Config::load(&place.files(), "text_encoder/config.json").unwrap().text;
    let adapter = Adapter::load(&place.files(), "qv", &text, &Precision::reference());
    refused(adapter, "adapter_").is_some()
}

/// A single file as each of the parts that a user may name.
fn transformer(place: &Place, input: &[u8]) -> bool {
    let path = place.write("input.safetensors", input);
    let folder = Some(reference(""));
    let part = |parts: ModelParts| {
        let parts = ModelParts { folder: folder.clone(), ..parts };
        refused(ModelSource::Files(parts).files(), "input.safetensors").is_some()
    };
    part(ModelParts { vae: Some(path.clone()), ..ModelParts::default() });
    part(ModelParts { llm: Some(path.clone()), ..ModelParts::default() });
    part(ModelParts { diffusion_model: Some(path), ..ModelParts::default() })
}

fn language_model(place: &Place, input: &[u8]) -> bool {
    let llm = place.write("input.gguf", input);
    let mmproj = place.once("mmproj.gguf", seeds::vision_tower);
    let parts = ModelParts { llm: Some(llm), mmproj: Some(mmproj), ..ModelParts::default() };
    let Some(files) = refused(ModelSource::Files(parts).files(), ".gguf") else { return false };
    let config = refused(Config::load(&files, "text_encoder/config.json"), "input.gguf");
    let tokenizer = refused(Tokenizer::load(&files, &["tokenizer"]), "input.gguf");
    drop(refused(ChatTemplate::load(&files, &["tokenizer"]), "input.gguf"));
    if let Some(tokenizer) = &tokenizer {
        drop(tokenizer.encode("ab <|im_end|> é"));
    }
    config.is_some() && tokenizer.is_some()
}

fn index(place: &Place, input: &[u8]) -> bool {
    for shard in ["a.safetensors", "b.safetensors"] {
        place.once(&format!("part/{shard}"), || seeds::one_tensor(&shard[..1]));
    }
    place.write("part/model.safetensors.index.json", input);
    refused(place.files().checkpoint("part", "model"), "part/").is_some()
}

/// The first byte says which config the rest is.
fn configs(place: &Place, input: &[u8]) -> bool {
    let Some((kind, text)) = input.split_first() else { return false };
    let files = place.files();
    let write = |name: &str| place.write(name, text);
    match kind % 5 {
        0 => {
            write("transformer/config.json");
            refused(qwen_image::Config::load(&files), "config.json").is_some()
        }
        1 => {
            write("text_encoder/config.json");
            refused(Config::load(&files, "text_encoder/config.json"), "config.json").is_some()
        }
        2 => {
            write("vae/config.json");
            refused(vae::Config::load(&files), "config.json").is_some()
        }
        3 => {
            write("scheduler/scheduler_config.json");
            let Some(config) = refused(ScheduleConfig::load(&files), "scheduler_config.json")
            else {
                return false;
            };
            for (steps, tokens) in [(0, 1), (1, 1), (4, 4096), (40, usize::MAX), (usize::MAX, 1)] {
                match config.schedule(steps, tokens) {
                    Ok(schedule) => {
                        let finite = |levels: &[f32]| levels.iter().all(|level| level.is_finite());
                        assert!(finite(schedule.sigmas()) && schedule.steps() == steps);
                    }
                    Err(Error::Request(_)) => {}
                    Err(other) => panic!("{other:?}"),
                }
            }
            true
        }
        _ => {
            write("processor/preprocessor_config.json");
            let vision =
                Config::load(&ModelFiles::Folder(reference("")), "text_encoder/config.json");
            let loaded = Preprocessor::load(&files, &["processor"], &vision.unwrap().vision);
            let Some(preprocessor) = refused(loaded, "preprocessor_config.json") else {
                return false;
            };
            for (width, height) in [(0, 1), (1, 1), (28, 5600), (u32::MAX, u32::MAX), (1, u32::MAX)]
            {
                drop(preprocessor.grid(width, height));
            }
            true
        }
    }
}

fn tokenizer(place: &Place, input: &[u8]) -> bool {
    place.write("tokenizer/tokenizer.json", input);
    let loaded = Tokenizer::load(&place.files(), &["tokenizer"]);
    let Some(tokenizer) = refused(loaded, "tokenizer.json") else { return false };
    if let Ok(tokens) = tokenizer.encode("make it red<|im_end|>\n é 你好 1234 it's\r\n\n") {
        drop(tokenizer.decode(&tokens));
    }
    drop(tokenizer.decode(&[0, 1, u32::MAX, tokenizer.id_end()]));
    true
}

fn template(place: &Place, input: &[u8]) -> bool {
    place.write("tokenizer/chat_template.jinja", input);
    let loaded = ChatTemplate::load(&place.files(), &["tokenizer"]);
    let Some(template) = refused(loaded, "chat_template.jinja") else { return false };
    let messages = [Message::text("system", "be brief"), Message::user(2, "make it red")];
    match template.render(&messages) {
        Ok(_) => true,
        Err(Error::Request(_)) => false,
        Err(other) => panic!("{other:?}"),
    }
}

fn plan(_: &Place, input: &[u8]) -> bool {
    match Plan::from_json(input) {
        Ok(plan) => {
            let again =
                Plan::from_json(plan.to_json().as_bytes()).expect("what is written is read");
            assert_eq!(again, plan);
            assert!(!plan.merged(". ").is_empty() && !plan.to_string().is_empty());
            true
        }
        Err(Error::Request(_)) => false,
        Err(other) => panic!("{other:?}"),
    }
}

fn decomposition(_: &Place, input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    match Decomposition::parse(&text) {
        Ok(parts) => {
            assert_eq!(Decomposition::parse(&parts.to_string()).as_ref(), Ok(&parts));
            let steps = ordered(&parts);
            let texts: Vec<String> = steps.into_iter().map(|step| step.prompt).collect();
            drop(align(&parts, &texts));
            true
        }
        Err(malformed) => {
            assert!(malformed.at <= text.len(), "byte {} of {}", malformed.at, text.len());
            false
        }
    }
}

fn prompts(_: &Place, input: &[u8]) -> bool {
    let mut prompts = Prompts::default();
    match prompts.set_sections(&String::from_utf8_lossy(input)) {
        Ok(()) => {
            assert!(!prompts.for_decomposition(1, "make it red").is_empty());
            true
        }
        Err(Error::Request(_)) => false,
        Err(other) => panic!("{other:?}"),
    }
}

fn limits() -> Limits {
    Limits {
        bytes_max: MIB as u64,
        side_px_max: 2048,
        pixels_max: 1 << 20,
        memory_bytes_max: 16 << 20,
    }
}

/// Holds an error to what pictures may fail with.
fn picture_refused<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error @ Error::Picture(_)) => {
            let text = error.to_string();
            assert!(text.contains("input.png"), "the error does not name the picture: {text}");
            None
        }
        Err(other) => panic!("no error of a picture: {other:?}"),
    }
}

fn picture(_: &Place, input: &[u8]) -> bool {
    let decoded = picture_refused(Picture::decode(input, "input.png", &limits()));
    let Some(picture) = decoded else { return false };
    assert!(picture.size().pixels() <= limits().pixels_max && picture.size().pixels() > 0);
    if let Some(alpha) = &picture.alpha {
        assert_eq!(Size::of(alpha), picture.size());
    }
    true
}

fn metadata(_: &Place, input: &[u8]) -> bool {
    picture_refused(pixels::read_metadata(input, "input.png", &limits())).is_some()
}

/// Numbers of a request and the sizes of its picture; the request is cancelled before any work.
fn sizes(place: &Place, input: &[u8]) -> bool {
    let byte = |at: usize| input.get(at).copied().unwrap_or(0);
    let number = |at: usize| {
        let bytes: [u8; 8] = std::array::from_fn(|i| byte(at + 1 + i));
        (byte(at) & 1 == 1).then(|| u64::from_le_bytes(bytes) >> (byte(at) >> 2))
    };
    let side = |at: usize| u32::from(byte(at)) * u32::from(byte(at + 1) & 3) + 1;
    let picture = image::RgbImage::new(side(0), side(2));
    let mut request = EditRequest::new(Picture::from_rgb(picture), "make it night");
    request.cancel = CancelToken::new();
    request.cancel.cancel();
    request.width = number(4).map(|n| n as u32);
    request.height = number(13).map(|n| n as u32);
    request.area = number(22);
    request.vl_area = number(31);
    request.steps = number(40).map(|n| n as usize);
    request.cfg_scale = number(49).map(f64::from_bits);
    match place.engine.edit(&request, &()) {
        Ok(_) => panic!("a cancelled request was carried out"),
        Err(Error::Cancelled) => true,
        Err(Error::Request(_) | Error::OutOfMemory { .. }) => false,
        Err(other) => panic!("{other:?}"),
    }
}
