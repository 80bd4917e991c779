//! Times of the language model of 7B with matrices in Q4_K: a prompt, and an answer token by token, by the
//! operations of a prompt and by prepared kernels; and each kind of kernel on its own.

use std::time::Instant;

use candle_core::{Device, Tensor};

use super::{
    host::{median, range_begins, range_ends},
    report::{Finding, Row},
};
use crate::{
    error::{Error, Result},
    ops::cuda::{DecodeStarts, Format, StoredMatrix, use_decode},
    vlm::{TextConfig, random::RandomLanguageModel},
};

const PART: &str = "language model";
const PROMPT: usize = 512;
const ANSWER: usize = 128;
/// Tokens of an answer by the operations of a prompt, which take long.
const ANSWER_BY_OPERATIONS: usize = 24;
/// Bytes of the copy that memory's speed is told from.
const COPIED: usize = 2 << 30;
/// How far logits may be apart, as a share of their size: two ways of rounding, through all layers.
const APART: f64 = 0.1;

pub(super) fn times(device: &Device, shrink: usize) -> Vec<Row> {
    let mut timed = Timed { device, shrink, rows: Vec::new() };
    let done = timed.all();
    use_decode(DecodeStarts::Whole);
    if let Err(error) = done {
        timed.add("preparation".to_owned(), Finding::failed(&error));
    }
    timed.rows
}

/// Times tokens of a small decoder with their logits: the host's part of one, on a driver that only counts. Each is a
/// range for a profiler.
pub(super) fn of_the_host(device: &Device) -> Vec<Row> {
    const TOKENS: usize = 8;
    const SHRINK: usize = 100;
    let tokens = || -> Result<f64> {
        let config = config(SHRINK);
        let mut blocks = RandomBlocks::new(config.vocab_size * config.hidden_size);
        let mut matrix = |shape| blocks.matrix(shape, device);
        let model = RandomLanguageModel::new(&config, device, &mut matrix)?;
        let (mut writing, _) = model.read(&[1, 2, 3], TOKENS)?;
        let mut seconds = Vec::with_capacity(TOKENS);
        for i in 0..TOKENS {
            range_begins(device);
            let start = Instant::now();
            model.write(&mut writing, token(i, &config))?;
            seconds.push(start.elapsed().as_secs_f64());
            range_ends(device);
        }
        Ok(median(seconds.into_iter()))
    };
    let finding = match tokens() {
        Ok(seconds) => Finding::Timed { seconds, rate: 1.0 / seconds, unit: "tokens/s".into() },
        Err(error) => Finding::failed(&error),
    };
    vec![Row { part: "a token of the host".into(), name: "of a small decoder".into(), finding }]
}

/// Dimensions of Qwen2.5-VL-7B, or small ones.
fn config(shrink: usize) -> TextConfig {
    let full = TextConfig {
        vocab_size: 152_064,
        hidden_size: 3584,
        intermediate_size: 18_944,
        layers: 28,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        mrope_section: vec![16, 24, 24],
        max_position_embeddings: 32_768,
    };
    if shrink == 1 {
        return full;
    }
    TextConfig {
        vocab_size: 300,
        hidden_size: 256,
        intermediate_size: 512,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        mrope_section: vec![8, 12, 12],
        ..full
    }
}

struct Timed<'a> {
    device: &'a Device,
    shrink: usize,
    rows: Vec<Row>,
}

impl Timed<'_> {
    fn add(&mut self, name: String, finding: Finding) {
        self.rows.push(Row { part: PART.into(), name, finding });
    }

    /// Bytes that were read in a time, and what share of memory's speed that is.
    fn rate(&mut self, name: &str, seconds: f64, bytes: usize, copy: f64) {
        let rate = count(bytes) / 1e9 / seconds;
        self.add(name.to_owned(), Finding::Timed { seconds, rate, unit: "GB/s".into() });
        let share =
            Finding::Timed { seconds, rate: 100.0 * rate / copy, unit: "% of a copy".into() };
        self.add(name.to_owned(), share);
    }

    fn all(&mut self) -> Result<()> {
        let copy = self.copy()?;
        let config = config(self.shrink);
        let mut blocks = RandomBlocks::new(
            config.vocab_size.max(config.intermediate_size) * config.hidden_size.max(256),
        );
        let device = self.device;
        let start = Instant::now();
        let model =
            RandomLanguageModel::new(&config, device, &mut |shape| blocks.matrix(shape, device))?;
        device.synchronize()?;
        let seconds = start.elapsed().as_secs_f64();
        self.add(
            "making the weights".to_owned(),
            Finding::Timed { seconds, rate: 1.0 / seconds, unit: "a second".into() },
        );
        let prompt: Vec<u32> =
            (0..PROMPT.div_ceil(self.shrink)).map(|i| token(i, &config)).collect();
        self.prompt(&model, &prompt)?;
        let mut expected = None;
        for (starts, name) in [
            (DecodeStarts::Off, "operations"),
            (DecodeStarts::Single, "kernels one by one"),
            (DecodeStarts::Recorded, "kernels recorded"),
            (DecodeStarts::Overlapping, "kernels recorded, overlapping"),
            (DecodeStarts::Whole, "one kernel"),
        ] {
            use_decode(starts);
            let logits = self.answer(&model, (&prompt, &config), (starts, name), copy)?;
            match &expected {
                None => expected = Some(logits),
                Some(expected) => {
                    let value = apart(&logits, expected);
                    let name = format!("logits of {name} beside those of operations");
                    self.add(name, Finding::Checked { value, limit: APART });
                }
            }
        }
        use_decode(DecodeStarts::Overlapping);
        self.kinds(&model, &prompt, copy)
    }

    /// Memory's speed in GB/s, bytes read and written.
    fn copy(&mut self) -> Result<f64> {
        let bytes = COPIED.div_ceil(self.shrink * self.shrink);
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = self.device {
            // candle's own copy is a kernel that is slower than the driver's.
            let (from, mut to) =
                (device.alloc_zeros::<u8>(bytes)?, device.alloc_zeros::<u8>(bytes)?);
            let seconds = self.median(7, || Ok(device.memcpy_dtod(&from, &mut to)?))?;
            return Ok(self.copied(bytes, seconds));
        }
        let from = Tensor::rand(0.0_f32, 1.0, bytes >> 2, self.device)?;
        let seconds = self.median(7, || {
            let _copy = from.copy()?;
            Ok(())
        })?;
        Ok(self.copied(bytes, seconds))
    }

    fn copied(&mut self, bytes: usize, seconds: f64) -> f64 {
        let rate = 2.0 * count(bytes) / 1e9 / seconds;
        self.add(
            "a device's copy".to_owned(),
            Finding::Timed { seconds, rate, unit: "GB/s".into() },
        );
        rate
    }

    fn median(&self, runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        self.device.synchronize()?;
        let mut seconds = Vec::with_capacity(runs);
        for _ in 0..runs {
            let start = Instant::now();
            work()?;
            self.device.synchronize()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds.get(runs >> 1).copied().unwrap_or(f64::NAN))
    }

    fn prompt(&mut self, model: &RandomLanguageModel, prompt: &[u32]) -> Result<()> {
        let seconds = self.median(2, || model.read(prompt, ANSWER).map(drop))?;
        let rate = count(prompt.len()) / seconds;
        let name = format!("prompt of {} tokens", prompt.len());
        self.add(name, Finding::Timed { seconds, rate, unit: "tokens/s".into() });
        Ok(())
    }

    /// Times an answer whose tokens are chosen, one with logits on the host after each token, and one without, each
    /// right after the prompt; returns the logits after its first tokens.
    fn answer(
        &mut self,
        model: &RandomLanguageModel,
        (prompt, config): (&[u32], &TextConfig),
        (starts, name): (DecodeStarts, &str),
        copy: f64,
    ) -> Result<Vec<f32>> {
        let off = starts == DecodeStarts::Off;
        let tokens = if off { ANSWER_BY_OPERATIONS } else { ANSWER }.div_ceil(self.shrink);
        let (mut writing, _) = model.read(prompt, ANSWER)?;
        let plan = model.plan(&mut writing)?;
        let (recorded, whole) =
            plan.map_or((false, false), |plan| (plan.is_recorded(), plan.is_whole()));
        let (as_one, by_graph) = match starts {
            DecodeStarts::Off | DecodeStarts::Single => (false, false),
            // Devices without copies of rows record.
            DecodeStarts::Whole => (whole, !whole),
            DecodeStarts::Recorded | DecodeStarts::Overlapping => (false, true),
        };
        if self.device.is_cuda() && (recorded, whole) != (by_graph, as_one) {
            let why = "the kernels were not started as asked for".to_owned();
            self.add(name.to_owned(), Finding::Failed(why));
        }
        let mut first = model.write(&mut writing, token(0, config))?.to_vec();
        first.extend_from_slice(model.write(&mut writing, token(1, config))?);
        drop(writing);
        let bytes = weight_bytes(config);
        let each = |until: Until| -> Result<f64> {
            let (mut writing, _) = model.read(prompt, ANSWER + 2)?;
            let writing = &mut writing;
            (0..2).try_for_each(|i| model.write(writing, token(i, config)).map(drop))?;
            self.device.synchronize()?;
            let start = Instant::now();
            for i in 0..tokens {
                let token = token(i, config);
                match until {
                    Until::Queued if model.queue(writing, token)? => {}
                    Until::Queued | Until::Read => _ = model.write(writing, token)?,
                    Until::Chosen => _ = model.choose(writing, token)?,
                }
            }
            self.device.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / count(tokens))
        };
        let with_logits = each(Until::Read)?;
        let without = if off { None } else { Some(each(Until::Queued)?) };
        let chosen = each(Until::Chosen)?;
        let rate = 1.0 / with_logits;
        let what = format!("answer by {name}, a token with its logits");
        self.add(
            what.clone(),
            Finding::Timed { seconds: with_logits, rate, unit: "tokens/s".into() },
        );
        self.rate(&what, with_logits, bytes, copy);
        let mut tokens = |what: &str, seconds: f64| {
            let name = format!("answer by {name}, {what}");
            let finding = Finding::Timed { seconds, rate: 1.0 / seconds, unit: "tokens/s".into() };
            self.add(name, finding);
        };
        tokens("a token chosen by its logits", chosen);
        if let Some(without) = without {
            tokens("what it takes to choose a token, beside one queued", chosen - without);
            self.rate(&format!("answer by {name}, a token queued"), without, bytes, copy);
        }
        Ok(first)
    }

    /// Each kind of kernel on its own: those of all layers, one after the other.
    fn kinds(&mut self, model: &RandomLanguageModel, prompt: &[u32], copy: f64) -> Result<()> {
        let (mut writing, _) = model.read(prompt, ANSWER)?;
        model.queue(&mut writing, 0)?;
        let Some(plan) = model.plan(&mut writing)? else {
            return Err(Error::field("kernels", "none", "a prepared pass"));
        };
        for part in plan.parts()? {
            let seconds = self.median(9_usize.div_ceil(self.shrink), || Ok(part.run()?))?;
            let name = format!("{} of {}", part.kernels, part.name);
            if part.bytes > 0 {
                self.rate(&name, seconds, part.bytes, copy);
            } else {
                let rate = count(part.kernels) / seconds;
                self.add(name, Finding::Timed { seconds, rate, unit: "kernels/s".into() });
            }
        }
        Ok(())
    }
}

/// How far a token is timed.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// Its pass is queued.
    Queued,
    /// Its logits are on the host.
    Read,
    /// The next token is chosen by them.
    Chosen,
}

/// Some token.
fn token(i: usize, config: &TextConfig) -> u32 {
    let token = (7919 * i + 13).checked_rem(config.vocab_size).unwrap_or(0);
    u32::try_from(token).unwrap_or(0)
}

/// Bytes of the matrices that a token needs.
fn weight_bytes(config: &TextConfig) -> usize {
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    let kv_width = config.kv_heads * config.head_dim;
    let layer = 2 * width * width + 2 * kv_width * width + 3 * inner * width;
    let (numbers, bytes) = Format::Q4K.block();
    (config.layers * layer + config.vocab_size * width).div_ceil(numbers) * bytes
}

#[expect(clippy::cast_precision_loss, reason = "an amount")]
fn count(amount: usize) -> f64 {
    amount as f64
}

/// The distance of logits from others, as a share of these.
fn apart(found: &[f32], expected: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = found.iter().zip(expected).map(|(a, b)| (f64::from(*a), f64::from(*b)));
    let apart: f64 = pairs.map(|(a, b)| square(a - b)).sum();
    let size: f64 = expected.iter().map(|x| square(f64::from(*x))).sum();
    (apart / size).sqrt()
}

/// Random blocks of Q4_K on the host, of which every matrix takes another piece.
struct RandomBlocks {
    bytes: Vec<u8>,
    next: usize,
}

impl RandomBlocks {
    /// For matrices of up to so many numbers.
    fn new(numbers: usize) -> Self {
        /// d, and the scale of minimums that makes weights about zero, as half floats: 2⁻¹⁴ and 7.5 · 2⁻¹⁴.
        const SCALES: [u8; 4] = [0x00, 0x04, 0x80, 0x0f];
        let (in_block, block_bytes) = Format::Q4K.block();
        let blocks = numbers.div_ceil(in_block) + 1000;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = Vec::with_capacity(blocks * block_bytes);
        for _ in 0..(blocks * block_bytes).div_ceil(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend(state.to_le_bytes());
        }
        for block in bytes.chunks_exact_mut(block_bytes) {
            if let Some(scales) = block.get_mut(..SCALES.len()) {
                scales.copy_from_slice(&SCALES);
            }
        }
        Self { bytes, next: 0 }
    }

    fn matrix(&mut self, [outs, depth]: [usize; 2], device: &Device) -> Result<StoredMatrix> {
        let (in_block, block_bytes) = Format::Q4K.block();
        let len = (outs * depth).div_ceil(in_block) * block_bytes;
        self.next = (self.next + 37).checked_rem(1000).unwrap_or(0);
        let start = self.next * block_bytes;
        let bytes = self.bytes.get(start..start + len);
        let bytes = bytes.ok_or_else(|| Error::field("matrix", outs * depth, "fewer numbers"))?;
        let bytes = Tensor::from_slice(bytes, len, device)?;
        Ok(StoredMatrix::new(bytes, Format::Q4K, (outs, depth), 1.0)?)
    }
}
