//! The whole model: text and pictures in; hidden states, logits or an answer out.

use std::{
    ops::Range,
    sync::{Arc, OnceLock},
};

use candle_core::{Device, Tensor};
use image::RgbImage;

use super::{
    adapter::{Adapter, Call},
    cache::Cache,
    config::Config,
    constraint::{Constraint, Vocabulary},
    decode::{Decoder, Pending, last_logits},
    generate::{Finish, GenerateOptions, Generation},
    language::LanguageModel,
    names,
    positions::{Positions, small},
    preprocess::{PatchGrid, Patches, Preprocessor},
    seen::Seen,
    template::{ChatTemplate, Message},
    tokenizer::Tokenizer,
    vision::VisionTower,
};
use crate::{
    error::{Error, ModelError, RequestError, Result},
    layers::Linear,
    memory::Slot,
    ops,
    progress::CancelToken,
    weights::{ModelFiles, Precision, Weights},
};

/// The token that stands for a picture in a prompt.
pub const IMAGE_PLACEHOLDER: &str = "<|image_pad|>";
/// Tensors that may be in a checkpoint and are not read while loading: the head is read when logits
/// are first asked for, and frequencies are computed.
const IGNORED: &[&str] = &["lm_head.weight", "visual.rotary_pos_emb.inv_freq"];
/// Tokens of an answer that the cache makes room for before it has to grow.
pub(super) const CACHE_TOKENS: usize = 512;
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// A prompt and its pictures, ready for the model.
#[derive(Debug, Clone)]
pub struct Inputs {
    tokens: Vec<u32>,
    positions: Positions,
    seen: Seen,
    /// The tokens that each picture takes.
    spans: Vec<Range<usize>>,
}

impl Inputs {
    /// The prompt's tokens, with as many placeholders for each picture as it has tokens.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Where each token stands.
    #[must_use]
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The pictures' patches; `None` without a picture.
    #[must_use]
    pub fn patches(&self) -> Option<&Patches> {
        self.seen.patches()
    }

    /// The same inputs with the tokens of an answer after them, for judging an answer that is known.
    #[must_use]
    pub fn with_answer(mut self, answer: &[u32]) -> Self {
        self.tokens.extend(answer);
        for _ in answer {
            self.positions.tokens.push([self.positions.next; 3]);
            self.positions.next += 1;
        }
        self
    }

    /// The first `count` tokens, pictures among them.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    pub(super) fn cut(mut self, count: usize) -> Self {
        self.tokens.truncate(count);
        self.positions.tokens.truncate(count);
        self
    }

    /// The same inputs with every token, pictures included, at its index on all three axes.
    ///
    /// The editing pipelines of diffusers leave out the token types from which transformers 5 works
    /// out picture positions, so this is what their text encoder computes with.
    #[must_use]
    pub fn with_sequential_positions(mut self) -> Self {
        self.positions = Positions::sequential(small(self.tokens.len()));
        self
    }
}

/// Qwen2.5-VL: text and pictures to hidden states, logits and answers.
///
/// The matrix of the logits is read when they are first asked for, so an encoder never holds it.
#[derive(Debug)]
pub struct VisionLanguageModel {
    config: Config,
    defaults: GenerateOptions,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    preprocessor: Preprocessor,
    weights: Weights,
    body: Slot<Body>,
    vocabulary: OnceLock<Vocabulary>,
    /// Tells pictures that this model has looked at from those of another.
    identity: Arc<()>,
}

/// What is large in the model: all that is computed with its weights.
#[derive(Debug)]
pub(super) struct Body {
    vision: VisionTower,
    pub(super) language: LanguageModel,
    head: OnceLock<Linear>,
}

impl VisionLanguageModel {
    /// Reads the model in `folder` (`text_encoder` in a pipeline's folder, `.` where everything is
    /// at the top) with the tokenizer in `tokenizer/`, `processor/` or `folder` and the picture
    /// settings in `processor/` or `folder`.
    ///
    /// # Errors
    /// Files that are missing, damaged, of another model, or that contradict each other.
    pub fn load(files: &ModelFiles, folder: &str, precision: &Precision) -> Result<Self> {
        let model = Self::open(files, folder, precision)?;
        model.fill(&precision.cancel)?;
        Ok(model)
    }

    /// As [`Self::load`], without the weights: they are read when they are first needed, or by
    /// [`Self::fill`].
    ///
    /// # Errors
    /// As [`Self::load`], but for tensors.
    pub fn open(files: &ModelFiles, folder: &str, precision: &Precision) -> Result<Self> {
        let config_path = format!("{folder}/config.json");
        let config = Config::load(files, &config_path)?;
        let tokenizer = Tokenizer::load(files, &["tokenizer", "processor", folder])?;
        check_tokens(files, &config_path, &config, &tokenizer)?;
        let checkpoint = names::canonical(files.checkpoint(folder, "model")?)?;
        let weights = Weights::new(checkpoint, precision.clone());
        let model = Self {
            defaults: GenerateOptions::load(files, folder, &config)?,
            template: ChatTemplate::load(files, &["processor", "tokenizer", folder])?,
            preprocessor: Preprocessor::load(files, &["processor", folder], &config.vision)?,
            config,
            tokenizer,
            weights,
            body: Slot::default(),
            vocabulary: OnceLock::new(),
            identity: Arc::new(()),
        };
        model.check_head()?;
        Ok(model)
    }

    /// Reads the weights where they are not in memory.
    ///
    /// # Errors
    /// Tensors that are missing, left over or of another shape; cancellation.
    pub fn fill(&self, cancel: &CancelToken) -> Result<()> {
        self.body(cancel).map(drop)
    }

    /// Drops the weights from memory; they are read again when they are next needed. Pictures that
    /// the model has looked at, prompts and adapters stay good.
    pub fn release(&self) {
        self.body.clear();
    }

    /// Whether the weights are in memory.
    #[must_use]
    pub fn is_in_memory(&self) -> bool {
        self.body.is_full()
    }

    pub(super) fn body(&self, cancel: &CancelToken) -> Result<Arc<Body>> {
        self.body.get_or(|| {
            let (config, weights) = (&self.config, self.weights.with_cancel(cancel));
            let vision =
                VisionTower::load(&config.vision, &weights.pp("visual"), config.text.hidden_size)?;
            let language = LanguageModel::load(&config.text, &weights.pp("model"))?;
            weights.finish(IGNORED)?;
            Ok(Body { vision, language, head: OnceLock::new() })
        })
    }

    /// Reads a low-rank adapter of the language model, to be named in the [`Call`]s that it is for.
    ///
    /// # Errors
    /// As [`Adapter::load`].
    pub fn load_adapter(&self, files: &ModelFiles, folder: &str) -> Result<Adapter> {
        Adapter::load(files, folder, &self.config.text, self.weights.precision())
    }

    /// Where it computes.
    pub(crate) fn device(&self) -> &Device {
        &self.weights.precision().device
    }

    /// The model's dimensions.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The model's vocabulary.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(super) fn weights(&self) -> &Weights {
        &self.weights
    }

    /// How pictures become patches.
    #[must_use]
    pub fn preprocessor(&self) -> &Preprocessor {
        &self.preprocessor
    }

    /// How the model's makers let it answer.
    #[must_use]
    pub fn generate_options(&self) -> GenerateOptions {
        self.defaults.clone()
    }

    /// The prompt of a conversation, ending where the model is to answer.
    ///
    /// # Errors
    /// Messages that the model's template refuses.
    pub fn chat(&self, messages: &[Message]) -> Result<String> {
        self.template.render(messages)
    }

    /// Cuts `pictures` into patches, for any number of prompts about them; their tokens are
    /// computed when the first prompt needs them, and once.
    ///
    /// # Errors
    /// A picture that cannot be resized.
    pub fn look(&self, pictures: &[RgbImage]) -> Result<Seen> {
        self.look_unless(pictures, &CancelToken::new())
    }

    /// [`Self::look`], which stops when `cancel` says so.
    ///
    /// # Errors
    /// As [`Self::look`], and cancellation.
    pub fn look_unless(&self, pictures: &[RgbImage], cancel: &CancelToken) -> Result<Seen> {
        let merge = self.config.vision.merge_size;
        let grids: Result<Vec<PatchGrid>> = pictures
            .iter()
            .map(|picture| {
                let grid = self.preprocessor.grid(picture.width(), picture.height())?;
                Ok(grid.merged(merge))
            })
            .collect();
        Ok(Seen::new(&self.identity, grids?, self.preprocessor.patches_unless(pictures, cancel)?))
    }

    /// Tokenizes `text` and cuts `pictures` into patches. Each [`IMAGE_PLACEHOLDER`] in `text`
    /// stands for the next picture.
    ///
    /// # Errors
    /// A text without tokens, more or fewer placeholders than pictures, a picture that cannot be
    /// resized, or more tokens than the model has positions.
    pub fn prepare(&self, text: &str, pictures: &[RgbImage]) -> Result<Inputs> {
        self.prepare_seen(text, &self.look(pictures)?)
    }

    /// [`Self::prepare`] for pictures that this model has looked at before.
    ///
    /// # Errors
    /// As [`Self::prepare`], and pictures that another model has looked at.
    pub fn prepare_seen(&self, text: &str, seen: &Seen) -> Result<Inputs> {
        if !seen.is_of(&self.identity) {
            return Err(Error::field("pictures", "seen by another model", "this model's"));
        }
        let written = self.tokenizer.encode(text)?;
        if written.is_empty() {
            return Err(Error::field("prompt", "no text", "at least one character"));
        }
        let image_token = self.config.image_token_id;
        let placeholders = written.iter().filter(|token| **token == image_token).count();
        if placeholders != seen.grids().len() {
            let found = format!("{placeholders} × {IMAGE_PLACEHOLDER}");
            let expected = format!("one for each of the {} pictures", seen.grids().len());
            return Err(Error::field("prompt", found, expected));
        }
        let picture_tokens: usize = seen.grids().iter().map(|grid| grid.patches()).sum();
        let count = written.len() - placeholders + picture_tokens;
        self.check_length(count, picture_tokens)?;
        let (tokens, spans) = expand(&written, image_token, seen.grids());
        let spans_and_grids: Vec<_> =
            spans.iter().cloned().zip(seen.grids().iter().copied()).collect();
        let positions = Positions::multimodal(tokens.len(), &spans_and_grids);
        Ok(Inputs { tokens, positions, seen: seen.clone(), spans })
    }

    /// Tokens of the pictures `[tokens, hidden]`, one picture after the other; `None` without a
    /// picture.
    ///
    /// # Errors
    /// Cancellation, or a failure of the device.
    pub fn vision_embeddings(
        &self,
        inputs: &Inputs,
        cancel: &CancelToken,
    ) -> Result<Option<Tensor>> {
        let Some(patches) = inputs.patches() else { return Ok(None) };
        Ok(Some(self.body(cancel)?.vision.forward(patches, cancel)?.squeeze(0)?))
    }

    /// Runs the vision tower on the prompt's pictures, unless it has run for them; what it says is
    /// kept with them.
    ///
    /// # Errors
    /// Cancellation, or a failure of the device.
    pub fn embed_pictures(&self, inputs: &Inputs, cancel: &CancelToken) -> Result<()> {
        inputs.seen.embeddings(|| self.vision_embeddings(inputs, cancel))?;
        Ok(())
    }

    /// Hidden states after the final norm, `[1, n, hidden]`: the last of the reference's
    /// `hidden_states`.
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    pub fn hidden_states<'a>(&self, inputs: &Inputs, call: impl Into<Call<'a>>) -> Result<Tensor> {
        self.prefill(inputs, None, call.into())
    }

    /// Logits of every token, `[1, n, vocabulary]`.
    ///
    /// # Errors
    /// Cancellation, an adapter of another model, or a failure of the device.
    pub fn logits<'a>(&self, inputs: &Inputs, call: impl Into<Call<'a>>) -> Result<Tensor> {
        let call = call.into();
        let hidden = self.hidden_states(inputs, call)?;
        Ok(self.head(&*self.body(call.cancel)?)?.forward(&hidden)?)
    }

    /// A constraint that lets an answer be only what `grammar` derives: Lark in llguidance's
    /// dialect, <https://github.com/guidance-ai/llguidance/blob/v1.9.1/docs/syntax.md>.
    ///
    /// # Errors
    /// A grammar that cannot be parsed.
    pub fn constraint(&self, grammar: &str) -> Result<Constraint> {
        let vocabulary = match self.vocabulary.get() {
            Some(vocabulary) => vocabulary,
            None => {
                let built = Vocabulary::new(
                    &self.tokenizer,
                    self.config.text.vocab_size,
                    &self.defaults.stop_tokens,
                )?;
                self.vocabulary.get_or_init(|| built)
            }
        };
        vocabulary.constraint(grammar)
    }

    /// Writes an answer; `on_text` hears each piece of text as soon as its characters are whole.
    ///
    /// # Errors
    /// Options outside their range, cancellation (looked at before each layer of each token), an
    /// adapter of another model, logits that are not finite, or a failure of the device.
    pub fn generate<'a>(
        &self,
        inputs: &Inputs,
        options: &GenerateOptions,
        call: impl Into<Call<'a>>,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Generation> {
        self.generate_within(inputs, options, None, call.into(), on_text)
    }

    /// [`Self::generate`] where each token is chosen among those that the constraint allows.
    ///
    /// # Errors
    /// As [`Self::generate`], and a constraint of another vocabulary.
    pub fn generate_within(
        &self,
        inputs: &Inputs,
        options: &GenerateOptions,
        mut constraint: Option<&mut Constraint>,
        call: Call<'_>,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Generation> {
        let mut sampler = options.sampler()?;
        let mut seen = inputs.tokens.clone();
        let room = self.config.text.max_position_embeddings.saturating_sub(seen.len());
        let steps = options.max_new_tokens.min(room);
        let body = self.body(call.cancel)?;
        let mut cache = body.language.cache(seen.len() + steps.min(CACHE_TOKENS));
        let hidden = self.prefill(inputs, Some(&mut cache), call)?;
        let head = self.head(&body)?;
        let model = (&body.language, head);
        let mut pending = Pending::There(last_logits(head, &hidden)?);
        let mut decoder = Decoder::default();
        let mut text = String::new();
        let mut stream = self.tokenizer.stream();
        let mut finish = Finish::Length;
        for step in 0..steps {
            // What may come next is looked up while the device computes.
            let allowed = match &mut constraint {
                Some(constraint) => Some(constraint.allowed()?),
                None => None,
            };
            let logits = decoder.finish(pending, model, &mut cache, call)?;
            let token = sampler.choose(logits, &seen, allowed.as_ref())?;
            seen.push(token);
            if options.stop_tokens.contains(&token) {
                finish = Finish::Stop;
                break;
            }
            let mut is_complete = false; // nothing may follow but the end
            if let Some(constraint) = &mut constraint {
                constraint.accept(token)?;
                is_complete = constraint.is_complete();
            }
            // The device has its next token before anyone hears of this one. Where it cannot have one, as the
            // request is cancelled, this one is heard of all the same.
            let next = (step + 1 < steps && !is_complete).then(|| {
                decoder.start(model, (token, inputs.positions.next + small(step)), &mut cache, call)
            });
            hear(&stream.push(token)?, &mut text, on_text);
            if is_complete {
                finish = Finish::Stop;
            }
            let Some(next) = next.transpose()? else { break };
            pending = next;
        }
        hear(&stream.finish()?, &mut text, on_text);
        Ok(Generation { tokens: seen.split_off(inputs.tokens.len()), text, finish })
    }

    /// Hidden states of a prompt; fills `cache` when there is one.
    pub(super) fn prefill(
        &self,
        inputs: &Inputs,
        cache: Option<&mut Cache>,
        call: Call<'_>,
    ) -> Result<Tensor> {
        let vision = inputs.seen.embeddings(|| self.vision_embeddings(inputs, call.cancel))?;
        let language = &self.body(call.cancel)?.language;
        let mut embeddings = language.embed(&inputs.tokens)?;
        if let Some(vision) = vision {
            embeddings = insert(&embeddings, &vision.unsqueeze(0)?, &inputs.spans)?;
        }
        ops::on_worker(|| language.forward(&embeddings, &inputs.positions.tokens, cache, call))
    }

    /// The matrix that makes logits, read when first asked for.
    pub(super) fn head<'a>(&self, body: &'a Body) -> Result<&'a Linear> {
        if let Some(head) = body.head.get() {
            return Ok(head);
        }
        let (width, vocab) = (self.config.text.hidden_size, self.config.text.vocab_size);
        let name = self.head_name().trim_end_matches(".weight");
        let head = Linear::load_without_bias(&self.weights.pp(name), width, vocab)?;
        Ok(body.head.get_or_init(|| head))
    }

    /// Tied models that have a matrix of their own for the logits all the same use it, as the
    /// reference does.
    pub(super) fn head_name(&self) -> &'static str {
        let tied = self.config.tie_word_embeddings && !self.weights.contains(HEAD);
        if tied { EMBEDDING } else { HEAD }
    }

    /// Checks that the matrix of the logits is there and fits, without reading it.
    fn check_head(&self) -> Result<()> {
        let name = self.head_name();
        let checkpoint = self.weights.checkpoint();
        let expected = vec![self.config.text.vocab_size, self.config.text.hidden_size];
        let path = checkpoint.name().to_owned();
        match checkpoint.tensors().find(|(found, _)| *found == name) {
            None => {
                let near = " (needed unless tie_word_embeddings is true)".to_owned();
                Err(ModelError::TensorMissing { path, tensor: name.to_owned(), near }.into())
            }
            Some((_, entry)) if entry.shape != expected => {
                let (tensor, found) = (name.to_owned(), entry.shape.clone());
                Err(ModelError::TensorShape { path, tensor, found, expected }.into())
            }
            Some(_) => Ok(()),
        }
    }

    fn check_length(&self, count: usize, picture_tokens: usize) -> Result<()> {
        let max = self.config.text.max_position_embeddings;
        if count <= max {
            return Ok(());
        }
        let found = format!("{count} tokens, {picture_tokens} of them for pictures");
        let expected = format!("at most {max} tokens; shorten the text or shrink the pictures");
        Err(RequestError::Field { field: "prompt", found, expected }.into())
    }
}

/// The tokenizer and the config must mean the same picture token, and every token must have an
/// embedding.
fn check_tokens(
    files: &ModelFiles,
    config_path: &str,
    config: &Config,
    tokenizer: &Tokenizer,
) -> Result<()> {
    let found = tokenizer.id(IMAGE_PLACEHOLDER);
    if found != Some(config.image_token_id) {
        let found = found.map_or_else(|| "no such token".to_owned(), |id| id.to_string());
        let expected = format!("{found}, the tokenizer's id of {IMAGE_PLACEHOLDER}");
        return Err(files.config(config_path, "image_token_id", config.image_token_id, expected));
    }
    if tokenizer.id_end() as usize > config.text.vocab_size {
        let expected = format!("at least {}, the tokenizer's vocabulary", tokenizer.id_end());
        return Err(files.config(config_path, "vocab_size", config.text.vocab_size, expected));
    }
    Ok(())
}

/// Repeats each placeholder as often as its picture has tokens; returns the tokens and the
/// pictures' places among them.
fn expand(
    written: &[u32],
    image_token: u32,
    pictures: &[PatchGrid],
) -> (Vec<u32>, Vec<Range<usize>>) {
    let mut tokens = Vec::with_capacity(written.len());
    let mut spans = Vec::with_capacity(pictures.len());
    let mut grids = pictures.iter();
    for &token in written {
        let repeat =
            if token == image_token { grids.next().map(|grid| grid.patches()) } else { None };
        if let Some(count) = repeat {
            let start = tokens.len();
            tokens.resize(start + count, image_token);
            spans.push(start..tokens.len());
        } else {
            tokens.push(token);
        }
    }
    (tokens, spans)
}

/// Puts the pictures' embeddings `[1, m, hidden]` in their places among `[1, n, hidden]`.
fn insert(text: &Tensor, vision: &Tensor, spans: &[Range<usize>]) -> Result<Tensor> {
    let mut parts = Vec::with_capacity(2 * spans.len() + 1);
    let (mut text_at, mut vision_at) = (0, 0);
    for span in spans {
        parts.push(text.narrow(1, text_at, span.start - text_at)?);
        parts.push(vision.narrow(1, vision_at, span.len())?);
        text_at = span.end;
        vision_at += span.len();
    }
    parts.push(text.narrow(1, text_at, text.dim(1)? - text_at)?);
    parts.retain(|part| part.elem_count() > 0);
    Ok(Tensor::cat(&parts, 1)?)
}

fn hear(piece: &str, text: &mut String, on_text: &mut dyn FnMut(&str)) {
    if !piece.is_empty() {
        text.push_str(piece);
        on_text(piece);
    }
}
