//! Weight files with random damage: never a panic, and never more memory than the file explains.
//!
//! In a binary of its own, so that the allocations it counts are its own.
#![expect(clippy::cast_possible_truncation, reason = "the numbers of a test are known to fit")]

use std::{alloc::System, path::Path};

use pentimento::{
    Error,
    weights::{Checkpoint, Precision, Weights},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Damaged copies of each file.
const COPIES: usize = 4000;
/// What opening may allocate beyond the file's size, in bytes: names, shapes, messages.
const OPEN_BYTES_MAX: usize = 1 << 20;
/// How much wider than its file a tensor may be: from two and a half bits to f32 in three copies.
const WIDER: usize = 64;

/// Numbers that look random: splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Flips bits, writes an extreme number, or cuts the end off; mostly in the header.
fn damage(bytes: &mut Vec<u8>, header: usize, random: &mut Random) {
    match random.below(4) {
        0 => bytes.truncate(random.below(bytes.len())),
        1 => {
            let extremes = [u64::MAX, 1 << 63, 1 << 40, 1 << 31, 255, 0];
            let number = extremes[random.below(extremes.len())].to_le_bytes();
            let at = random.below(header - number.len());
            bytes[at..at + number.len()].copy_from_slice(&number);
        }
        _ => {
            for _ in 0..=random.below(8) {
                let end = if random.below(4) == 0 { bytes.len() } else { header };
                let at = random.below(end);
                bytes[at] ^= 1 << random.below(8);
            }
        }
    }
}

/// Opens a file and reads every tensor; returns whether it opened.
fn read(path: &Path, bytes: usize) -> bool {
    let region = Region::new(ALLOCATOR);
    let opened = Checkpoint::open_file(path);
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= bytes + OPEN_BYTES_MAX, "{allocated} bytes to open {bytes}");
    let checkpoint = match opened {
        Ok(checkpoint) => checkpoint,
        Err(Error::Model(_)) => return false,
        Err(other) => unreachable!("{other}"),
    };
    assert!(!checkpoint.fingerprint().is_empty());
    let tensors: Vec<(String, Vec<usize>)> =
        checkpoint.tensors().map(|(name, entry)| (name.to_owned(), entry.shape.clone())).collect();
    let weights = Weights::new(checkpoint, Precision::reference());
    let region = Region::new(ALLOCATOR);
    for (name, shape) in &tensors {
        // A type that is not read is an error; a panic is not.
        drop(weights.tensor(name, shape));
        if let &[rows, width] = shape.as_slice() {
            drop(weights.linear_weight(name, [rows, width]));
        }
    }
    let allocated = region.change().bytes_allocated;
    assert!(allocated <= WIDER * bytes + OPEN_BYTES_MAX, "{allocated} bytes to read {bytes}");
    true
}

#[test]
fn damaged_files_are_errors_or_numbers() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/gguf");
    let folder = tempfile::tempdir().unwrap();
    for (name, header) in [("types.gguf", 1900), ("types.safetensors", 1300)] {
        let whole = fs_err::read(data.join(name)).unwrap();
        let path = folder.path().join(name);
        let mut random = Random(7);
        let mut opened = 0;
        for _ in 0..COPIES {
            let mut bytes = whole.clone();
            damage(&mut bytes, header, &mut random);
            fs_err::write(&path, &bytes).unwrap();
            opened += usize::from(read(&path, bytes.len()));
        }
        // Both ends are reached: files that are refused, and damage that is read.
        assert!(opened > 0 && opened < COPIES, "{name}: {opened} of {COPIES} opened");
    }
}
