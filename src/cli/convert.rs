//! `pentimento convert`

use pentimento::{ConvertOutcome, ConvertRequest, Overwrite, Result, convert};

use super::{progress::Bar, weights_args::ConvertArgs};

pub(crate) fn run(args: ConvertArgs) -> Result<()> {
    if let Some(threads) = args.threads {
        pentimento::set_threads(usize::from(threads))?;
    }
    let request = ConvertRequest {
        inputs: args.inputs,
        output: args.output,
        mmproj_output: args.mmproj_output,
        format: args.format.map(super::weights_args::FormatArg::format),
        kind: args.kind,
        rules: args.tensor_type_rules,
        pure: args.pure,
        name: args.name,
        zero_cond_t: args.model_args,
        overwrite: if args.force { Overwrite::Replace } else { Overwrite::Refuse },
        cancel: super::cancel_on_interrupt()?,
    };
    let bar = Bar::new(args.report.quiet);
    let result = convert(&request, &bar);
    bar.clear();
    let outcome = result?;
    if args.report.json {
        return super::print_json(&outcome);
    }
    super::print(text(&outcome).as_bytes())
}

fn text(outcome: &ConvertOutcome) -> String {
    let mut text = String::new();
    for file in &outcome.files {
        let types: Vec<String> =
            file.types.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        text += &format!(
            "{}\n  model        {}{}\n  size         {}\n  tensors      {}\n  fingerprint  {}\n  sha256       {}\n",
            file.path.display(),
            outcome.name,
            match outcome.version {
                Some(version) if version != outcome.name => format!(" ({version})"),
                _ => String::new(),
            },
            indicatif::BinaryBytes(file.bytes),
            types.join(", "),
            file.fingerprint,
            file.sha256,
        );
    }
    text
}
