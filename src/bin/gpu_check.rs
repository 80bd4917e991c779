//! The program `pentimento-gpu-check`: every check and time of [`pentimento::check`] on the first CUDA
//! device.
//!
//! `pentimento-gpu-check [--references FOLDER] [--scratch FOLDER] [--out FOLDER] [--correctness-only]`
//!
//! Exit codes: 0 all checks passed, 1 a check failed, 2 wrong arguments or a file that could not be
//! written, 3 no GPU that can be used.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks")]

use std::{path::PathBuf, process::ExitCode};

use pentimento::check::{self, Options};

const FAILED: u8 = 1;
const WRONG: u8 = 2;
const NO_GPU: u8 = 3;

fn main() -> ExitCode {
    let (options, out) = match arguments(std::env::args().skip(1)) {
        Ok(both) => both,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(WRONG);
        }
    };
    let (device, name) = match check::first_gpu() {
        Ok(found) => found,
        Err(error) => {
            let reason = error.to_string();
            eprintln!("no GPU that can be used: {}", reason.lines().next().unwrap_or_default());
            return ExitCode::from(NO_GPU);
        }
    };
    println!("{name}");
    let report = match check::run(&device, &options, &mut |row| println!("{}", row.line())) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(FAILED);
        }
    };
    if let Err(error) = report.write(&out, &name) {
        eprintln!("error: {error}");
        return ExitCode::from(WRONG);
    }
    println!("written: {}", out.display());
    if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// The options and the folder for the results.
fn arguments(mut given: impl Iterator<Item = String>) -> Result<(Options, PathBuf), String> {
    let mut options = Options {
        references: None,
        scratch: std::env::temp_dir().join("pentimento-gpu-check"),
        correctness_only: false,
        shrink: 1,
    };
    let mut out = PathBuf::from("gpu-check");
    while let Some(argument) = given.next() {
        let mut folder = || {
            given
                .next()
                .map(PathBuf::from)
                .ok_or_else(|| format!("{argument}: a folder is missing"))
        };
        match argument.as_str() {
            "--references" => options.references = Some(folder()?),
            "--scratch" => options.scratch = folder()?,
            "--out" => out = folder()?,
            "--correctness-only" => options.correctness_only = true,
            _ => return Err(format!("{argument:?}: not an argument of this program")),
        }
    }
    Ok((options, out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read() {
        let read = |given: &[&str]| arguments(given.iter().map(ToString::to_string));
        let (options, out) = read(&["--out", "a", "--correctness-only", "--scratch", "b"]).unwrap();
        assert!(options.correctness_only && options.references.is_none());
        assert_eq!((options.scratch, out), (PathBuf::from("b"), PathBuf::from("a")));
        assert!(read(&["--out"]).unwrap_err().contains("--out"));
        assert!(read(&["--fast"]).unwrap_err().contains("--fast"));
    }
}
