//! House rules that no lint can check. Each failure names the file and the rule.

use std::path::{Path, PathBuf};

/// Who may use whom: a room may name only the rooms listed after it.
const MAY_USE: &[(&str, &[&str])] = &[
    ("pixels", &[]),
    ("memory", &[]),
    ("ops", &["memory"]),
    ("weights", &["memory", "ops"]),
    ("layers", &["memory", "ops", "weights"]),
    ("vlm", &["pixels", "memory", "ops", "layers", "weights"]),
    ("diffusion", &["memory", "ops", "layers", "weights"]),
    ("plan", &["pixels", "vlm"]),
    ("check", &["diffusion", "memory", "ops", "vlm", "weights"]),
    ("editor", &["diffusion", "memory", "pixels", "plan", "vlm", "weights"]),
    ("library", &["editor", "weights"]),
    ("eval", &["editor", "pixels", "plan", "vlm"]),
    ("train", &["editor", "eval", "memory", "plan", "vlm", "weights"]),
    ("serve", &["editor"]),
];
const LINES_MAX: usize = 600;
/// Where `unsafe` may stand: the map of files, the inner loops of the CPU's operations, the start of
/// CUDA kernels and of products in cuBLASLt, which get bare addresses, and calls of a GPU's driver and of
/// the C library's allocator.
const UNSAFE_ALLOWED: &[&str] = &[
    "src/weights/mmap.rs",
    "src/ops/simd/",
    "src/ops/cuda/ffi.rs",
    "src/ops/cuda/maps.rs",
    "src/ops/cuda/queue.rs",
    "src/ops/cuda/recorded.rs",
    "src/ops/cuda/blas_lt.rs",
    "src/memory/cuda.rs",
    "src/memory/heap.rs",
];

#[test]
fn source_is_tidy() {
    let mut faults = Vec::new();
    for file in rust_files(Path::new("src")) {
        let text = fs_err::read_to_string(&file).unwrap();
        let name = file.display().to_string();
        if !text.starts_with("//!") {
            faults.push(format!("{name}: starts without a `//!` sentence"));
        }
        if text.lines().count() > LINES_MAX {
            faults.push(format!("{name}: more than {LINES_MAX} lines"));
        }
        let code: String = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .flat_map(|line| [line, "\n"])
            .collect();
        if code.contains("unsafe ") && !UNSAFE_ALLOWED.iter().any(|place| name.starts_with(place)) {
            faults.push(format!("{name}: `unsafe` outside {UNSAFE_ALLOWED:?}"));
        }
        let Some((room, may_use)) = MAY_USE.iter().find(|(room, _)| in_room(&file, room)) else {
            continue;
        };
        for (other, _) in MAY_USE.iter().filter(|(other, _)| other != room && names(&code, other)) {
            if !may_use.contains(other) {
                faults.push(format!("{name}: `{room}` may not use `{other}`"));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

#[test]
fn the_check_sees_what_it_should() {
    assert!(names("use crate::{ops, vlm::Model};", "vlm"));
    assert!(names("use crate::vlm::Model;", "vlm"));
    assert!(names("let x = crate::vlm::load();", "vlm"));
    assert!(!names("use crate::{ops::vlm, weights};", "vlm"));
    assert!(!names("use crate::vlm_tools;", "vlm"));
}

fn in_room(file: &Path, room: &str) -> bool {
    file.starts_with(Path::new("src").join(room))
        || file == Path::new("src").join(format!("{room}.rs"))
}

/// Whether `room` follows a `crate::`, alone or first in an item of a `crate::{..}` list.
fn names(code: &str, room: &str) -> bool {
    code.split("crate::").skip(1).any(|after| match after.strip_prefix('{') {
        Some(list) => top_level_items(list).any(|item| starts_with_word(item, room)),
        None => starts_with_word(after, room),
    })
}

fn top_level_items(list: &str) -> impl Iterator<Item = &str> {
    let mut depth = 1;
    let end = list.find(|c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0
    });
    let mut depth = 0;
    list[..end.unwrap_or(list.len())].split(move |c| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        depth == 0 && c == ','
    })
}

fn starts_with_word(text: &str, word: &str) -> bool {
    let rest = text.trim_start().strip_prefix(word);
    rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs_err::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}
