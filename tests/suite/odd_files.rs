//! Things that are no ordinary files where files are named, and streams that take nothing.
#![cfg(unix)]

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use crate::{cli, common::Reference};

/// A folder with a named pipe, a folder with a weight file's name and a link to nowhere.
fn odd() -> (tempfile::TempDir, [PathBuf; 3]) {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let made = Command::new("mkfifo").arg(at("pipe.safetensors")).status().unwrap();
    assert!(made.success());
    fs_err::create_dir(at("folder.safetensors")).unwrap();
    std::os::unix::fs::symlink("nowhere", at("link.safetensors")).unwrap();
    let paths = ["pipe", "folder", "link"].map(|name| at(&format!("{name}.safetensors")));
    (folder, paths)
}

/// Ends the program where it hangs.
fn output(command: &mut Command) -> Output {
    const LONGEST: Duration = Duration::from_secs(60);
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > LONGEST {
            child.kill().unwrap();
            panic!("{command:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn program(arguments: &[&OsStr]) -> Command {
    let mut command = cli::pentimento();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[track_caller]
fn told(arguments: &[&OsStr], code: i32, words: &[&str]) {
    let output = output(&mut program(arguments));
    let (stdout, stderr) = (cli::text(&output.stdout), cli::text(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{arguments:?}\n{stdout}\n{stderr}");
    for word in words {
        assert!(stderr.contains(word) || stdout.contains(word), "no {word:?} in: {stdout}{stderr}");
    }
}

#[test]
fn what_is_no_file_is_told_by_name_and_never_waited_for() {
    let (folder, [pipe, directory, link]) = odd();
    let [info, convert, verify] = ["info", "convert", "verify"].map(OsStr::new);
    let more = ["-o", "/tmp/none.gguf", "--type", "q8_0"].map(OsStr::new);
    let cases: [(&Path, &[&str]); 3] = [
        (&pipe, &["pipe.safetensors", "a pipe or a device"]),
        (&directory, &["folder.safetensors"]),
        (&link, &["link.safetensors", "a link to a file that is not there"]),
    ];
    for (path, words) in cases {
        let path = path.as_os_str();
        told(&[&[convert, path], more.as_slice()].concat(), 3, &words[..1]);
        told(&[OsStr::new("models"), verify, path], 3, words);
        for flag in ["--diffusion-model", "--llm", "--vae"].map(OsStr::new) {
            let edit = ["edit", "-i", "Cargo.toml", "-p", "x", "-o", "/tmp/none.png"];
            let edit = edit.map(OsStr::new);
            // Pictures are read first, so there must be one.
            let sample = Reference::open("tiny-qwen-edit").folder.join("cases/edit_in.png");
            let mut arguments = edit.to_vec();
            arguments[2] = sample.as_os_str();
            told(&[arguments.as_slice(), &[flag, path]].concat(), 3, &words[..1]);
        }
    }
    // All who read weights tell it in the same words, with the same exit code.
    let sample = Reference::open("tiny-qwen-edit").folder.join("cases/edit_in.png");
    let edit = ["edit", "-p", "x", "-o", "/tmp/none.png", "--steps", "2", "--area", "64x64", "-i"];
    let edit: Vec<&OsStr> = edit.iter().map(OsStr::new).chain([sample.as_os_str()]).collect();
    let missing = folder.path().join("none.safetensors");
    let device = Path::new("/dev/zero");
    for (path, words) in [
        (&*pipe, "a pipe or a device, expected a weight file"),
        (device, "a pipe or a device, expected a weight file"),
        (&link, "not found (a link to a file that is not there)"),
        (&missing, "not found (there is no such file)"),
    ] {
        let words = [&*path.to_string_lossy(), words];
        told(&[info, path.as_os_str()], 3, &words);
        told(&[&edit[..], &[OsStr::new("--lora"), path.as_os_str()]].concat(), 3, &words);
    }
    // In a place with models a pipe is passed by; a link that leads nowhere is listed with its fault.
    let list = ["models", "list", "--json", "--models-dir"].map(OsStr::new);
    let output = output(&mut program(&[&list[..], &[folder.path().as_os_str()]].concat()));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let models = json["models"].as_array().unwrap();
    assert_eq!(models.len(), 1, "{json}");
    assert_eq!(models[0]["name"], "link.safetensors");
    assert!(models[0]["problem"].is_string());
}

#[test]
fn texts_of_flags_are_read_under_a_limit() {
    let sample = Reference::open("tiny-qwen-edit").folder.join("cases/edit_in.png");
    for flag in ["--prompt-file", "--planner-prompt"] {
        let edit = ["edit", "-o", "/tmp/none.png", "-p", "x", flag, "/dev/zero", "-i"];
        let without = if flag == "--prompt-file" { 3..5 } else { 0..0 };
        let mut arguments: Vec<&OsStr> = edit.iter().map(OsStr::new).collect();
        arguments.drain(without);
        arguments.push(sample.as_os_str());
        told(&arguments, 2, &[flag, "/dev/zero", "1048576"]);
    }
}

/// An edit by the shipped pack's own means, in a moment.
fn edit(output: &Path) -> Command {
    let reference = Reference::open("tiny-qwen-edit").folder;
    let mut command = program(&[]);
    command.args(["edit", "-p", "x", "--strategy", "direct", "--steps", "2", "--area", "64x64"]);
    command.arg("-i").arg(reference.join("cases/edit_in.png"));
    command.arg("--model").arg(reference).arg("-o").arg(output);
    command
}

#[test]
fn paths_that_are_not_unicode_are_written_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(OsStr::from_bytes(b"\xff.png"));
    let output = output(edit(&path).arg("--json"));
    assert!(output.status.success(), "{}", cli::text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["output"].as_str().unwrap().ends_with("\u{fffd}.png"));
    assert!(path.is_file());
}

#[test]
#[cfg(target_os = "linux")]
fn streams_that_take_nothing_are_no_panics() {
    let full = || fs_err::OpenOptions::new().write(true).open("/dev/full").unwrap().into_parts().0;
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("1.png"), folder.path().join("2.png"));
    // Notes that nobody can read do not stop an edit; a report that is lost does.
    let output = |command: &mut Command| self::output(command).status.code();
    assert_eq!(output(edit(&first).stderr(full())), Some(0));
    assert!(first.is_file());
    assert_eq!(output(edit(&second).arg("--json").stdout(full())), Some(1));
    assert_eq!(output(program(&["doctor".as_ref()]).stdout(full())), Some(1));
    let both = self::output(edit(Path::new("-")).arg("--json"));
    assert_eq!(both.status.code(), Some(2));
    assert!(cli::text(&both.stderr).contains("--output -"), "{}", cli::text(&both.stderr));
}
