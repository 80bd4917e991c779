//! Looks for the vision tower (mmproj) beside a language model in GGUF.

use std::path::{Path, PathBuf};

use super::stem;
use crate::error::{ModelError, Result};

/// Most files of a folder that are looked at.
const FILES_MAX: usize = 10_000;
/// Starts of the names of quantizations, as they stand last in a file's name.
const QUANTIZATIONS: [&str; 8] = ["q", "iq", "tq", "mxfp", "nvfp", "bf16", "f16", "f32"];
/// What makers of quantizations put before it.
const MAKERS: [&str; 2] = ["ud", "i1"];

/// The vision tower of `llm` in the same folder: the one whose name also has the language model's,
/// or else the only one; among several the one in F16, or else in BF16.
///
/// # Errors
/// [`ModelError::Missing`] when there is none, or several without a reason to choose.
pub(super) fn find(llm: &Path) -> Result<PathBuf> {
    let folder = match llm.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut towers = Vec::new();
    for entry in fs_err::read_dir(folder)?.take(FILES_MAX) {
        let path = entry?.path();
        let is_gguf = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
        if is_gguf && path != llm && stem(&path).to_lowercase().contains("mmproj") {
            towers.push(path);
        }
    }
    towers.sort();
    let names: Vec<String> = towers.iter().map(|path| stem(path)).collect();
    let Some(index) = choose(&stem(llm), &names) else {
        let what = match towers.len() {
            0 => "the language model's vision tower".to_owned(),
            _ => format!("several vision towers to choose from: {}", names.join(", ")),
        };
        return Err(ModelError::Missing {
            path: folder.join("mmproj-F16.gguf").display().to_string(),
            what,
            hint: format!("pass --mmproj FILE with the vision tower of {}", llm.display()),
        }
        .into());
    };
    Ok(towers.swap_remove(index))
}

/// Which of `towers` belongs to `llm`; all are names without extension.
fn choose(llm: &str, towers: &[String]) -> Option<usize> {
    let model = without_quantization(&llm.to_lowercase());
    let all: Vec<(usize, String)> =
        towers.iter().map(|name| name.to_lowercase()).enumerate().collect();
    let named: Vec<_> = all.iter().filter(|(_, name)| name.contains(&model)).collect();
    let candidates = if named.is_empty() { all.iter().collect() } else { named };
    if let [(only, _)] = candidates.as_slice() {
        return Some(*only);
    }
    let ending = |end: &str| {
        let mut ends = candidates.iter().filter(|(_, name)| {
            name.strip_suffix(end)
                .is_some_and(|rest| !rest.ends_with(|c: char| c.is_alphanumeric()))
        });
        ends.next().filter(|_| ends.next().is_none()).map(|(index, _)| *index)
    };
    ending("f16").or_else(|| ending("bf16"))
}

/// `qwen2.5-vl-7b-instruct-q4_k_m` → `qwen2.5-vl-7b-instruct`.
fn without_quantization(name: &str) -> String {
    let mut name = name;
    while let Some((rest, last)) = name.rsplit_once(['-', '.']) {
        let digit = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
        let is_quantization = QUANTIZATIONS.iter().any(|start| {
            let tail = last.strip_prefix(start);
            tail.is_some_and(|tail| tail.is_empty() && start.len() > 2 || digit(tail))
        });
        if !is_quantization && !MAKERS.contains(&last) {
            break;
        }
        name = rest;
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_tower_is_chosen() {
        let llm = "Qwen2.5-VL-7B-Instruct-UD-Q4_K_M";
        for (towers, chosen) in [
            (&["mmproj-F16"] as &[&str], Some(0)),
            (&["mmproj-BF16", "mmproj-F16", "mmproj-F32"], Some(1)),
            (&["mmproj-BF16", "mmproj-F32"], Some(0)),
            (&["Qwen2.5-VL-7B-Instruct.mmproj-Q8_0", "mmproj-other"], Some(0)),
            (&["Qwen2.5-VL-3B-Instruct.mmproj-f16", "Qwen2.5-VL-7B-Instruct.mmproj-f16"], Some(1)),
            (&["mmproj-one", "mmproj-two"], None),
            (&["mmproj-one-F16", "mmproj-two-F16"], None),
            (&[], None),
        ] {
            let towers: Vec<String> = towers.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(choose(llm, &towers), chosen, "{towers:?}");
        }
        assert_eq!(without_quantization("a-3b.iq4_xs"), "a-3b");
        assert_eq!(without_quantization("a.f16"), "a");
        assert_eq!(without_quantization("a-7b.i1-q4_k_m"), "a-7b");
        assert_eq!(without_quantization("a-7b-mxfp4"), "a-7b");
        assert_eq!(without_quantization("qwen"), "qwen");
    }
}
