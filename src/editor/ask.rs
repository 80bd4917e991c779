//! A question about pictures.

use super::stages::Stages;
use crate::{
    error::{Error, Result},
    progress::{Event, Observer, Stage},
    request::{AskOutcome, AskRequest},
    vlm::{GenerateOptions, VisionLanguageModel},
};

pub(super) fn run(
    vlm: &VisionLanguageModel,
    request: &AskRequest,
    observer: &dyn Observer,
) -> Result<AskOutcome> {
    if request.question.trim().is_empty() {
        return Err(Error::field("question", "nothing", "a question"));
    }
    let mut stages = Stages::new(observer);
    let pictures: Vec<image::RgbImage> =
        request.pictures.iter().map(|picture| picture.rgb.clone()).collect();
    let text = vlm.chat(&request.question, pictures.len())?;
    let inputs = vlm.prepare(&text, &pictures)?;
    let options = GenerateOptions {
        tokens_max: request.tokens_max,
        temperature: request.temperature,
        seed: request.seed,
        ..GenerateOptions::default()
    };
    let generation = stages.run(Stage::Generate, || {
        vlm.generate(&inputs, &options, &request.cancel, &mut |piece| {
            observer.event(&Event::Text(piece))
        })
    })?;
    Ok(AskOutcome {
        answer: generation.text,
        prompt_tokens: inputs.tokens(),
        answer_tokens: generation.tokens.len(),
        finished: generation.finished,
        stages: stages.finish(),
    })
}
