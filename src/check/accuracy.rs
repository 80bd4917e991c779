//! How far one step of the transformer at the published dimensions is from single precision.

use candle_core::{DType, Device, Tensor};

use super::{
    Options,
    report::{Finding, Row},
    weights::{self, Dimensions, Matrices},
};
use crate::{
    diffusion::{
        Conditioning, Grid, Transformer,
        qwen_image::{ModelInput, Outputs},
    },
    error::Result,
    progress::CancelToken,
    weights::{ModelFiles, Precision, Storage},
};

/// A 512 × 512 picture with one reference.
const SIDE: usize = 32;
const TEXT: usize = 128;
/// How far noise moves in a step of twenty.
const STEP: f64 = 0.05;
/// Of the latents after the step, root of the mean square.
const STEP_LIMIT: f64 = 1e-2;
/// Of what the transformer predicts.
const PREDICTION_LIMIT: f64 = 5e-2;

pub(super) fn check(device: &Device, options: &Options) -> Vec<Row> {
    let kept = [
        ("bf16", Matrices::Bf16, Storage::Compute, false),
        ("Q8_0", Matrices::Bf16, Storage::Q8_0, false),
        ("Q4_K", Matrices::Bf16, Storage::Q4K, false),
        ("fp8 widened", Matrices::Float8, Storage::Compute, false),
        ("fp8", Matrices::Float8, Storage::Compute, true),
    ];
    let mut rows = Vec::new();
    for (name, matrices, storage, float8) in kept {
        let found = compared(device, options, (matrices, storage, float8));
        let of = |what: &str, finding| Row {
            part: "accuracy".into(),
            name: format!("{what} with {name}"),
            finding,
        };
        match found {
            Ok([prediction, step]) => {
                // Four bits are what was asked for, however far that is.
                let free = if storage == Storage::Q4K { f64::INFINITY } else { 1.0 };
                let limit = free * PREDICTION_LIMIT;
                rows.push(of("prediction", Finding::Checked { value: prediction, limit }));
                let limit = free * STEP_LIMIT;
                rows.push(of("latents after a step", Finding::Checked { value: step, limit }));
            }
            Err(error) => rows.push(of("prediction", Finding::failed(&error))),
        }
    }
    rows
}

/// The errors of the prediction and of the latents after a step, relative, where predictions are as
/// large as noise.
fn compared(
    device: &Device,
    options: &Options,
    (matrices, storage, float8_products): (Matrices, Storage, bool),
) -> Result<[f64; 2]> {
    let dims = Dimensions::new(options.shrink);
    let folder = options.scratch.join(format!("accuracy-{matrices:?}"));
    weights::write(&folder, device, dims, matrices, false)?;
    let side = SIDE.div_ceil(options.shrink);
    let random = |shape: [usize; 3]| Tensor::randn(0.0_f32, 1.0, &shape, device);
    let tokens = random([1, 2 * side * side, dims.latent])?;
    let hidden_states = random([1, TEXT.div_ceil(options.shrink), dims.conditioning])?;
    let conditioning = Conditioning { hidden_states };
    let predict = |compute: DType, storage: Storage| -> Result<Tensor> {
        let device = device.clone();
        let precision =
            Precision { device, compute, storage, float8_products, ..Precision::reference() };
        let files = ModelFiles::Folder(folder.clone());
        let model = Transformer::load(&files, &precision)?.repeated(dims.layers);
        let cancel = CancelToken::new();
        let contexts = model.contexts(&[0.5], &cancel)?;
        let Some(context) = contexts.first() else { return Ok(tokens.clone()) };
        let grid = Grid { height: side, width: side };
        let input =
            ModelInput { tokens: &tokens, grids: &[grid, grid], conditioning: &conditioning };
        let found = model.forward(&input, context, Outputs::Target, &cancel)?;
        Ok(found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?)
    };
    let exact = predict(DType::F32, Storage::Plain(DType::F32))?;
    let found = predict(DType::BF16, storage)?;
    let size = |x: &Tensor| -> Result<f64> { Ok(x.sqr()?.mean_all()?.to_scalar::<f64>()?.sqrt()) };
    let prediction = size(&(&found - &exact)?)? / size(&exact)?;
    let noise = tokens.narrow(1, 0, side * side)?.to_device(&Device::Cpu)?;
    let noise = noise.to_dtype(DType::F64)?.flatten_all()?;
    let after = (noise + (&exact * (STEP / size(&exact)?))?)?;
    Ok([prediction, STEP * prediction / size(&after)?])
}
