//! Tests of diffusion, by part; the numbers come from `tests/data/make/diffusion.py` and from the
//! reference checkpoints.

mod autoencoder;
mod damage;
mod denoise;
mod noise;
mod packing;
mod schedule;
mod transformer;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use pentimento::{
    diffusion::{Conditioning, Grid},
    weights::ModelFiles,
};

use crate::common::Reference;

type Tensors = std::collections::HashMap<String, Tensor>;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/diffusion").join(name)
}

fn tensors(name: &str) -> Tensors {
    candle_core::safetensors::load(fixture(name), &Device::Cpu).unwrap()
}

fn files(reference: &Reference) -> ModelFiles {
    ModelFiles::Folder(reference.folder.clone())
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

#[track_caller]
fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    f64::from(difference.to_scalar::<f32>().unwrap())
}

pub(crate) fn grids(reference: &Reference) -> Vec<Grid> {
    let shapes: Vec<[usize; 3]> =
        serde_json::from_value(reference.facts["dit.img_shapes"].clone()).unwrap();
    shapes.iter().map(|&[_, height, width]| Grid { height, width }).collect()
}

pub(crate) fn conditioning(reference: &Reference) -> Conditioning {
    Conditioning { hidden_states: reference.tensor("dit.encoder_hidden_states").clone() }
}

/// What goes into a recorded run of a pipeline, and the run's own facts.
struct Run {
    name: String,
    reference: Reference,
    tag: &'static str,
    inputs: Tensors,
}

impl Run {
    fn open(checkpoint: &str, tag: &'static str) -> Self {
        let name = format!("{checkpoint}-{tag}");
        let inputs = tensors(&format!("loop-{name}.safetensors"));
        Self { name, reference: Reference::open(checkpoint), tag, inputs }
    }

    fn fact(&self, field: &str) -> &serde_json::Value {
        &self.reference.facts[self.tag][field]
    }

    fn number(&self, field: &str) -> u64 {
        self.fact(field).as_u64().unwrap()
    }

    fn grids(&self) -> Vec<Grid> {
        let rows = self.inputs["grids"].to_dtype(DType::U32).unwrap().to_vec2::<u32>().unwrap();
        rows.iter()
            .map(|row| Grid {
                height: usize::try_from(row[0]).unwrap(),
                width: usize::try_from(row[1]).unwrap(),
            })
            .collect()
    }

    fn conditioning(&self, name: &str) -> Option<Conditioning> {
        Some(Conditioning { hidden_states: self.inputs.get(name)?.clone() })
    }
}
