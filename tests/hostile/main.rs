//! Whatever is read from outside, damaged at random: never a panic, never more memory than the
//! input explains, and errors of the right kind that name the file.
//!
//! In a binary of its own, so that the allocations it counts are its own. There is no guidance by
//! coverage; instead every reader has sound inputs to begin with, and damage that knows the words
//! and numbers of its format. `PENTIMENTO_FUZZ_SECONDS=600 PENTIMENTO_FUZZ_SEED=8 cargo test
//! --release --test hostile` goes on for that long, shared among the readers
//! (`PENTIMENTO_FUZZ_ONLY=gguf` for one); an input that fails is kept, and belongs into `corpus/`.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]
#![expect(clippy::cast_possible_truncation, reason = "the numbers of a test are known to fit")]

mod damage;
#[path = "../suite/common/gguf_writer.rs"]
#[expect(dead_code, reason = "the suite needs more of it")]
mod gguf_writer;
mod readers;
mod seeds;
mod specials;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use peak_alloc::PeakAlloc;

use self::{
    damage::{Random, damage},
    readers::{Place, READERS, Reader},
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Damaged inputs of each reader where no time is given.
const CASES: usize = 250;
/// Longest input in bytes.
const INPUT_BYTES_MAX: usize = 1 << 17;
/// No input of that size takes so long on the slowest machine.
const SLOW: Duration = Duration::from_secs(30);

/// Only one test runs at a time, since allocations are counted for the whole process.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most bytes that `work` holds at once.
pub(crate) fn allocated<T>(work: impl FnOnce() -> T) -> (T, usize) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = work();
    (result, ALLOCATOR.peak_usage().saturating_sub(before))
}

#[expect(clippy::disallowed_methods, reason = "a test's own switches")]
fn setting<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

/// Reads one input and holds the reader to its promises; returns whether it was accepted.
fn check(reader: &Reader, place: &Place, input: &[u8], what: &str) -> bool {
    let begin = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let (accepted, bytes) = allocated(|| (reader.read)(place, input));
        let limit = (reader.bytes_max)(input.len());
        assert!(bytes <= limit, "{bytes} bytes allocated for {}, at most {limit}", input.len());
        assert!(begin.elapsed() < SLOW, "{:?} for {} bytes", begin.elapsed(), input.len());
        accepted
    }));
    outcome.unwrap_or_else(|panic| {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-input", reader.name));
        fs_err::write(&kept, input).unwrap();
        panic_about(reader, what, &kept, &*panic)
    })
}

fn panic_about(reader: &Reader, what: &str, kept: &Path, panic: &dyn std::any::Any) -> ! {
    let said = panic.downcast_ref::<String>().map(String::as_str);
    let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("(no words)");
    panic!("{}, {what}: {said}\nthe input is kept in {}", reader.name, kept.display());
}

/// The inputs that once failed, and some that were hard to come by.
fn corpus(reader: &Reader) -> Vec<Vec<u8>> {
    let folder =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/hostile/corpus").join(reader.name);
    if !folder.is_dir() {
        return Vec::new();
    }
    let mut files: Vec<_> =
        fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| fs_err::read(file).unwrap()).collect()
}

#[test]
#[expect(clippy::print_stdout, reason = "the seed and what was reached, where a test may print")]
fn damaged_inputs_are_errors_or_values() {
    let _alone = alone();
    let seed: u64 = setting("PENTIMENTO_FUZZ_SEED").unwrap_or(7);
    let seconds: Option<u64> = setting("PENTIMENTO_FUZZ_SECONDS");
    let only: Option<String> = setting("PENTIMENTO_FUZZ_ONLY");
    let readers =
        READERS.iter().filter(|reader| only.as_ref().is_none_or(|only| only == reader.name));
    let count = readers.clone().count() as u32;
    assert!(count > 0, "no reader {only:?}");
    println!("PENTIMENTO_FUZZ_SEED={seed}");
    for (index, reader) in readers.enumerate() {
        let place = Place::new();
        let sound = (reader.seeds)();
        for (number, input) in sound.iter().enumerate() {
            let accepted = check(reader, &place, input, &format!("sound input {number}"));
            assert!(accepted, "{}: sound input {number} is refused", reader.name);
        }
        let mut inputs = corpus(reader);
        for (number, input) in inputs.iter().enumerate() {
            check(reader, &place, input, &format!("input {number} of the corpus"));
        }
        inputs.extend(sound);
        let mut random = Random::new(seed.wrapping_add(index as u64));
        let begin = Instant::now();
        let share = seconds.map(|all| Duration::from_secs(all) / count);
        let (mut case, mut accepted) = (0, 0);
        while share.map_or(case < CASES, |share| begin.elapsed() < share) {
            let mut input = inputs[random.below(inputs.len())].clone();
            damage(&mut input, &inputs, reader.words, &mut random);
            input.truncate(INPUT_BYTES_MAX);
            accepted +=
                usize::from(check(reader, &place, &input, &format!("seed {seed}, case {case}")));
            case += 1;
        }
        println!("{:<16} {accepted:>7} of {case:>7} accepted", reader.name);
        // Both ends are reached: inputs that are refused, and damage that is read.
        let both = accepted > 0 && accepted < case;
        assert!(both || reader.one_sided, "{}: {accepted} of {case} accepted", reader.name);
    }
}
