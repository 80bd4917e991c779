//! Reading weight files into memory, against what the machine gives at most.
//!
//! `loading FILE [TYPE]...` maps a safetensors or GGUF file and prints gigabytes of the file a second,
//! for each repeat: its mapped bytes read, its mapped bytes copied into fresh memory with large pages,
//! and each of its matrices laid out for products as it is stored and as each TYPE (f32, bf16, f16,
//! q8_0, q4_k). One repeat comes first that is not printed, so that the file is in the system's cache.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark may panic")]
#![expect(clippy::print_stdout, reason = "numbers for a report")]
#![expect(clippy::cast_precision_loss, reason = "numbers for a report")]

use std::{hint::black_box, path::Path, time::Instant};

use candle_core::DType;
use memmap2::{Advice, Mmap, MmapMut};
use pentimento::{
    layers::Linear,
    weights::{Checkpoint, Precision, Storage, Weights},
};
use rayon::prelude::*;

const REPEATS: usize = 5;
/// What a thread reads or copies at a time.
const PIECE: usize = 16 << 20;

fn main() {
    // `cargo bench` without arguments only builds it.
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let Some(file) = arguments.next() else { return };
    let path = Path::new(&file);
    let bytes = fs_err::metadata(path).unwrap().len() as f64;
    let types: Vec<String> = arguments.collect();
    for repeat in 0..=REPEATS {
        let mut line = vec![("read".to_owned(), read(path)), ("copied".to_owned(), copied(path))];
        line.push(("as stored".to_owned(), loaded(path, Storage::Compute)));
        line.extend(types.iter().map(|name| (name.clone(), loaded(path, storage(name)))));
        if repeat > 0 {
            let rate =
                |(name, seconds): &(String, f64)| format!("{name} {:.2}", bytes / seconds / 1e9);
            println!("{}", line.iter().map(rate).collect::<Vec<_>>().join(", "));
        }
    }
}

fn storage(name: &str) -> Storage {
    match name {
        "f32" => Storage::Plain(DType::F32),
        "bf16" => Storage::Plain(DType::BF16),
        "f16" => Storage::Plain(DType::F16),
        "q8_0" => Storage::Q8_0,
        "q4_k" => Storage::Q4K,
        other => panic!("{other}: expected f32, bf16, f16, q8_0 or q4_k"),
    }
}

fn map(path: &Path) -> Mmap {
    let file = fs_err::File::open(path).unwrap();
    #[expect(unsafe_code, reason = "mapping a file has no safe form")]
    // SAFETY: nobody writes to the file while it is measured.
    let map = unsafe { Mmap::map(file.file()).unwrap() };
    map
}

/// Seconds that it takes to read a file's mapped bytes.
fn read(path: &Path) -> f64 {
    let start = Instant::now();
    map(path).par_chunks(PIECE).for_each(|bytes| {
        let mut sums = [0_u64; 16];
        for bytes in bytes.as_chunks::<8>().0.as_chunks::<16>().0 {
            let numbers = bytes.map(u64::from_le_bytes);
            sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum = sum.wrapping_add(x));
        }
        black_box(sums);
    });
    start.elapsed().as_secs_f64()
}

/// Seconds that it takes to copy a file's mapped bytes into memory that was not used before.
fn copied(path: &Path) -> f64 {
    let start = Instant::now();
    let map = map(path);
    let mut fresh = MmapMut::map_anon(map.len()).unwrap();
    #[cfg(target_os = "linux")]
    fresh.advise(Advice::HugePage).unwrap();
    let pairs = fresh.par_chunks_mut(PIECE).zip(map.par_chunks(PIECE));
    pairs.for_each(|(to, from)| to.copy_from_slice(from));
    let seconds = start.elapsed().as_secs_f64();
    black_box(fresh);
    seconds
}

/// Seconds that it takes to read all matrices of a file, one after the other as a model does.
fn loaded(path: &Path, storage: Storage) -> f64 {
    let start = Instant::now();
    let precision = Precision { storage, ..Precision::reference() };
    let weights = Weights::new(Checkpoint::open_file(path).unwrap(), precision);
    let load = |(name, entry): (&str, &pentimento::weights::TensorEntry)| {
        let [out, width] = *entry.shape.as_slice() else { return None };
        let place = weights.pp(name.strip_suffix(".weight")?);
        Some(Linear::load_without_bias(&place, width, out).unwrap())
    };
    let matrices: Vec<Linear> = weights.checkpoint().tensors().filter_map(load).collect();
    let seconds = start.elapsed().as_secs_f64();
    black_box(matrices);
    seconds
}
