//! Models on the machine: found, described, called by name, checked.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use pentimento::{
    CancelToken, ModelInfo, ModelSource,
    library::{self, Place, Places, Verdict, Want, describe, resolve, walk},
    weights::Family,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::{
    cli,
    common::{
        Reference,
        parts::{self, all_f32},
    },
    engine,
};

const NAME: &str = "tiny-qwen-2511";

/// A folder with single files, a cache as Hugging Face lays it out, and ComfyUI's folders.
struct Machine {
    root: TempDir,
    places: Places,
}

impl Machine {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let reference = Reference::open(NAME);
        let named = root.path().join("named");
        fs_err::create_dir_all(&named).unwrap();
        parts::write_all(&reference, &named, all_f32);
        engine::copy(&reference.folder, &named.join("whole-2511"));
        let hub = root.path().join("hub");
        cached(&hub, "Qwen/Qwen-Image-Edit-2511", &reference.folder);
        let comfy = root.path().join("ComfyUI");
        for (folder, name, file) in [
            ("loras", "few.safetensors", "tests/data/lora/few.safetensors"),
            ("vae", "other_vae.safetensors", ""),
            ("unet", "sd-q4_0.gguf", "tests/data/peers/sd-q4_0.gguf"),
        ] {
            let target = comfy.join("models").join(folder).join(name);
            fs_err::create_dir_all(target.parent().unwrap()).unwrap();
            let file = match file {
                "" => reference.folder.join("vae/diffusion_pytorch_model.safetensors"),
                file => Path::new(env!("CARGO_MANIFEST_DIR")).join(file),
            };
            fs_err::copy(file, target).unwrap();
        }
        let places = Places { folders: vec![named], hubs: vec![hub], comfy: vec![comfy] };
        Self { root, places }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    #[track_caller]
    fn found(&self, name: &str, want: Want<'_>) -> PathBuf {
        resolve("--x", Path::new(name), want, &self.places).unwrap()
    }

    #[track_caller]
    fn lost(&self, name: &str, want: Want<'_>, words: &[&str]) {
        let error = resolve("--x", Path::new(name), want, &self.places).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A repository in Hugging Face's cache: blobs named by their hash, and links to them.
fn cached(hub: &Path, name: &str, source: &Path) {
    let repository = hub.join(format!("models--{}", name.replace('/', "--")));
    let snapshot = repository.join("snapshots/abc123");
    fs_err::create_dir_all(repository.join("refs")).unwrap();
    fs_err::write(repository.join("refs/main"), "abc123").unwrap();
    fs_err::create_dir_all(repository.join("snapshots/older")).unwrap();
    fs_err::create_dir_all(&snapshot).unwrap();
    engine::copy(source, &snapshot);
    fs_err::create_dir_all(repository.join("blobs")).unwrap();
    let mut folders = vec![snapshot];
    while let Some(folder) = folders.pop() {
        for entry in fs_err::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let bytes = fs_err::read(&path).unwrap();
            let blob = repository.join("blobs").join(sha256(&bytes));
            fs_err::write(&blob, bytes).unwrap();
            fs_err::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(&blob, &path).unwrap();
        }
    }
}

#[test]
fn what_there_is_is_found_and_described() {
    let machine = Machine::new();
    let entries: Vec<library::Entry> = walk(&machine.places).iter().map(describe).collect();
    let list: Vec<(Place, &str, Option<Family>, &str)> = entries
        .iter()
        .map(|it| (it.place, it.name.as_str(), it.family, it.model.as_str()))
        .collect();
    let expected = [
        (
            Place::Folder,
            "llm/Qwen2.5-VL-tiny-Q4_K_M.gguf",
            Some(Family::Language),
            "a language model, GGUF names",
        ),
        (
            Place::Folder,
            "llm/mmproj-F16.gguf",
            Some(Family::VisionTower),
            "a vision tower (mmproj), GGUF names",
        ),
        (
            Place::Folder,
            "unet/qwen-image-edit-2511.gguf",
            Some(Family::Transformer),
            "Qwen-Image transformer",
        ),
        (
            Place::Folder,
            "vae/qwen_image_vae.safetensors",
            Some(Family::Autoencoder),
            "Qwen-Image autoencoder, Wan names",
        ),
        (Place::Folder, "whole-2511", None, "Qwen-Image-Edit-2511 (whole)"),
        (Place::HuggingFace, "Qwen/Qwen-Image-Edit-2511", None, "Qwen-Image-Edit-2511 (whole)"),
        (Place::ComfyUi, "sd-q4_0.gguf", Some(Family::Transformer), "Qwen-Image transformer"),
        (
            Place::ComfyUi,
            "other_vae.safetensors",
            Some(Family::Autoencoder),
            "Qwen-Image autoencoder",
        ),
        (Place::ComfyUi, "few.safetensors", Some(Family::Lora), "LoRA"),
    ];
    assert_eq!(list, expected);
    assert!(entries.iter().all(|it| it.problem.is_none() && it.bytes > 0), "{entries:?}");
    let version = entries[2].version.as_ref().unwrap();
    assert_eq!(version.version, "Qwen-Image-Edit-2511");
    assert!(version.reason.contains("it is called"), "{}", version.reason);
    assert!(entries[6].types["Q4_0"] > 0);
    // ComfyUI's folder is known by what is in it, wherever it is; what is damaged says so.
    fs_err::write(machine.at("ComfyUI/models/unet/page.safetensors"), "<!DOCTYPE html>").unwrap();
    let places = Places { folders: vec![machine.at("ComfyUI")], ..Places::default() };
    let found = walk(&places);
    assert!(found.iter().all(|it| it.place == Place::ComfyUi), "{found:?}");
    let page = found.iter().find(|it| it.name == "page.safetensors").unwrap();
    assert!(describe(page).problem.unwrap().contains("HTML"));
}

#[test]
fn names_stand_for_what_fits() {
    let machine = Machine::new();
    let transformer = Want::File(&[Family::Transformer]);
    let unet = machine.at("named/unet/qwen-image-edit-2511.gguf");
    for name in ["qwen-image-edit-2511", "Qwen-Image-Edit-2511.gguf", "unet/qwen-image-edit-2511"] {
        assert_eq!(machine.found(name, transformer), unet, "{name}");
    }
    let snapshot = machine.at("hub/models--Qwen--Qwen-Image-Edit-2511/snapshots/abc123");
    for name in ["Qwen/Qwen-Image-Edit-2511", "qwen-image-edit-2511"] {
        assert_eq!(machine.found(name, Want::Folder), snapshot, "{name}");
    }
    assert_eq!(machine.found("whole-2511", Want::Folder), machine.at("named/whole-2511"));
    let lora = machine.at("ComfyUI/models/loras/few.safetensors");
    assert_eq!(machine.found("few", Want::File(&[Family::Lora])), lora);
    // A part in one file is a folder for those who want one, and a file for others.
    let hub = machine.at("hub");
    cached(&hub, "Qwen/Planner", &machine.at("named/whole-2511/text_encoder"));
    let planner = hub.join("models--Qwen--Planner/snapshots/abc123");
    for name in ["Qwen/Planner", "planner"] {
        assert_eq!(machine.found(name, Want::ModelOrPart), planner, "{name}");
    }
    let file =
        machine.found("Qwen/Planner/model.safetensors", Want::File(&[Family::VisionLanguage]));
    assert_eq!(file, planner.join("model.safetensors"));
    // What exists, or is plainly a path, is itself.
    let path = unet.display().to_string();
    assert_eq!(machine.found(&path, Want::Folder), unet);
    assert_eq!(machine.found("./few", Want::Any), Path::new("./few"));
}

#[test]
fn names_that_stand_for_nothing_or_several_say_so() {
    let machine = Machine::new();
    let places: Vec<String> =
        ["named", "hub", "ComfyUI"].map(|place| machine.at(place).display().to_string()).to_vec();
    let mut words: Vec<&str> = places.iter().map(String::as_str).collect();
    words.extend(["nothing-like-it", "a model folder", "--models-dir", "models list"]);
    machine.lost("nothing-like-it", Want::Folder, &words);
    let autoencoder = Want::File(&[Family::Autoencoder]);
    machine.lost("few", autoencoder, &["autoencoder", "few.safetensors is LoRA"]);
    let twin = machine.at("ComfyUI/models/vae/qwen_image_vae.safetensors");
    fs_err::copy(machine.at("named/vae/qwen_image_vae.safetensors"), &twin).unwrap();
    let twin = twin.display().to_string();
    machine.lost("qwen_image_vae", autoencoder, &["--x", &twin, "named/vae"]);
    // The whole name is one of them.
    let whole = machine.found("vae/qwen_image_vae.safetensors", autoencoder);
    assert_eq!(whole, machine.at("named/vae/qwen_image_vae.safetensors"));
}

fn verdict(path: &Path, deep: bool) -> Verdict {
    library::verify(path, deep, &CancelToken::new(), &()).unwrap()
}

#[test]
fn what_is_damaged_is_told() {
    let machine = Machine::new();
    let snapshot = machine.at("hub/models--Qwen--Qwen-Image-Edit-2511/snapshots/abc123");
    let whole = verdict(&snapshot, true);
    assert!(whole.is_good(), "{whole:?}");
    assert_eq!(whole.hashes_match, 3);
    for (name, contents, word) in [
        ("empty.safetensors", &b""[..], "an empty file"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "an HTML page"),
        ("page.gguf", b"<!DOCTYPE html><html>", "an HTML page"),
        ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ] {
        let path = machine.at(name);
        fs_err::write(&path, contents).unwrap();
        let found = verdict(&path, false);
        assert!(found.problems[0].contains(word), "{found:?}");
    }
    for name in ["unet/qwen-image-edit-2511.gguf", "vae/qwen_image_vae.safetensors"] {
        let mut bytes = fs_err::read(machine.at("named").join(name)).unwrap();
        bytes.truncate(bytes.len() - 4096);
        let path = machine.at("cut").join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, bytes).unwrap();
        let found = verdict(&path, false);
        assert!(found.problems[0].contains("truncated"), "{found:?}");
    }
    let cut = verdict(&machine.at("cut"), false);
    assert_eq!(cut.problems.len(), 2, "{cut:?}");
    let odd = machine.at("odd.safetensors");
    let tensor = Tensor::new(&[1_f32, f32::NAN, f32::INFINITY], &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("x", tensor)]), &odd).unwrap();
    assert!(verdict(&odd, false).is_good());
    let found = verdict(&odd, true);
    assert!(found.problems[0].contains("tensor x: 2 of 3 numbers"), "{found:?}");
    // A blob whose bytes are not those of its name.
    let link = snapshot.join("vae/diffusion_pytorch_model.safetensors");
    let blob = fs_err::read_link(&link).unwrap();
    let mut bytes = fs_err::read(&blob).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs_err::write(&blob, bytes).unwrap();
    let found = verdict(&snapshot, false);
    assert!(found.problems[0].contains("SHA-256") && found.hashes_match == 2, "{found:?}");
}

#[test]
fn the_program_lists_checks_and_takes_names() {
    let machine = Machine::new();
    let reference = Reference::open(NAME);
    let named = machine.at("named").display().to_string();
    let run = |arguments: &[&str], code: i32| {
        let output = cli::pentimento()
            .args(arguments)
            .env("HF_HUB_CACHE", machine.at("hub"))
            .env("PENTIMENTO_MODELS_DIR", machine.at("ComfyUI"))
            .output()
            .unwrap();
        let (stdout, stderr) = (cli::text(&output.stdout), cli::text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{stdout}\n{stderr}");
        (stdout, stderr)
    };
    let (list, _) = run(&["models", "list", "--models-dir", &named], 0);
    for word in ["Qwen/Qwen-Image-Edit-2511\n", "whole-2511", "few.safetensors", "Q4_0", "comfyui"]
    {
        assert!(list.contains(word), "no {word:?} in: {list}");
    }
    let (json, _) = run(&["models", "list", "--json"], 0);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["models"].as_array().unwrap().len(), 4);
    assert_eq!(json["models"][3]["place"], "huggingface");
    let (info, _) = run(&["models", "info", "sd-q4_0"], 0);
    assert!(info.contains("version: Qwen-Image-Edit-2509, since nothing tells"), "{info}");
    let (ok, _) = run(&["models", "verify", "--deep", "-q"], 0);
    assert_eq!(ok.matches("ok ").count(), 4, "{ok}");
    fs_err::write(machine.at("ComfyUI/models/unet/cut.gguf"), b"GGUF\x03").unwrap();
    let (bad, _) = run(&["models", "verify", "--json"], 3);
    let bad: serde_json::Value = serde_json::from_str(&bad).unwrap();
    assert_eq!(bad[0]["problems"].as_array().unwrap().len(), 1);

    let out = machine.at("out.png").display().to_string();
    let input = reference.folder.join("cases/edit_in.png").display().to_string();
    let mut edit = vec!["edit", "-i", &input, "-p", "make it night", "-o", &out, "-s", "7"];
    edit.extend(["--area", "64x64", "--steps", "2", "--force", "--strategy", "direct", "--model"]);
    let with = |model: &'static str, code| run(&[&edit[..], &[model]].concat(), code);
    with("Qwen/Qwen-Image-Edit-2511", 0);
    assert!(image::open(&out).is_ok());
    let (info, _) = run(&["info", "qwen-image-edit-2511"], 0);
    assert!(info.contains("Qwen-Image-Edit"), "{info}");
    run(&["info", "few", "--json"], 0);
    let (_, missing) = run(&["info", "nothing.png"], 3);
    assert!(missing.contains("nothing.png") && missing.contains("models list"), "{missing}");
    let planned = |planner: &'static str, code| {
        let planned = ["Qwen/Qwen-Image-Edit-2511", "--dry-run", "--planner", planner];
        run(&[&edit[..], &planned].concat(), code)
    };
    planned("qwen-image-edit-2511", 0);
    let (_, missing) = planned("Qwen/Nothing", 3);
    assert!(missing.contains("Qwen/Nothing") && missing.contains("models list"), "{missing}");
    let (doctor, _) = run(&["doctor", "--json", "--planner", "qwen-image-edit-2511"], 0);
    assert!(doctor.contains("\"shares_text_encoder\": false"), "{doctor}");
    let (_, missing) = with("Qwen/Nothing", 3);
    assert!(missing.contains("Qwen/Nothing") && missing.contains("models list"), "{missing}");
}

#[test]
fn a_revision_is_a_name_and_a_snapshot_is_called_as_its_repository() {
    let machine = Machine::new();
    let name = "Qwen/Qwen-Image-Edit-2511";
    let snapshot = machine.found(name, Want::Folder);
    let info = ModelInfo::read(&ModelSource::Folder(snapshot)).unwrap();
    assert_eq!(info.name, "Qwen-Image-Edit-2511");
    let main = machine.at("hub/models--Qwen--Qwen-Image-Edit-2511/refs/main");
    for elsewhere in ["/etc", "../../..", "..", ""] {
        fs_err::write(&main, elsewhere).unwrap();
        let found = walk(&machine.places);
        assert!(!found.is_empty());
        for candidate in found {
            assert!(candidate.path.starts_with(machine.root.path()), "{elsewhere}: {candidate:?}");
        }
    }
    cli::run(&["models", "list", "--models-dir", "/no/such"], 2);
}

#[test]
fn machines_without_models_say_where_they_looked() {
    let found = walk(&Places { folders: vec!["/nowhere".into()], ..Places::default() });
    assert!(found.is_empty());
}
