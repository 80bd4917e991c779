//! `pentimento bench`: how fast each stage is.

use indicatif::BinaryBytes;
use pentimento::{BenchReport, BenchRequest, BenchRow, Engine, Result};

use super::{eval_args::BenchArgs, model, progress::Bar};

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let request = BenchRequest {
        width: args.width,
        height: args.height,
        steps: args.steps,
        answer_tokens: args.answer_tokens,
        cancel: super::cancel_on_interrupt()?,
        ..BenchRequest::default()
    };
    let bar = Bar::new(args.report.quiet);
    let options = model::options(&args.model, &request.cancel)?;
    let result = Engine::open(&model::source(&args.model)?, &options, &bar)
        .and_then(|engine| engine.bench(&request, &bar));
    bar.clear();
    let report = result?;
    if args.report.json {
        return super::print_json(&report);
    }
    super::print(table(&report).as_bytes())
}

fn table(report: &BenchReport) -> String {
    let BenchReport { model, threads, working_size, steps, rows, .. } = report;
    let mut lines = vec![format!("{model} at {working_size}, {threads} threads")];
    lines.extend(rows.iter().map(|row| line(row, *steps)));
    lines.join("\n") + "\n"
}

fn line(row: &BenchRow, steps: usize) -> String {
    let what = match row.name {
        "load" => "load the weights".to_owned(),
        "vision" => "vision tower".to_owned(),
        "prefill" => "read the prompt".to_owned(),
        "answer" => "write an answer".to_owned(),
        "encode" => "encode the picture".to_owned(),
        "step" => "one denoising step".to_owned(),
        "decode" => "decode the picture".to_owned(),
        "edit" if steps == 1 => "an edit of 1 step".to_owned(),
        "edit" => format!("an edit of {steps} steps"),
        other => other.to_owned(),
    };
    let speed = match (row.tokens, row.tokens_per_second) {
        (Some(tokens), Some(speed)) => format!("{tokens:>6} tokens {speed:>9.1} tokens/s"),
        _ => String::new(),
    };
    let peak = row.peak_resident_bytes.map(|bytes| format!("peak {}", BinaryBytes(bytes)));
    let line =
        format!("{what:<20} {:>9.3} s {speed:<32} {}", row.seconds, peak.unwrap_or_default());
    line.trim_end().to_owned()
}
