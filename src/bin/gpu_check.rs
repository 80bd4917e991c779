//! The program `pentimento-gpu-check`: every check and time of [`pentimento::check`] on the first CUDA
//! device.
//!
//! `pentimento-gpu-check [--references FOLDER] [--scratch FOLDER] [--out FOLDER] [--correctness-only]
//! [--part NAME]…`
//!
//! Each part runs in a process of its own with a limit of time, so that a kernel which a device does not
//! stand, or which hangs, spoils nothing else. Parts that take no times run several at a time.
//!
//! Exit codes: 0 all checks passed, 1 a check failed, 2 wrong arguments or a file that could not be
//! written, 3 no GPU that can be used.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program talks")]

use std::{
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use pentimento::check::{
    self, Options, Part,
    report::{Report, Row},
};

const FAILED: u8 = 1;
const WRONG: u8 = 2;
const NO_GPU: u8 = 3;
/// Parts without times that run at a time.
const TOGETHER: usize = 5;
/// What a part's process writes before a row.
const ROW: &str = "row ";

/// What the program was asked for.
struct Request {
    options: Options,
    out: PathBuf,
    /// Names of parts; all where there is none.
    parts: Vec<String>,
    /// Whether this is the process of one part.
    inner: bool,
}

fn main() -> ExitCode {
    let request = match arguments(std::env::args().skip(1)) {
        Ok(request) => request,
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
    let all = check::parts(&request.options);
    let is_wanted = |part: &&Part| {
        request.parts.is_empty() || request.parts.iter().any(|name| name == part.name)
    };
    let wanted: Vec<Part> = all.iter().filter(is_wanted).copied().collect();
    if request.inner {
        for row in wanted.iter().flat_map(|part| part.run(&device, &request.options)) {
            let json = serde_json::to_string(&row).unwrap_or_default();
            println!("{ROW}{json}");
        }
        return ExitCode::SUCCESS;
    }
    drop(device);
    println!("{name}");
    let report = in_processes(&wanted);
    if let Err(error) = report.write(&request.out, &name) {
        eprintln!("error: {error}");
        return ExitCode::from(WRONG);
    }
    println!("written: {}", request.out.display());
    if report.passed() { ExitCode::SUCCESS } else { ExitCode::from(FAILED) }
}

/// Runs each part in a process of its own.
fn in_processes(parts: &[Part]) -> Report {
    let mut report = Report::default();
    let (timed, untimed): (Vec<&Part>, Vec<&Part>) = parts.iter().partition(|part| part.timed);
    let groups = untimed.chunks(TOGETHER).chain(timed.chunks(1));
    for group in groups {
        let rows: Vec<Vec<Row>> = thread::scope(|scope| {
            let running: Vec<_> =
                group.iter().map(|part| scope.spawn(|| in_process(part))).collect();
            running.into_iter().map(|thread| thread.join().unwrap_or_default()).collect()
        });
        report.rows.extend(rows.into_iter().flatten());
    }
    report
}

/// The rows of a part, with one more where its process did not come to a good end.
fn in_process(part: &Part) -> Vec<Row> {
    let start = Instant::now();
    let (mut rows, end) = match started(part) {
        Ok(child) => watched(part, child),
        Err(error) => (Vec::new(), Err(error.to_string())),
    };
    if let Err(why) = end {
        rows.push(part.broken(why));
    }
    let failed = rows.iter().filter(|row| !row.passed()).count();
    for row in rows.iter().filter(|row| part.timed || !row.passed()) {
        println!("{}", row.line());
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("-- {}: {} rows, {failed} failed, {seconds:.1} s", part.name, rows.len());
    rows
}

fn started(part: &Part) -> std::io::Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(std::env::args().skip(1)).args(["--part", part.name, "--inner"]);
    if !part.timed {
        // A fault is told where it happens, not some operations later.
        command.env("CUDA_LAUNCH_BLOCKING", "1");
    }
    command.stdout(Stdio::piped()).spawn()
}

/// What the process writes, until it ends or is stopped.
fn watched(part: &Part, mut child: Child) -> (Vec<Row>, Result<(), String>) {
    let lines = child.stdout.take().map(BufReader::new);
    let reader = thread::spawn(move || {
        let lines = lines.into_iter().flat_map(|lines| lines.lines().map_while(Result::ok));
        let rows = lines.filter_map(|line| serde_json::from_str(line.strip_prefix(ROW)?).ok());
        rows.collect::<Vec<Row>>()
    });
    let end = Instant::now() + Duration::from_secs(part.limit_s);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => break Ok(()),
            Ok(Some(status)) => break Err(format!("its process ended with {status}")),
            Ok(None) if Instant::now() > end => {
                // What has ended meanwhile need not be stopped.
                let _ended = child.kill().and_then(|()| child.wait());
                break Err(format!("not done after {} s", part.limit_s));
            }
            Ok(None) => thread::sleep(Duration::from_millis(20)),
            Err(error) => break Err(error.to_string()),
        }
    };
    (reader.join().unwrap_or_default(), status)
}

/// The options and the folder for the results.
fn arguments(mut given: impl Iterator<Item = String>) -> Result<Request, String> {
    let options = Options {
        references: None,
        scratch: std::env::temp_dir().join("pentimento-gpu-check"),
        correctness_only: false,
        shrink: 1,
    };
    let out = PathBuf::from("gpu-check");
    let mut request = Request { options, out, parts: Vec::new(), inner: false };
    while let Some(argument) = given.next() {
        let mut next =
            |what: &str| given.next().ok_or_else(|| format!("{argument}: {what} is missing"));
        match argument.as_str() {
            "--references" => request.options.references = Some(next("a folder")?.into()),
            "--scratch" => request.options.scratch = next("a folder")?.into(),
            "--out" => request.out = next("a folder")?.into(),
            "--part" => request.parts.push(next("a name")?),
            "--correctness-only" => request.options.correctness_only = true,
            "--inner" => request.inner = true,
            _ => return Err(format!("{argument:?}: not an argument of this program")),
        }
    }
    if request.inner {
        request.parts.drain(..request.parts.len().saturating_sub(1));
    }
    let all = check::parts(&request.options);
    match request.parts.iter().find(|name| !all.iter().any(|part| part.name == **name)) {
        Some(unknown) => {
            let names: Vec<&str> = all.iter().map(|part| part.name).collect();
            Err(format!("--part {unknown:?}: not one of {}", names.join(", ")))
        }
        None => Ok(request),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_read() {
        let read = |given: &[&str]| arguments(given.iter().map(ToString::to_string));
        let request = read(&["--out", "a", "--correctness-only", "--scratch", "b"]).unwrap();
        assert!(request.options.correctness_only && request.options.references.is_none());
        assert_eq!((request.options.scratch, request.out), ("b".into(), PathBuf::from("a")));
        let request = read(&["--part", "memory", "--part", "large", "--inner"]).unwrap();
        assert_eq!(request.parts, ["large"]);
        for bad in [&["--out"][..], &["--fast"], &["--part", "none"]] {
            let error = read(bad).err().unwrap();
            assert!(error.contains(bad.last().unwrap()), "{error}");
        }
    }
}
