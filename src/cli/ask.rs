//! `pentimento ask`

use std::sync::atomic::{AtomicBool, Ordering};

use pentimento::{AskRequest, Assistant, Event, Observer, Result};

use super::{args::AskArgs, model, progress::Bar};

/// Shows the bar until the first word, then the words.
struct Speaker<'a> {
    bar: &'a Bar,
    speak: bool,
    /// Whether the answer has begun.
    spoke: AtomicBool,
}

impl Observer for Speaker<'_> {
    fn event(&self, event: &Event<'_>) {
        let Event::Text(piece) = event else { return self.bar.event(event) };
        if self.speak {
            self.bar.clear();
            self.spoke.store(true, Ordering::Relaxed);
            say(piece);
        }
    }
}

/// Prints `text`, if there is still anyone who reads it.
fn say(text: &str) {
    if let Err(error) = super::print(text.as_bytes()) {
        tracing::debug!(%error, "stdout is gone");
    }
}

pub(crate) fn run(args: AskArgs) -> Result<()> {
    let mut request = AskRequest::new(model::pictures(&args.images)?, args.question);
    request.tokens_max = args.max_tokens;
    request.temperature = args.temperature;
    request.seed = args.seed.and_then(|seed| seed.number());
    request.cancel = super::cancel_on_interrupt()?;

    let bar = Bar::new(args.report.quiet);
    let options = model::options(&args.model, &request.cancel)?;
    let speaker = Speaker { bar: &bar, speak: !args.report.json, spoke: AtomicBool::new(false) };
    let result = Assistant::open(&model::source(&args.model)?, &options, &bar)
        .and_then(|assistant| assistant.ask(&request, &speaker));
    bar.clear();
    if result.is_err() && speaker.spoke.into_inner() {
        say("\n");
    }
    let outcome = result?;
    if args.report.json {
        return super::print_json(&outcome);
    }
    super::print_line("")?;
    if !outcome.finished {
        bar.note("the answer was cut at --max-tokens");
    }
    Ok(())
}
