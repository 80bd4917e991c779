//! A conversion holds a few chunks of tensors, never a whole one.
//!
//! In a binary of its own, so that the allocations it counts are its own.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    io::{Seek, SeekFrom, Write},
    path::Path,
};

use peak_alloc::PeakAlloc;
use pentimento::{ConvertRequest, convert, weights::WriteType};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Rows and columns of the one large matrix: 256 MiB as bf16, 512 MiB as f32.
const SHAPE: [usize; 2] = [32_768, 4096];
/// What may be held at a time beyond what is held before: batches of chunks of 2^18 numbers on two
/// threads, as f32 and as bytes, some times over.
const HELD_BYTES_MAX: usize = 48 << 20;

/// A transformer by its names, whose matrix is a hole in the file.
fn sparse(path: &Path) {
    let bytes = SHAPE[0] * SHAPE[1] * 2;
    let header = format!(
        r#"{{"transformer_blocks.0.img_mod.1.weight":{{"dtype":"BF16","shape":{SHAPE:?},"data_offsets":[0,{bytes}]}},"txt_norm.weight":{{"dtype":"BF16","shape":[4],"data_offsets":[{bytes},{}]}}}}"#,
        bytes + 8
    );
    let mut file = fs_err::File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.seek(SeekFrom::Current(i64::try_from(bytes).unwrap())).unwrap();
    file.write_all(&[0; 8]).unwrap();
}

#[test]
fn memory_is_a_few_chunks() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("t.safetensors");
    sparse(&input);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for (name, kind) in [("t.gguf", WriteType::Q8_0), ("t.safetensors.sft", WriteType::Fp8)] {
        let request = ConvertRequest::new(&input, folder.path().join(name), kind);
        ALLOCATOR.reset_peak_usage();
        let before = ALLOCATOR.current_usage();
        let outcome = pool.install(|| convert(&request, &())).unwrap();
        let more = ALLOCATOR.peak_usage().saturating_sub(before);
        assert!(outcome.files[0].bytes > 128 << 20);
        assert!(more < HELD_BYTES_MAX, "{more} bytes held for {name}");
    }
}
