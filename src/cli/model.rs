//! From what was typed about a model to what the engine opens.

use std::{io::Read, path::Path};

use pentimento::{
    CancelToken, Device, EngineOptions, LoraSource, ModelParts, ModelSource, PlacementOptions,
    PlannerSource, Result,
    library::{self, Want},
    memory::Budget,
    pixels::{Limits, Picture},
    weights::{Family, Storage},
};

use super::{
    args::{DtypeArg, LoraArgs, ModelArgs},
    memory_args::MemoryArgs,
    places,
};

/// Where the model comes from; names are looked up.
pub(crate) fn source(args: &ModelArgs) -> Result<ModelSource> {
    let places = places::places(&args.places)?;
    let file =
        |flag, value, families: &[Family]| places::weight_file(flag, value, families, &places);
    let language = [Family::Language, Family::VisionLanguage];
    let parts = ModelParts {
        folder: places::model_folder("--model", &args.model, &places)?,
        diffusion_model: file("--diffusion-model", &args.diffusion_model, &[Family::Transformer])?,
        llm: file("--llm", &args.llm, &language)?,
        mmproj: file("--mmproj", &args.mmproj, &[Family::VisionTower])?,
        vae: file("--vae", &args.vae, &[Family::Autoencoder])?,
        zero_cond_t: args.model_args,
    };
    let only_folder = ModelParts { folder: parts.folder.clone(), ..ModelParts::default() };
    Ok(match &parts.folder {
        _ if parts != only_folder => ModelSource::Files(parts),
        Some(folder) => ModelSource::Folder(folder.clone()),
        None => ModelSource::Mini,
    })
}

/// LoRA files; names are looked up.
fn loras(files: &[LoraSource], args: &ModelArgs) -> Result<Vec<LoraSource>> {
    let places = places::places(&args.places)?;
    let found = |lora: &LoraSource| {
        let want = Want::File(&[Family::Lora]);
        let path = library::resolve("--lora", &lora.path, want, &places)?;
        Ok(LoraSource { path, ..lora.clone() })
    };
    files.iter().map(found).collect()
}

/// Where and how it runs. Sets the number of threads for the whole process.
pub(crate) fn options(args: &ModelArgs, cancel: &CancelToken) -> Result<EngineOptions> {
    if let Some(threads) = args.threads {
        pentimento::set_threads(usize::from(threads))?;
    }
    Ok(EngineOptions {
        device: args.device.parse::<Device>()?,
        storage: match args.dtype {
            DtypeArg::Auto => None,
            DtypeArg::F32 => Some(Storage::Plain(candle_core::DType::F32)),
            DtypeArg::Bf16 => Some(Storage::Plain(candle_core::DType::BF16)),
            DtypeArg::F16 => Some(Storage::Plain(candle_core::DType::F16)),
            DtypeArg::Q8_0 => Some(Storage::Q8_0),
            DtypeArg::Q4K => Some(Storage::Q4K),
        },
        float8_products: args.fp8_matmul,
        budget: Budget {
            ram: args.memory.max_ram.unwrap_or_default(),
            vram: args.memory.max_vram.unwrap_or_default(),
        },
        placement: placement(&args.memory),
        planner: PlannerSource::default(),
        loras: Vec::new(),
        no_lightning_defaults: false,
        memory: None,
        cancel: cancel.clone(),
    })
}

/// As [`options`], for commands that load the editor.
pub(crate) fn editor_options(
    args: &ModelArgs,
    lora: &LoraArgs,
    cancel: &CancelToken,
) -> Result<EngineOptions> {
    let loras = loras(&lora.files, args)?;
    let no_lightning_defaults = lora.no_lightning_defaults;
    Ok(EngineOptions { loras, no_lightning_defaults, ..options(args, cancel)? })
}

/// The ways to save memory that were asked for.
fn placement(args: &MemoryArgs) -> PlacementOptions {
    let tile_px = args.vae_tile_size.map(usize::from);
    PlacementOptions {
        take_turns: args.offload,
        stream_blocks: args.stream_layers,
        tiles: (args.vae_tiling || tile_px.is_some()).then_some(tile_px),
        guidance: None,
    }
}

/// The pictures of a request; `-` is stdin and may stand once.
pub(crate) fn pictures(paths: &[impl AsRef<Path>]) -> Result<Vec<Picture>> {
    let limits = Limits::default();
    let mut stdin_used = false;
    let mut pictures = Vec::with_capacity(paths.len());
    for path in paths {
        let path = path.as_ref();
        if path.as_os_str() != "-" {
            pictures.push(Picture::open(path, &limits)?);
            continue;
        }
        if std::mem::replace(&mut stdin_used, true) {
            return Err(pentimento::RequestError::Field {
                field: "--image",
                found: "`-` twice".to_owned(),
                expected: "stdin at most once".to_owned(),
            }
            .into());
        }
        let mut bytes = Vec::new();
        std::io::stdin().lock().take(limits.bytes_max + 1).read_to_end(&mut bytes)?;
        pictures.push(Picture::decode(&bytes, "stdin", &limits)?);
    }
    Ok(pictures)
}
