//! A question about pictures.

use super::{checked::random_seed, stages::Stages};
use crate::{
    error::{Error, Result},
    progress::{Event, Observer, Stage},
    request::{AskOutcome, AskRequest},
    vlm::{Finish, Message, Sampling, VisionLanguageModel},
};

/// Temperatures beyond this make every token equally likely.
const TEMPERATURE_MAX: f64 = 100.0;

pub(super) fn run(
    vlm: &VisionLanguageModel,
    request: &AskRequest,
    observer: &dyn Observer,
) -> Result<AskOutcome> {
    if request.question.trim().is_empty() {
        return Err(Error::field("question", "nothing", "a question"));
    }
    let mut options = vlm.generate_options();
    options.max_new_tokens = request.tokens_max;
    options.sampling = sampling(request.temperature)?;
    options.seed = request.seed.unwrap_or_else(random_seed);

    let pictures: Vec<image::RgbImage> =
        request.pictures.iter().map(|picture| picture.rgb.clone()).collect();
    let text = vlm.chat(&[Message::user(pictures.len(), &request.question)])?;
    let inputs = vlm.prepare(&text, &pictures)?;
    let mut stages = Stages::new(observer, vlm.device());
    let generation = stages.run(Stage::Generate, || {
        let hear = &mut |piece: &str| observer.event(&Event::Text(piece));
        vlm.generate(&inputs, &options, &request.cancel, hear)
    })?;
    Ok(AskOutcome {
        answer: generation.text,
        prompt_tokens: inputs.tokens().len(),
        answer_tokens: generation.tokens.len(),
        finished: generation.finish == Finish::Stop,
        stages: stages.finish(),
    })
}

fn sampling(temperature: f64) -> Result<Sampling> {
    if !(0.0..=TEMPERATURE_MAX).contains(&temperature) {
        return Err(Error::field("temperature", temperature, format!("0 to {TEMPERATURE_MAX}")));
    }
    if temperature == 0.0 {
        return Ok(Sampling::Greedy);
    }
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    Ok(Sampling::Random { temperature: temperature as f32, top_k: None, top_p: 1.0 })
}
