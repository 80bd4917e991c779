//! How fast each stage of an edit is with a model, on a picture that is made up for it.

use std::time::{Duration, Instant};

use image::{Rgb, RgbImage};
use serde::Serialize;

use super::{Engine, checked::Checked, pass::resized};
use crate::{
    diffusion::at_work,
    error::{Error, Result},
    memory,
    pixels::{Picture, Size},
    progress::{CancelToken, Event, Observer, Stage},
    request::{EditRequest, StageReport, Strategy},
    vlm::{Message, Sampling},
};

/// Version of [`BenchReport`] as JSON.
pub const BENCH_VERSION: u32 = 1;
/// Parts that are measured before the edit.
const PARTS: usize = 3;

/// What is measured.
#[derive(Debug, Clone)]
pub struct BenchRequest {
    /// Width of the picture and of the working size in pixels; `None` is that of a square of the
    /// model's area.
    pub width: Option<u32>,
    /// Height, likewise.
    pub height: Option<u32>,
    /// Denoising steps.
    pub steps: usize,
    /// Tokens of the answer that is written.
    pub answer_tokens: usize,
    /// What the editor is told.
    pub prompt: String,
    /// Stops the measurement.
    pub cancel: CancelToken,
}

impl Default for BenchRequest {
    fn default() -> Self {
        Self {
            width: None,
            height: None,
            steps: 2,
            answer_tokens: 32,
            prompt: "make the house blue and let it be night".to_owned(),
            cancel: CancelToken::new(),
        }
    }
}

/// One row of a [`BenchReport`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchRow {
    /// What was measured.
    pub name: &'static str,
    /// How long it took, once.
    pub seconds: f64,
    /// Tokens that were worked on, where they are counted.
    pub tokens: Option<usize>,
    /// The same, each second; `None` where the clock saw no time pass.
    pub tokens_per_second: Option<f64>,
    /// The highest resident memory of the process up to the end in bytes, where the system says.
    pub peak_resident_bytes: Option<u64>,
}

/// How fast each stage was.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct BenchReport {
    /// [`BENCH_VERSION`].
    pub version: u32,
    /// The model's name.
    pub model: String,
    /// Threads of the computation.
    pub threads: usize,
    /// The size that was denoised.
    pub working_size: Size,
    /// Denoising steps of the edit.
    pub steps: usize,
    /// `load`, `vision`, `prefill`, `answer`, `encode`, `step`, `decode` and `edit`, the whole of
    /// the last four with the prompt's encoding.
    pub rows: Vec<BenchRow>,
}

impl Engine {
    /// Measures each stage once: the vision tower and the language model by themselves, then an
    /// edit without the planner. What is kept of earlier requests is dropped first.
    ///
    /// ```
    /// use pentimento::{BenchRequest, Engine, EngineOptions, ModelSource};
    ///
    /// let engine = Engine::open(&ModelSource::Mini, &EngineOptions::default(), &())?;
    /// let report = engine.bench(&BenchRequest { answer_tokens: 4, ..Default::default() }, &())?;
    /// assert_eq!(report.rows.first().map(|row| row.name), Some("load"));
    /// # Ok::<(), pentimento::Error>(())
    /// ```
    ///
    /// # Errors
    /// A size or a number of steps that the model cannot do, not enough memory, or cancellation.
    pub fn bench(&self, request: &BenchRequest, observer: &dyn Observer) -> Result<BenchReport> {
        let _at_work = at_work();
        self.forget();
        if request.answer_tokens == 0 {
            return Err(Error::field("answer tokens", 0, "at least 1"));
        }
        let side = square_side(self.opened.pipeline.area);
        let (width, height) = (request.width.unwrap_or(side), request.height.unwrap_or(side));
        let mut edit = EditRequest::new(Picture::from_rgb(pattern(width, height)), &request.prompt);
        (edit.width, edit.height) = (request.width, request.height);
        (edit.steps, edit.seed) = (Some(request.steps), Some(1));
        edit.strategy = Strategy::Direct;
        edit.cancel = request.cancel.clone();
        let checked = Checked::new(self, &edit)?;
        let (working_size, seen_size) = (checked.sizes.working, checked.sizes.vision[0]);

        let load = self.load_report();
        let mut rows = vec![BenchRow::new("load", load.elapsed, None)];
        rows[0].peak_resident_bytes = load.peak_resident_bytes;
        self.settle(&edit)?;
        self.before_reading(true)?;
        rows.extend(self.bench_vlm(request, &edit, seen_size, observer)?);
        let begin = Instant::now();
        let outcome = self.edit(&edit, observer)?;
        let whole = begin.elapsed();
        rows.extend(edit_rows(&outcome.stages, outcome.steps));
        rows.push(BenchRow::new("edit", whole, None));
        Ok(BenchReport {
            version: BENCH_VERSION,
            model: self.info.name.clone(),
            threads: rayon::current_num_threads(),
            working_size,
            steps: outcome.steps,
            rows,
        })
    }

    /// The vision tower on the picture, the language model on the prompt with it, and an answer.
    fn bench_vlm(
        &self,
        request: &BenchRequest,
        edit: &EditRequest,
        size: Size,
        observer: &dyn Observer,
    ) -> Result<Vec<BenchRow>> {
        let (vlm, cancel) = (&self.opened.vlm, &request.cancel);
        let begin = Instant::now();
        let tell = |step: usize| {
            let elapsed = begin.elapsed();
            observer.event(&Event::Step { stage: Stage::Measure, step, of: PARTS, elapsed });
        };
        tell(0);
        let seen = vlm.look_unless(&[resized(&edit.pictures[0].rgb, size, cancel)?], cancel)?;
        let tokens = seen.grids().iter().map(|grid| grid.patches()).sum();
        let inputs = vlm.prepare_seen(&self.opened.pipeline.text(&request.prompt, 1), &seen)?;
        let vision = timed(|| vlm.embed_pictures(&inputs, cancel))?;
        let vision = BenchRow::new("vision", vision, Some(tokens));
        tell(1);
        let prefill = timed(|| vlm.hidden_states(&inputs, cancel))?;
        let prefill = BenchRow::new("prefill", prefill, Some(inputs.tokens().len()));
        tell(2);
        let text = vlm.chat(&[Message::user(0, &request.prompt)])?;
        let inputs = vlm.prepare(&text, &[])?;
        let mut options = vlm.generate_options();
        (options.sampling, options.stop_tokens) = (Sampling::Greedy, Vec::new());
        let mut answer = |tokens: usize| -> Result<(Duration, usize)> {
            options.max_new_tokens = tokens;
            let begin = Instant::now();
            let written = vlm.generate(&inputs, &options, cancel, &mut |_| ())?.tokens.len();
            Ok((begin.elapsed(), written))
        };
        // The first call reads the matrix of the logits; the first token comes with the prompt.
        answer(1)?;
        let (first, _) = answer(1)?;
        let (all, written) = answer(1 + request.answer_tokens)?;
        let answer = all.saturating_sub(first);
        observer.event(&Event::StageDone { stage: Stage::Measure, elapsed: begin.elapsed() });
        Ok(vec![vision, prefill, BenchRow::new("answer", answer, Some(written.saturating_sub(1)))])
    }
}

/// The stages of an edit; the loop's time is that of one step.
fn edit_rows(stages: &[StageReport], steps: usize) -> Vec<BenchRow> {
    let row = |(name, stage, share): (&'static str, Stage, usize)| {
        let report = stages.iter().find(|report| report.stage == stage)?;
        let share = u32::try_from(share.max(1)).unwrap_or(u32::MAX);
        let mut row = BenchRow::new(name, report.elapsed.div_f64(f64::from(share)), None);
        row.peak_resident_bytes = report.peak_resident_bytes;
        Some(row)
    };
    let stages = [
        ("encode", Stage::EncodePicture, 1),
        ("step", Stage::Denoise, steps),
        ("decode", Stage::Decode, 1),
    ];
    stages.into_iter().filter_map(row).collect()
}

impl BenchRow {
    #[expect(clippy::cast_precision_loss, reason = "a number of tokens is small")]
    fn new(name: &'static str, elapsed: Duration, tokens: Option<usize>) -> Self {
        let seconds = elapsed.as_secs_f64();
        let speed = tokens.filter(|_| seconds > 0.0).map(|tokens| tokens as f64 / seconds);
        let peak_resident_bytes = memory::peak_resident_bytes();
        Self { name, seconds, tokens, tokens_per_second: speed, peak_resident_bytes }
    }
}

fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<Duration> {
    let begin = Instant::now();
    work()?;
    Ok(begin.elapsed())
}

/// Side of a square of about `area` pixels.
fn square_side(area: u64) -> u32 {
    u32::try_from(area.isqrt()).unwrap_or(u32::MAX)
}

/// Colors that differ everywhere.
fn pattern(width: u32, height: u32) -> RgbImage {
    let level = |x: u32| u8::try_from(x % 256).unwrap_or(u8::MAX);
    RgbImage::from_fn(width, height, |x, y| Rgb([level(x), level(y), level(x * 7 + y * 3)]))
}
