//! How a picture came about, as its file is to tell.

use std::collections::BTreeMap;

use super::{Engine, ModelInfo};
use crate::{
    pixels::{EditRecord, LoraRecord, ModelRecord, Picture, RECORD_VERSION},
    request::{EditOutcome, EditRequest},
};

impl Engine {
    /// What a file of `outcome`'s picture should say of it: for [`save`](crate::pixels::save).
    #[must_use]
    pub fn record(&self, request: &EditRequest, outcome: &EditOutcome) -> EditRecord {
        EditRecord {
            version: RECORD_VERSION,
            program: EditRecord::this_program(),
            prompt: asked(request, outcome).to_owned(),
            negative_prompt: request.negative_prompt.clone(),
            seed: outcome.seed,
            rng: request.rng.name().to_owned(),
            steps: outcome.steps,
            sampler: "Euler".to_owned(),
            cfg_scale: outcome.cfg_scale,
            strategy: outcome.strategy.name().to_owned(),
            sub_requests: match &outcome.plan {
                Some(plan) => plan.steps.iter().map(|step| step.prompt.clone()).collect(),
                None => Vec::new(),
            },
            model: self.info.record(),
            loras: self
                .loras()
                .iter()
                .map(|lora| LoraRecord {
                    name: lora.name.clone(),
                    strength: lora.strength,
                    modules: lora.modules,
                })
                .collect(),
            working_size: outcome.working_size,
            input_sizes: request.pictures.iter().map(Picture::size).collect(),
            timings_ms: timings(outcome),
        }
    }
}

impl ModelInfo {
    /// The model as records name it.
    #[must_use]
    pub fn record(&self) -> ModelRecord {
        ModelRecord {
            name: self.name.clone(),
            class: self.class.to_owned(),
            digest: Some(self.digest.clone()),
        }
    }
}

/// What was asked for, in words: the prompt, or the request of the plan that was given.
fn asked<'a>(request: &'a EditRequest, outcome: &'a EditOutcome) -> &'a str {
    match &outcome.plan {
        Some(plan) if request.prompt.is_empty() => &plan.request,
        _ => &request.prompt,
    }
}

/// Milliseconds per stage, over all passes.
fn timings(outcome: &EditOutcome) -> BTreeMap<String, u64> {
    let mut timings = BTreeMap::new();
    for report in &outcome.stages {
        let elapsed_ms = u64::try_from(report.elapsed.as_millis()).unwrap_or(u64::MAX);
        *timings.entry(report.stage.name().to_owned()).or_insert(0) += elapsed_ms;
    }
    timings
}
