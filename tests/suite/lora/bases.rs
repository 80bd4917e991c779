//! LoRA on every kind of base: one transformer of the published width of heads, in every container
//! and type that is read, and what its matrices give when the changes are merged into them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor, quantized::GgmlDType};
use pentimento::{
    CancelToken, LoraSource, ModelParts, ModelSource,
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    weights::{LoraFile, ModelFiles, Precision, Storage},
};
use safetensors::Dtype;

use super::{Tensors, bits, save};
use crate::common::{
    Reference, Tolerance, assert_close, float8_bytes,
    gguf_writer::Gguf,
    parts::{Kind, rounded},
    save_raw,
};

const DIM: usize = 256;
const LATENT: usize = 64;
const RANK: usize = 4;
const ALPHA: i64 = 6;
/// What ComfyUI's scale of a matrix is here.
const SCALE: f32 = 0.0021;
const GRID: Grid = Grid { height: 3, width: 4 };

/// Numbers from −1 to 1 that look random.
fn noise(shape: &[usize], seed: u64, size: f32) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
    let count: usize = shape.iter().product();
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0) * size
    };
    let values: Vec<f32> = (0..count).map(|_| next()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// Names and widths `[out, in]` of the linear layers.
fn matrices() -> Vec<(String, [usize; 2])> {
    let mut all = vec![
        ("img_in".to_owned(), [DIM, LATENT]),
        ("txt_in".to_owned(), [DIM, DIM]),
        ("time_text_embed.timestep_embedder.linear_1".to_owned(), [DIM, 256]),
        ("time_text_embed.timestep_embedder.linear_2".to_owned(), [DIM, DIM]),
        ("norm_out.linear".to_owned(), [2 * DIM, DIM]),
        ("proj_out".to_owned(), [LATENT, DIM]),
    ];
    let mut add = |name: &str, widths| all.push((format!("transformer_blocks.0.{name}"), widths));
    for stream in ["img", "txt"] {
        add(&format!("{stream}_mod.1"), [6 * DIM, DIM]);
        add(&format!("{stream}_mlp.net.0.proj"), [4 * DIM, DIM]);
        add(&format!("{stream}_mlp.net.2"), [DIM, 4 * DIM]);
    }
    for name in
        ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    {
        add(&format!("attn.{name}"), [DIM, DIM]);
    }
    all
}

/// The transformer in float32.
fn weights() -> Tensors {
    let mut tensors = Tensors::new();
    for (index, (name, [out, width])) in matrices().into_iter().enumerate() {
        let size = 1.7 / (width as f32).sqrt();
        tensors.insert(format!("{name}.weight"), noise(&[out, width], index as u64, size));
        tensors.insert(format!("{name}.bias"), noise(&[out], 100 + index as u64, 0.1));
    }
    tensors.insert("txt_norm.weight".to_owned(), noise(&[DIM], 200, 1.0));
    for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"] {
        let ones = (noise(&[128], 201, 0.1) + 1.0).unwrap();
        tensors.insert(format!("transformer_blocks.0.attn.{name}.weight"), ones);
    }
    tensors
}

/// A LoRA of every matrix, with whole numbers as alphas.
fn factors() -> Tensors {
    let mut tensors = Tensors::new();
    for (index, (name, [out, width])) in matrices().into_iter().enumerate() {
        let down = noise(&[RANK, width], 300 + index as u64, 0.4 / (width as f32).sqrt());
        let up = noise(&[out, RANK], 400 + index as u64, 0.5);
        tensors.insert(format!("{name}.lora_A.weight"), down);
        tensors.insert(format!("{name}.lora_B.weight"), up);
        tensors.insert(format!("{name}.alpha"), Tensor::new(ALPHA, &Device::Cpu).unwrap());
    }
    tensors
}

/// `values` with the changes added to the matrices.
fn merged(values: &Tensors) -> Tensors {
    let (mut all, factors) = (values.clone(), factors());
    for (name, _) in matrices() {
        let [down, up] = ["A", "B"].map(|end| &factors[&format!("{name}.lora_{end}.weight")]);
        let change = (up.matmul(down).unwrap() * (ALPHA as f64 / RANK as f64)).unwrap();
        let weight = all.get_mut(&format!("{name}.weight")).unwrap();
        *weight = (&*weight + change).unwrap();
    }
    all
}

fn config() -> String {
    serde_json::json!({
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": false,
        "in_channels": LATENT,
        "joint_attention_dim": DIM,
        "num_attention_heads": DIM / 128,
        "num_layers": 1,
        "out_channels": 16,
        "patch_size": 2,
        "zero_cond_t": true,
    })
    .to_string()
}

/// A file of the transformer, as a part beside a folder that lends the rest.
fn files(path: PathBuf) -> ModelFiles {
    fs_err::write(path.with_file_name("config.json"), config()).unwrap();
    let folder = Some(Reference::open("tiny-qwen-2511").folder);
    let parts = ModelParts { folder, diffusion_model: Some(path), ..ModelParts::default() };
    ModelSource::Files(parts).files().unwrap()
}

fn f32_files(folder: &Path, name: &str, tensors: &Tensors) -> ModelFiles {
    let folder = folder.join(name);
    fs_err::create_dir(&folder).unwrap();
    files(save(&folder, "2511.safetensors", tensors))
}

fn output(files: &ModelFiles, storage: Storage, lora: Option<&LoraSource>) -> Tensor {
    let precision = Precision { storage, ..Precision::reference() };
    let loras: Vec<LoraFile> =
        lora.map(|lora| LoraFile::open(&lora.path, lora.strength).unwrap()).into_iter().collect();
    let (changes, reports) = Transformer::read_loras(files, &loras, &precision).unwrap();
    assert!(reports.iter().all(|report| report.modules == matrices().len()), "{reports:?}");
    let model = Transformer::load_changed(files, &precision, changes).unwrap();
    let input = ModelInput {
        tokens: &noise(&[1, 2 * GRID.tokens(), LATENT], 500, 1.0),
        grids: &[GRID, GRID],
        conditioning: &Conditioning { hidden_states: noise(&[1, 9, DIM], 501, 1.0) },
    };
    let cancel = CancelToken::new();
    let contexts = model.contexts(&[0.6], &cancel).unwrap();
    model.forward(&input, &contexts[0], Outputs::Target, &cancel).unwrap()
}

/// The largest difference, as a share of the largest number.
fn share(a: &Tensor, b: &Tensor) -> f64 {
    let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    f64::from(largest(&(a - b).unwrap()) / largest(b))
}

/// A base, the numbers that its file stands for, and how exact its products are as they are stored.
struct Base {
    name: &'static str,
    files: ModelFiles,
    values: Tensors,
    storage: Storage,
    share: f64,
}

/// Side path on and off, against the merged matrices.
fn check(folder: &Path, base: &Base) {
    let Base { name, files, values, storage, share: limit } = base;
    let path = save(folder, &format!("{name}-lora.safetensors"), &factors());
    let [on, off] = [1.0, 0.0].map(|strength| LoraSource { path: path.clone(), strength });
    let merged = f32_files(folder, &format!("{name}-merged"), &merged(values));
    let merged = output(&merged, Storage::Compute, None);
    let plain = output(files, *storage, None);
    assert!(bits(&output(files, *storage, Some(&off))) == bits(&plain), "{name}: off");
    let beside = output(files, *storage, Some(&on));
    let changed = share(&merged, &plain);
    assert!(changed > 10.0 * limit, "{name}: the changes are too small to be seen, {changed}");
    assert_close(name, &beside, &merged, Tolerance::Relative(*limit));
    if *storage == Storage::Compute {
        // Widened, the base is exact, and the side path is another order of the same sums.
        let beside = output(files, Storage::Plain(DType::F32), Some(&on));
        assert_close(name, &beside, &merged, Tolerance::Relative(2e-5));
    }
}

#[test]
fn gguf_bases_take_changes() {
    let folder = tempfile::tempdir().unwrap();
    // Activations are rounded to eight bits for products in blocks.
    for (name, kind, share) in [
        ("q8_0", GgmlDType::Q8_0, 0.02),
        ("q4_k", GgmlDType::Q4K, 0.02),
        ("q4_0", GgmlDType::Q4_0, 0.02),
    ] {
        let (mut file, mut values) = (Gguf::new(), Tensors::new());
        file.text("general.architecture", "qwen_image");
        for (tensor, value) in weights().into_iter().collect::<BTreeMap<_, _>>() {
            let blocks = value.rank() == 2 && value.dim(1).unwrap().is_multiple_of(256);
            let kind = if blocks { Kind::Blocks(kind) } else { Kind::Plain(DType::F32) };
            match kind {
                Kind::Blocks(kind) => file.quantized(&tensor, &value, kind),
                Kind::Plain(_) => file.plain(&tensor, &value),
            }
            values.insert(tensor, rounded(&value, kind));
        }
        let own = folder.path().join(name);
        fs_err::create_dir(&own).unwrap();
        let path = own.join("2511.gguf");
        file.write(&path);
        let base = Base { name, files: files(path), values, storage: Storage::Compute, share };
        check(folder.path(), &base);
    }
}

/// How the matrices of an fp8 file are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scaled {
    No,
    Older,
    Newer,
}

#[test]
fn fp8_bases_take_changes() {
    let folder = tempfile::tempdir().unwrap();
    let (e4m3, e5m2) = ((DType::F8E4M3, Dtype::F8_E4M3), Dtype::F8_E5M2);
    // Kept as bf16: exact without a scale, and with one rounded to nine bits.
    for (name, dtype, scaled, share) in [
        ("e4m3", e4m3.1, Scaled::No, 2e-5),
        ("e5m2", e5m2, Scaled::No, 2e-5),
        ("older", e4m3.1, Scaled::Older, 0.01),
        ("newer", e4m3.1, Scaled::Newer, 0.01),
        ("newer-e5m2", e5m2, Scaled::Newer, 0.01),
    ] {
        let (mut raw, mut values) = (Vec::new(), Tensors::new());
        for (tensor, value) in weights().into_iter().collect::<BTreeMap<_, _>>() {
            let prefixed = format!("model.diffusion_model.{tensor}");
            let Some(layer) = prefixed.strip_suffix(".weight").filter(|_| value.rank() == 2) else {
                let flat: Vec<f32> = value.flatten_all().unwrap().to_vec1().unwrap();
                let bytes = flat.iter().flat_map(|value| value.to_le_bytes()).collect();
                raw.push((prefixed, Dtype::F32, value.dims().to_vec(), bytes));
                values.insert(tensor, value);
                continue;
            };
            let scale = if scaled == Scaled::No { 1.0 } else { SCALE };
            let small = (&value / f64::from(scale)).unwrap();
            let (bytes, wide) = if dtype == Dtype::F8_E4M3 {
                let small = small.to_dtype(e4m3.0).unwrap();
                (float8_bytes(&small), small.to_dtype(DType::F32).unwrap())
            } else {
                e5m2_of(&small)
            };
            values.insert(tensor, wide.affine(f64::from(scale), 0.0).unwrap());
            raw.push((prefixed.clone(), dtype, value.dims().to_vec(), bytes));
            let one = SCALE.to_le_bytes().to_vec();
            match scaled {
                Scaled::No => {}
                Scaled::Older => {
                    raw.push((format!("{layer}.scale_weight"), Dtype::F32, vec![1], one));
                }
                Scaled::Newer => {
                    let format = if dtype == Dtype::F8_E4M3 { "e4m3fn" } else { "e5m2" };
                    let text = format!("{{\"format\": \"float8_{format}\"}}").into_bytes();
                    raw.push((format!("{layer}.weight_scale"), Dtype::F32, vec![], one));
                    raw.push((format!("{layer}.comfy_quant"), Dtype::U8, vec![text.len()], text));
                }
            }
        }
        let own = folder.path().join(name);
        fs_err::create_dir(&own).unwrap();
        let path = own.join("2511.safetensors");
        save_raw(&path, &raw);
        let base = Base { name, files: files(path), values, storage: Storage::Compute, share };
        check(folder.path(), &base);
    }
}

/// Numbers rounded to e5m2, the upper half of an f16: bytes and values.
pub(crate) fn e5m2_of(tensor: &Tensor) -> (Vec<u8>, Tensor) {
    let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
    let byte = |value: &f32| {
        let bits = half::f16::from_f32(*value).to_bits();
        (bits.saturating_add(0x7f + (bits >> 8 & 1)) >> 8) as u8
    };
    let bytes: Vec<u8> = values.iter().map(byte).collect();
    let wide: Vec<f32> =
        bytes.iter().map(|byte| half::f16::from_bits(u16::from(*byte) << 8).to_f32()).collect();
    (bytes, Tensor::from_vec(wide, tensor.dims(), &Device::Cpu).unwrap())
}

#[test]
fn plain_bases_in_every_storage_take_changes() {
    let folder = tempfile::tempdir().unwrap();
    let f32_base = f32_files(folder.path(), "f32", &weights());
    let half = |dtype| -> Tensors {
        let round = |(name, x): (String, Tensor)| (name, rounded(&x, Kind::Plain(dtype)));
        weights().into_iter().map(round).collect()
    };
    let stored = |name: &str, dtype| {
        let tensors = weights().into_iter().map(|(name, x)| (name, x.to_dtype(dtype).unwrap()));
        f32_files(folder.path(), name, &tensors.collect())
    };
    // Matrices in blocks, as they are made while loading.
    let blocks = |kind: GgmlDType| -> Tensors {
        let fits =
            |x: &Tensor| x.rank() == 2 && x.dim(1).unwrap().is_multiple_of(kind.block_size());
        let kind_of = |name: &str, x: &Tensor| match x.rank() {
            2 if !name.starts_with("transformer_blocks.") => Kind::Plain(DType::F32),
            2 if fits(x) => Kind::Blocks(kind),
            2 => Kind::Blocks(GgmlDType::Q8_0),
            _ => Kind::Plain(DType::F32),
        };
        weights()
            .into_iter()
            .map(|(name, x)| {
                let kind = kind_of(&name, &x);
                (name, rounded(&x, kind))
            })
            .collect()
    };
    let bases = [
        ("bf16 file", stored("bf16", DType::BF16), half(DType::BF16), Storage::Compute, 2e-5),
        ("f16 file", stored("f16", DType::F16), half(DType::F16), Storage::Compute, 2e-5),
        ("--dtype bf16", f32_base.clone(), weights(), Storage::Plain(DType::BF16), 0.02),
        ("--dtype f16", f32_base.clone(), weights(), Storage::Plain(DType::F16), 0.005),
        ("--dtype q8_0", f32_base.clone(), blocks(GgmlDType::Q8_0), Storage::Q8_0, 0.02),
        ("--dtype q4_k", f32_base, blocks(GgmlDType::Q4K), Storage::Q4K, 0.02),
    ];
    for (name, files, values, storage, share) in bases {
        check(folder.path(), &Base { name, files, values, storage, share });
    }
}
