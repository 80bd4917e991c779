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

/// The program, with nothing of this machine's own models.
pub(crate) fn pentimento() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pentimento"));
    command.env_remove("PENTIMENTO_MODEL").env_remove("RUST_LOG");
    for name in ["PENTIMENTO_MODELS_DIR", "HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"] {
        command.env_remove(name);
    }
    command.env("HOME", env!("CARGO_TARGET_TMPDIR"));
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
        "--strategy",
        "direct",
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
            command.args(["edit", "--quiet", "--device", "cpu", "--strategy", "direct"]);
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
    stderr_of(
        &["edit", "-i", &sample, "-o", &out, "-p", "x", "--strategy", "guess"],
        2,
        &["single", "sequential", "direct", "auto"],
    );
    check(&["--device", "tpu"], 2, &["--device", "tpu", "cuda:N"]);
    check(&["-W", "100"], 2, &["width", "100", "96 or 112"]);
    check(&["-W", "0"], 2, &["width", "0, expected"]);
    check(&["-W", "16"], 2, &["width", "both sides"]);
    check(&["--vl-area", "1"], 2, &["vl-area", "1024"]);
    check(&["--threads", "0"], 2, &["--threads"]);
    check(&["--threads", "65535"], 2, &["--threads"]);
    check(&["--cache-option", "threshold=0.2"], 2, &["--cache-mode"]);
    check(&["--rng", "cuda:0x8"], 2, &["--rng"]);
    check(&["--max-ram", "0.000001"], 4, &["memory", "bytes", "hint"]);
    stderr_of(&["edit", "-i", &sample, "-o", &out], 2, &["--prompt"]);
    stderr_of(&["edit", "-i", &sample, "-o", &out, "-p", "  ", "--model", &model], 2, &["prompt"]);
    stderr_of(&["edit", "-p", "x", "-o", &out], 2, &["--image"]);
    let marked = ["edit", "-i", &sample, "-o", &out, "--model", &model, "-p", "a <|image_pad|>"];
    for strategy in ["direct", "single"] {
        let marked = [&marked[..], &["--strategy", strategy]].concat();
        stderr_of(&marked, 2, &["error: prompt: 1", "<|image_pad|>"]);
    }
    let marked = ["edit", "-i", &sample, "-o", &out, "--model", &model, "-p", "x", "-n"];
    stderr_of(&[&marked[..], &["<|image_pad|>"]].concat(), 2, &["error: negative prompt: 1"]);
    stderr_of(&["edit", "-i", "/no/such.png", "-o", &out, "-p", "x"], 1, &["/no/such.png"]);
    stderr_of(
        &["edit", "-i", &sample, "-o", &out, "-p", "x", "--model", "/no/such"],
        3,
        &["/no/such", "hint"],
    );
    // A variable that is set to nothing is not set.
    let mut empty = pentimento();
    for name in ["PENTIMENTO_MODEL", "PENTIMENTO_MAX_RAM", "PENTIMENTO_MAX_VRAM"] {
        empty.env(name, "");
    }
    let dry = empty.args(["edit", "-i", &sample, "-o", &out, "-p", "x", "--dry-run"]).output();
    assert!(dry.unwrap().status.success());
    stderr_of(&["info", "/no/such.safetensors"], 3, &["/no/such.safetensors"]);
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
    let common = [
        "--model",
        &model,
        "--area",
        "64x64",
        "--steps",
        "2",
        "-s",
        "7",
        "-i",
        &sample,
        "--strategy",
        "direct",
    ];
    run(&[&["edit", "--prompt-file", &prompt, "-o", &b], common.as_slice()].concat(), 0);
    run(&[&["edit", "make it night", "-o", &c], common.as_slice()].concat(), 0);
    let open = |name: &str| image::open(name).unwrap();
    assert!(open(&a) == open(&b) && open(&a) == open(&c));
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
fn bench_tells_how_fast_each_stage_is() {
    let model = model();
    let arguments = ["bench", "--model", &model, "--steps", "2", "--answer-tokens", "3"];
    let sized = [&arguments[..], &["-W", "64", "-H", "32", "--json", "-q"]].concat();
    let report: serde_json::Value = serde_json::from_slice(&run(&sized, 0).stdout).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let expected = ["load", "vision", "prefill", "answer", "encode", "step", "decode", "edit"];
    assert_eq!(names, expected);
    for row in rows {
        let seconds = row["seconds"].as_f64().unwrap();
        // An answer's time is a difference of two, which noise can eat up in a tiny model.
        assert!(seconds > 0.0 || (row["name"] == "answer" && seconds >= 0.0), "{row}");
        let counted = ["vision", "prefill", "answer"].contains(&row["name"].as_str().unwrap());
        assert_eq!(row["tokens"].as_u64().is_some_and(|tokens| tokens > 0), counted, "{row}");
        assert_eq!(row["tokens_per_second"].is_number(), counted && seconds > 0.0, "{row}");
    }
    assert_eq!(rows[3]["tokens"], 3);
    assert_eq!(report["working_size"], serde_json::json!({ "width": 64, "height": 32 }));
    let table = String::from_utf8(run(&arguments, 0).stdout).unwrap();
    assert_eq!(table.lines().count(), 1 + expected.len(), "{table}");
    assert!(table.contains("an edit of 2 steps") && table.contains("tokens/s"), "{table}");
    run(&["bench", "--model", &model, "-W", "64"], 2);
    run(&["bench", "--model", &model, "-W", "63", "-H", "64"], 2);
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
    #[cfg(not(feature = "cuda"))]
    assert_eq!(doctor.matches("cuda:0").count(), 1, "{doctor}");
    serde_json::from_slice::<serde_json::Value>(&run(&["doctor", "--json"], 0).stdout).unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(text(&run(&["completions", shell], 0).stdout).contains("pentimento"));
    }
}

#[test]
fn a_plan_is_shown_changed_and_carried_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let street = street();
    let request = "paint the house blue, take away the car and make it night";
    let shown = text(&run(&["plan", "-i", &street, "-p", request], 0).stdout);
    for word in ["request   paint", "actions   recolor; delete", "step 3"] {
        assert!(shown.contains(word), "{shown}");
    }
    let output = run(&["plan", "-i", &street, request, "--json"], 0);
    let mut plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((plan["version"].as_u64(), plan["steps"].as_array().unwrap().len()), (Some(1), 3));

    // A step less, by hand; the plan comes through stdin.
    plan["steps"].as_array_mut().unwrap().remove(1);
    let mut child = pentimento()
        .args(["edit", "-i", &street, "--plan", "-", "-o", &at("out.png"), "--json", "-s", "3"])
        .args(["--strategy", "sequential", "--keep-steps", &at("steps")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), plan.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("step 2    change the background to night"), "{stderr}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["strategy"], &report["plan"]), (&"sequential".into(), &plan));
    assert_eq!(report["prompt"], request);
    assert_eq!(report["planner"]["shares_text_encoder"], true);
    let picture = |name: &str| image::open(at(name)).unwrap().into_rgb8();
    assert!(picture("steps/step-2.png") == picture("out.png"));
    assert!(picture("steps/step-1.png") != picture("out.png"));
    assert!(!folder.path().join("steps/step-3.png").exists());

    // One pass has nothing in between.
    let whole = ["-o", &at("c.png"), "--keep-steps", &at("none"), "--steps", "1"];
    let whole = [&["edit", "-i", &street, "-p", "make it night"], &whole[..]].concat();
    stderr_of(&whole, 0, &["--keep-steps: nothing was kept"]);
    assert!(!folder.path().join("none").exists());

    // Kept steps are not overwritten, which is said before any work.
    let again = [
        "edit",
        "-i",
        &street,
        "-p",
        request,
        "-o",
        &at("b.png"),
        "--strategy",
        "sequential",
        "--keep-steps",
        &at("steps"),
    ];
    stderr_of(&again, 1, &["step-1.png", "--force"]);
}

#[test]
fn bad_plans_are_wrong_usage() {
    let folder = tempfile::tempdir().unwrap();
    let (out, file) = (folder.path().join("o.png"), folder.path().join("plan.json"));
    let (out, plan) = (out.display().to_string(), file.display().to_string());
    let street = street();
    let edit = ["edit", "-i", &street, "--plan", &plan, "-o", &out];
    let step = |action: &str, goal: &str| {
        format!(r#"{{"action":"{action}","subject":"car","goal":"{goal}","prompt":"{goal}"}}"#)
    };
    for (json, words) in [
        ("{", vec!["plan, line 1, column 1"]),
        ("[]", vec!["the plan: a list", "expected an object"]),
        (r#"{"version":7,"steps":[]}"#, vec!["version: 7, expected 1"]),
        (r#"{"version":1,"steps":[]}"#, vec!["steps: 0 steps"]),
        (
            &format!(
                r#"{{"version":1,"steps":[{},{}]}}"#,
                step("recolor", "red"),
                step("recolor", "blue")
            ),
            vec!["steps[1]", "steps[0]", "contradiction"],
        ),
    ] {
        fs_err::write(&file, json).unwrap();
        stderr_of(&edit, 2, &words);
    }
    fs_err::write(&file, b"\xff").unwrap();
    stderr_of(&edit, 2, &["byte 0", "UTF-8"]);
    stderr_of(&["edit", "-i", "-", "--plan", "-", "-o", &out], 2, &["stdin at most once"]);
    let prompts = folder.path().join("prompts.txt").display().to_string();
    fs_err::write(&prompts, "[decompose.user]\nno place for it\n").unwrap();
    let planned = ["plan", "-i", &street, "-p", "x", "--planner-prompt", &prompts];
    stderr_of(&planned, 2, &["planner prompt", "{request}"]);
    stderr_of(&["plan", "-i", &street], 2, &["--prompt"]);
    let short = ["plan", "-i", &street, "-p", "make it night", "--planner-tokens", "4"];
    let words = ["not finished after 4 tokens", "<action>", "--planner-tokens"];
    stderr_of(&short, 1, &words);
    // A folder for the pictures in between is made with the first of them, and must be one that can be.
    let at = |name: &str| folder.path().join(name).display().to_string();
    let edit = ["edit", "-i", &street, "-o", &out, "--strategy", "sequential"];
    let keep = |steps: &str, code: i32, words: &[&str]| {
        stderr_of(&[&edit[..], &short[3..], &["--keep-steps", steps]].concat(), code, words);
    };
    keep(&at("new/steps"), 1, &words);
    // Numbers below zero are numbers, not flags.
    let negative = |flag: &str| {
        let words = [&format!("{}: -0.5, expected", flag.trim_start_matches('-'))[..]];
        stderr_of(&[&edit[..], &short[3..5], &[flag, "-0.5"]].concat(), 2, &words);
    };
    negative("--cfg-scale");
    negative("--planner-temperature");
    keep(&at("plan.json"), 1, &["plan.json"]);
    keep(&at("plan.json/steps"), 1, &["plan.json/steps"]);
    keep(&at(&format!("new/{}", "x".repeat(300))), 1, &["xxx"]);
    assert!(!folder.path().join("new").exists());
    assert!(!Path::new(&out).exists());
}

fn street() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/samples");
    folder.join("street.png").display().to_string()
}

#[test]
fn scenes_are_measured_and_shown() {
    let output = run(&["eval", "scenes", "--count", "1", "--only", "single", "--json", "-q"], 0);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&value["version"], &value["seed"]), (&1.into(), &7.into()));
    assert_eq!(value["model"]["name"], "mini");
    assert_eq!(value["single"]["rows"].as_array().unwrap().len(), 7);
    assert_eq!((&value["single"]["all"]["of"], &value["many"]), (&7.into(), &().into()));
    let table = run(&["eval", "scenes", "--count", "1", "--only", "wordings,single", "-s", "3"], 0);
    let table = text(&table.stdout);
    assert!(table.contains("pointing, held out") && table.contains("recolor"), "{table}");

    let folder = tempfile::tempdir().unwrap();
    let sheet = folder.path().join("sheet.png").display().to_string();
    let arguments = ["eval", "scenes", "--contact-sheet", &sheet, "-N", "2", "-q"];
    let lines = text(&run(&arguments, 0).stdout);
    assert!(lines.starts_with("  1  ") && lines.ends_with(&format!("{sheet}\n")), "{lines}");
    assert_eq!(image::image_dimensions(&sheet).unwrap(), (2 * 408 + 18, 228));
    stderr_of(&arguments, 1, &["already exists"]);
    run(&[&arguments[..], &["--force"]].concat(), 0);
    stderr_of(&["eval", "scenes", "--count", "0"], 2, &["count", "0", "1 to 10000"]);
    stderr_of(&["eval", "scenes", "--only", "everything"], 2, &["everything", "wordings"]);
    stderr_of(&["eval", "scenes", "--force"], 2, &["--contact-sheet"]);
}

#[test]
fn drift_is_measured_for_both_ways_of_handing_on() {
    let drift = ["eval", "drift", "-N", "1", "--passes", "4", "--json", "-q"];
    let value: serde_json::Value = serde_json::from_slice(&run(&drift, 0).stdout).unwrap();
    let ways = value["ways"].as_array().unwrap();
    assert_eq!(
        (&ways[0]["hand_over"], &ways[1]["hand_over"]),
        (&"latents".into(), &"pixels".into())
    );
    for way in ways {
        let rows = way["rows"].as_array().unwrap();
        assert_eq!((&rows[0]["passes"], &rows[1]["passes"]), (&2.into(), &4.into()));
        assert!(rows.iter().all(|row| row["psnr_db"].as_f64().unwrap() > 10.0), "{value}");
    }
    assert_ne!(ways[0]["rows"], ways[1]["rows"]);
    stderr_of(&["eval", "drift", "--passes", "3"], 2, &["passes", "even number"]);
    stderr_of(&["eval", "drift", "-N", "0"], 2, &["count"]);
}

#[test]
fn lora_files_change_the_picture_and_are_listed() {
    let folder = tempfile::tempdir().unwrap();
    let (input, model) = (sample().display().to_string(), model());
    let lora = crate::lora::data("few.safetensors").display().to_string();
    let edit = |name: &str, loras: &[&str]| {
        let out = folder.path().join(name).display().to_string();
        let mut arguments = quick(&input, &out, &model);
        arguments.push("--json");
        arguments.extend(loras.iter().flat_map(|lora| ["--lora", lora]));
        let summary = text(&run(&arguments, 0).stdout);
        let info: serde_json::Value =
            serde_json::from_str(&text(&run(&["info", "--json", &out], 0).stdout)).unwrap();
        (
            image::open(&out).unwrap(),
            serde_json::from_str::<serde_json::Value>(&summary).unwrap(),
            info,
        )
    };
    let (plain, summary, _) = edit("plain.png", &[]);
    assert_eq!(summary["loras"], serde_json::json!([]));
    let half = format!("{lora}:0.5");
    let (changed, summary, info) = edit("changed.png", &[&lora, &half]);
    assert_ne!(changed, plain);
    let entry =
        |strength: f64| serde_json::json!({ "name": "few", "strength": strength, "modules": 6 });
    let mut listed = summary["loras"].clone();
    for lora in listed.as_array_mut().unwrap() {
        assert_eq!(lora.as_object_mut().unwrap().remove("skipped"), Some(0.into()));
    }
    assert_eq!(listed, serde_json::json!([entry(1.0), entry(0.5)]));
    assert_eq!(info["record"]["loras"], serde_json::json!([entry(1.0), entry(0.5)]), "{info}");
    let (off, ..) = edit("off.png", &[&format!("{lora}:0")]);
    assert_eq!(off, plain);
    let out = folder.path().join("none.png").display().to_string();
    let refused = |lora: &str, code: i32, words: &[&str]| {
        let mut arguments = quick(&input, &out, &model);
        arguments.extend(["--lora", lora]);
        stderr_of(&arguments, code, words);
    };
    refused("none.safetensors:0.5", 3, &["none.safetensors", "not found"]);
    // What is there under the whole text is meant, with the strength 1.
    let numbered = folder.path().join("v:0");
    fs_err::create_dir(&numbered).unwrap();
    fs_err::copy(&lora, numbered.join("adapter_model.safetensors")).unwrap();
    let (whole, summary, _) = edit("whole.png", &[&numbered.display().to_string()]);
    assert_eq!(
        (&summary["loras"][0]["name"], &summary["loras"][0]["strength"]),
        (&"v:0".into(), &1.0.into())
    );
    assert_ne!(whole, plain);
    refused(&format!("{lora}:nan"), 2, &["finite"]);
    refused(&format!("{model}/vae/diffusion_pytorch_model.safetensors"), 3, &["low-rank"]);
}
