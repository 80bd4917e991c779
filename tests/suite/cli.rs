//! The program as a person types it.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::{
    common::Reference,
    engine::{assert_same_picture, expected, tags},
};

fn pentimento() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pentimento"));
    command.env_remove("PENTIMENTO_MODEL").env_remove("RUST_LOG");
    command
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Runs the program and checks its exit code.
#[track_caller]
pub(crate) fn run(arguments: &[&str], code: i32) -> Output {
    let output = pentimento().args(arguments).stdin(Stdio::null()).output().unwrap();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{stdout}\n{stderr}");
    output
}

#[track_caller]
fn stderr_of(arguments: &[&str], code: i32, words: &[&str]) {
    let stderr = text(&run(arguments, code).stderr);
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in: {stderr}");
    }
}

fn sample() -> PathBuf {
    Reference::open("tiny-qwen-edit").folder.join("cases/edit_in.png")
}

fn model() -> String {
    Reference::open("tiny-qwen-edit").folder.display().to_string()
}

/// A quick edit of the sample with a reference checkpoint, with more arguments at the end.
fn quick<'a>(input: &'a str, output: &'a str, model: &'a str) -> Vec<&'a str> {
    vec![
        "edit",
        "-i",
        input,
        "-p",
        "make it night",
        "-o",
        output,
        "--model",
        model,
        "--area",
        "64x64",
        "--steps",
        "2",
        "-s",
        "7",
    ]
}

#[test]
fn edits_from_file_to_file_are_the_references() {
    let folder = tempfile::tempdir().unwrap();
    for reference in Reference::all() {
        for tag in tags(&reference) {
            let facts = &reference.facts[tag];
            let out = folder.path().join(format!("{}-{tag}.png", reference.name()));
            let cases = reference.folder.join("cases");
            let mut command = pentimento();
            command.args(["edit", "--quiet", "--device", "cpu"]);
            command.arg("-i").arg(cases.join("edit_in.png"));
            if tag == "pipe.two" {
                command.arg("-i").arg(cases.join("edit_in2.png"));
            }
            command.arg("-o").arg(&out).arg("--model").arg(&reference.folder);
            command.args(["-p", facts["prompt"].as_str().unwrap()]);
            if let Some(negative) = facts["negative_prompt"].as_str() {
                command.args(["-n", negative]);
            }
            for (flag, field) in [
                ("--steps", "steps"),
                ("--seed", "seed"),
                ("-W", "width"),
                ("-H", "height"),
                ("--cfg-scale", "true_cfg_scale"),
            ] {
                command.args([flag, &facts[field].to_string()]);
            }
            command.args(["--area", &reference.facts["target_area"].to_string()]);
            if reference.facts["family"] != "edit" {
                command.args(["--vl-area", "112x112"]);
            }
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", text(&output.stderr));
            assert_eq!(text(&output.stdout).trim(), out.display().to_string());
            let picture = image::open(&out).unwrap().into_rgb8();
            assert_same_picture(
                &format!("{} {tag}", reference.name()),
                &picture,
                &expected(&reference, tag),
            );
        }
    }
}

#[test]
fn the_shipped_pack_edits_without_a_model_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.png");
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples/street.png");
    let output = run(
        &[
            "edit",
            "-i",
            sample.to_str().unwrap(),
            "-p",
            "paint the house blue",
            "-o",
            out.to_str().unwrap(),
            "-s",
            "1",
        ],
        0,
    );
    assert!(text(&output.stderr).contains("seed 1"), "{}", text(&output.stderr));
    assert_eq!(image::image_dimensions(&out).unwrap(), image::image_dimensions(&sample).unwrap());
    let digest = |path: &Path| fs_err::read(path).unwrap();
    let first = image::load_from_memory(&digest(&out)).unwrap();
    run(
        &[
            "edit",
            "-i",
            sample.to_str().unwrap(),
            "-p",
            "paint the house blue",
            "-o",
            out.to_str().unwrap(),
            "-s",
            "1",
            "--force",
            "--threads",
            "1",
        ],
        0,
    );
    assert_eq!(image::load_from_memory(&digest(&out)).unwrap(), first);
}

#[test]
fn json_tells_what_was_done() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let out = folder.path().join("out.png").display().to_string();
    let mut arguments = quick(&sample, &out, &model);
    arguments.push("--json");
    let value: serde_json::Value = serde_json::from_slice(&run(&arguments, 0).stdout).unwrap();
    assert_eq!(value["version"], 1);
    assert_eq!(value["output"], out.as_str());
    assert_eq!(value["seed"], 7);
    assert_eq!((&value["width"], &value["height"]), (&96.into(), &64.into()));
    assert_eq!(value["stages"][0]["stage"], "load");
    assert!(value["stages"][3]["elapsed_ms"].as_f64().unwrap() > 0.0);
    // An error is JSON too.
    let output = run(&arguments, 1);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["error"]["kind"], "picture");
    assert!(value["error"]["hint"].as_str().unwrap().contains("--force"));
}

#[test]
fn a_random_seed_is_reported_and_repeats_the_picture() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let (first, second) = (folder.path().join("1.png"), folder.path().join("2.png"));
    let first_name = first.display().to_string();
    let mut arguments = quick(&sample, &first_name, &model);
    arguments.extend(["--json"]);
    let position = arguments.iter().position(|argument| *argument == "7").unwrap();
    arguments[position] = "-1";
    let value: serde_json::Value = serde_json::from_slice(&run(&arguments, 0).stdout).unwrap();
    let seed = value["seed"].to_string();
    let second_name = second.display().to_string();
    let mut arguments = quick(&sample, &second_name, &model);
    arguments[position] = &seed;
    run(&arguments, 0);
    assert_eq!(image::open(first).unwrap(), image::open(second).unwrap());
}

#[test]
fn pictures_go_through_pipes() {
    let folder = tempfile::tempdir().unwrap();
    let model = model();
    let mut arguments = quick("-", "-", &model);
    arguments.push("-q");
    let output = pentimento()
        .args(&arguments)
        .stdin(fs_err::File::open(sample()).unwrap().into_parts().0)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    assert_eq!(image::load_from_memory(&output.stdout).unwrap().width(), 96);
    drop(folder);
}

#[test]
fn metadata_is_written_and_read_back_unless_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let out = folder.path().join("out.png").display().to_string();
    run(&quick(&sample, &out, &model), 0);
    let info = text(&run(&["info", &out], 0).stdout);
    for word in ["96x64", "make it night", "Seed: 7", "Steps: 2", "Model hash:"] {
        assert!(info.contains(word), "no {word:?} in {info}");
    }
    let value: serde_json::Value =
        serde_json::from_slice(&run(&["info", &out, "--json"], 0).stdout).unwrap();
    assert_eq!(value["record"]["seed"], 7);
    let mut arguments = quick(&sample, &out, &model);
    arguments.extend(["--force", "--no-metadata"]);
    run(&arguments, 0);
    assert!(!text(&run(&["info", &out], 0).stdout).contains("night"));
}

#[test]
fn nothing_is_overwritten_and_nothing_half_written() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let out = folder.path().join("out.png");
    let name = out.display().to_string();
    fs_err::write(&out, "precious").unwrap();
    stderr_of(&quick(&sample, &name, &model), 1, &["out.png", "exists", "--force"]);
    assert_eq!(fs_err::read_to_string(&out).unwrap(), "precious");
    let inside = folder.path().join("nowhere/out.png").display().to_string();
    stderr_of(&quick(&sample, &inside, &model), 1, &["nowhere"]);
    let unknown = folder.path().join("out.xyz").display().to_string();
    stderr_of(&quick(&sample, &unknown, &model), 1, &["out.xyz", "png"]);
    stderr_of(&quick(&sample, "/proc/out.png", &model), 1, &["/proc/out.png"]);
    let left: Vec<_> =
        fs_err::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out.png"]);
}

#[test]
fn usage_is_2_and_model_files_are_3_and_memory_is_4() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let out = folder.path().join("out.png").display().to_string();
    let with = |more: &[&'static str]| {
        let mut arguments: Vec<String> =
            quick(&sample, &out, &model).into_iter().map(str::to_owned).collect();
        arguments.extend(more.iter().map(|&argument| argument.to_owned()));
        arguments
    };
    let check = |more: &[&'static str], code: i32, words: &[&str]| {
        let arguments = with(more);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        stderr_of(&arguments, code, words);
    };
    check(&["--no-such-flag"], 2, &["--no-such-flag"]);
    check(&["--strategy", "sequential"], 2, &["direct"]);
    check(&["--device", "tpu"], 2, &["--device", "tpu", "cuda:N"]);
    check(&["-W", "100"], 2, &["width", "100", "96 or 112"]);
    check(&["--threads", "0"], 2, &["--threads"]);
    check(&["--max-ram", "0.000001"], 4, &["memory", "bytes", "hint"]);
    stderr_of(&["edit", "-i", &sample, "-o", &out], 2, &["--prompt"]);
    stderr_of(&["edit", "-i", &sample, "-o", &out, "-p", "  ", "--model", &model], 2, &["prompt"]);
    stderr_of(&["edit", "-p", "x", "-o", &out], 2, &["--image"]);
    stderr_of(&["edit", "-i", "/no/such.png", "-o", &out, "-p", "x"], 1, &["/no/such.png"]);
    stderr_of(
        &["edit", "-i", &sample, "-o", &out, "-p", "x", "--model", "/no/such"],
        3,
        &["/no/such", "hint"],
    );
    stderr_of(&["info", "/no/such.safetensors"], 1, &["/no/such.safetensors"]);
    if !pentimento::Device::CUDA_BUILT {
        check(&["--device", "cuda"], 1, &["feature `cuda`", "--device cpu"]);
    }
}

#[test]
fn prompts_come_from_files_and_words_too() {
    let folder = tempfile::tempdir().unwrap();
    let (sample, model) = (sample().display().to_string(), model());
    let path = |name: &str| folder.path().join(name).display().to_string();
    fs_err::write(folder.path().join("prompt.txt"), "make it night\n").unwrap();
    let (a, b, c, prompt) = (path("a.png"), path("b.png"), path("c.png"), path("prompt.txt"));
    run(&quick(&sample, &a, &model), 0);
    let common = ["--model", &model, "--area", "64x64", "--steps", "2", "-s", "7", "-i", &sample];
    run(&[&["edit", "--prompt-file", &prompt, "-o", &b], common.as_slice()].concat(), 0);
    run(&[&["edit", "make it night", "-o", &c], common.as_slice()].concat(), 0);
    let open = |name: &str| image::open(name).unwrap();
    assert_eq!(open(&a), open(&b));
    assert_eq!(open(&a), open(&c));
}

#[test]
#[cfg(unix)]
fn ctrl_c_ends_with_130_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.png");
    let mut command = pentimento();
    let (sample, name, model) =
        (sample().display().to_string(), out.display().to_string(), model());
    let mut arguments = quick(&sample, &name, &model);
    for (from, to) in [("64x64", "512x512"), ("2", "1000")] {
        let position = arguments.iter().position(|argument| *argument == from).unwrap();
        arguments[position] = to;
    }
    let mut child = command.args(&arguments).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let pid = child.id();
    assert!(
        Command::new("sh").args(["-c", &format!("kill -INT {pid}")]).status().unwrap().success()
    );
    let start = Instant::now();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(20), "cancel took {:?}", start.elapsed());
    assert_eq!(fs_err::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn ask_answers_and_info_and_doctor_tell() {
    let (sample, model) = (sample().display().to_string(), model());
    let output = run(
        &[
            "ask",
            "-i",
            &sample,
            "what is in the picture?",
            "--model",
            &model,
            "--max-tokens",
            "5",
            "--json",
        ],
        0,
    );
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["answer_tokens"].as_u64().unwrap() <= 5);
    assert!(value["prompt_tokens"].as_u64().unwrap() > 5);
    let plain = run(
        &[
            "ask",
            "-i",
            &sample,
            "what is in the picture?",
            "--model",
            &model,
            "--max-tokens",
            "5",
            "-q",
        ],
        0,
    );
    assert_eq!(text(&plain.stdout).trim_end(), value["answer"].as_str().unwrap().trim_end());

    let info = text(&run(&["info", &model], 0).stdout);
    assert!(info.contains("Qwen-Image-Edit") && info.contains("text_encoder"), "{info}");
    let file = format!("{model}/transformer/diffusion_pytorch_model.safetensors");
    let info = text(&run(&["info", &file], 0).stdout);
    assert!(info.contains("txt_norm.weight") && info.contains("Qwen-Image transformer"), "{info}");

    let doctor = text(&run(&["doctor"], 0).stdout);
    assert!(doctor.contains("cpu: usable") && doctor.contains("mini"), "{doctor}");
    serde_json::from_slice::<serde_json::Value>(&run(&["doctor", "--json"], 0).stdout).unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&run(&["completions", shell], 0).stdout).contains("pentimento"));
    }
}
