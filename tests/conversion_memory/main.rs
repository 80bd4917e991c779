//! A conversion holds a few chunks of tensors, never a whole one.
//!
//! In a binary of its own, so that the allocations it counts are its own.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    alloc::System,
    io::{Seek, SeekFrom, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use pentimento::{ConvertRequest, convert, weights::WriteType};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Rows and columns of the one large matrix: 256 MiB as bf16, 512 MiB as f32.
const SHAPE: [usize; 2] = [32_768, 4096];
/// What may be held at a time beyond what is held before: batches of chunks of 2^18 numbers on two
/// threads, as f32 and as bytes, some times over.
const HELD_BYTES_MAX: usize = 48 << 20;

fn held() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

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
    let (peak, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    for (name, kind) in [("t.gguf", WriteType::Q8_0), ("t.safetensors.sft", WriteType::Fp8)] {
        let before = held();
        peak.store(0, Ordering::Relaxed);
        done.store(false, Ordering::Relaxed);
        let watch = {
            let (peak, done) = (Arc::clone(&peak), Arc::clone(&done));
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    peak.fetch_max(held(), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_micros(200));
                }
            })
        };
        let request = ConvertRequest::new(&input, folder.path().join(name), kind);
        let outcome = pool.install(|| convert(&request, &())).unwrap();
        done.store(true, Ordering::Relaxed);
        watch.join().unwrap();
        let more = peak.load(Ordering::Relaxed).saturating_sub(before);
        assert!(outcome.files[0].bytes > 128 << 20);
        assert!(more > 1 << 20, "the watch saw nothing: {more}");
        assert!(more < HELD_BYTES_MAX, "{more} bytes held for {name}");
    }
}
