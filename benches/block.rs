//! One forward pass of the transformer (two layers, hidden 3072, 24 heads of 128, 512 × 512 with one
//! reference), loading it, and the autoencoder there and back, at the published dimensions.
//!
//! Needs the folder that `benches/make_published.py checkpoints/published` writes; without it there
//! is nothing to measure. With `make_published.py checkpoints/published-1 --layers 1` beside it a
//! transformer of one block is measured as well.
#![expect(clippy::unwrap_used, reason = "a benchmark may panic")]
#![expect(clippy::integer_division, reason = "half of the tokens are the reference's")]

use std::{path::Path, time::Duration};

use candle_core::DType;
use criterion::{Criterion, criterion_group, criterion_main};
use pentimento::{
    diffusion::{Transformer, vae::Autoencoder},
    weights::{AttentionType, ModelFiles, Precision, Storage},
};

mod published;

fn models(c: &mut Criterion) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("checkpoints/published");
    if !folder.is_dir() {
        return;
    }
    let mut group = c.benchmark_group("published");
    group.sample_size(10).measurement_time(Duration::from_secs(20));
    let kept = [
        ("q8_0", Storage::Q8_0),
        ("bf16", Storage::Plain(DType::BF16)),
        ("f32", Storage::Plain(DType::F32)),
    ];
    for (name, storage) in kept {
        let attention = AttentionType::LikeWeights;
        let precision = Precision { storage, attention, ..Precision::reference() };
        let forward = published::transformer(&folder, precision);
        group.bench_function(format!("transformer {name}"), |b| b.iter(&forward));
    }
    // The difference to two blocks is what one block takes.
    let one_block = folder.with_file_name("published-1");
    if one_block.is_dir() {
        let attention = AttentionType::LikeWeights;
        let precision = Precision { storage: Storage::Q8_0, attention, ..Precision::reference() };
        let forward = published::transformer(&one_block, precision);
        group.bench_function("transformer of one block q8_0", |b| b.iter(&forward));
    }
    let files = ModelFiles::Folder(folder.clone());
    for (name, storage) in kept {
        let precision = Precision { storage, ..Precision::reference() };
        group.bench_function(format!("loading the transformer {name}"), |b| {
            b.iter(|| Transformer::load(&files, &precision).unwrap());
        });
    }
    group.bench_function("loading the autoencoder", |b| {
        b.iter(|| Autoencoder::load(&files, &Precision::reference()).unwrap());
    });
    let (encode, decode) = (published::encode(&folder), published::decode(&folder));
    group.bench_function("autoencoder encode f32", |b| b.iter(&encode));
    group.bench_function("autoencoder decode f32", |b| b.iter(&decode));
    group.finish();
}

criterion_group!(benches, models);
criterion_main!(benches);
