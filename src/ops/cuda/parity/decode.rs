//! A token's pass through a decoder against its definition, over several tokens.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Suite, products::stored, rounded::rounded};
use crate::ops::{
    LinearWeight, PackedLinear,
    cuda::{DecodeLayer, DecodeModel, DecodePlan, DecodeStarts, DecodeToken, Format},
};

/// The sizes and types of a decoder.
struct Case {
    name: &'static str,
    width: usize,
    inner: usize,
    heads: [usize; 3],
    vocab: usize,
    layers: usize,
    /// Of queries, keys, values, attention's end, gate and up, down, head.
    formats: [Format; 7],
    capacity: usize,
    past: usize,
    tokens: usize,
}

const SAME: fn(Format) -> [Format; 7] = |format| [format; 7];

fn cases() -> Vec<Case> {
    let small = Case {
        name: "small",
        width: 64,
        inner: 40,
        heads: [4, 2, 16],
        vocab: 37,
        layers: 2,
        formats: SAME(Format::Bf16),
        capacity: 130,
        past: 62,
        tokens: 3,
    };
    let mixed = [
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::Q8_0,
        Format::Q5K,
        Format::Q6K,
        Format::Q4K,
    ];
    let large = Case { width: 768, inner: 512, heads: [12, 4, 64], vocab: 70, ..small };
    vec![
        Case { name: "bf16", ..small },
        Case { name: "bf16, nothing before", past: 0, ..small },
        Case { name: "bf16, the last place", past: 128, tokens: 2, ..small },
        Case { name: "Q8_0", inner: 96, formats: SAME(Format::Q8_0), past: 127, ..small },
        Case { name: "Q4_K", formats: SAME(Format::Q4K), ..large },
        Case { name: "Q5_K", formats: SAME(Format::Q5K), past: 5, ..large },
        Case { name: "Q6_K", formats: SAME(Format::Q6K), heads: [8, 1, 32], past: 64, ..large },
        Case { name: "mixed", formats: mixed, ..large },
        Case { name: "long shares", capacity: 2300, past: 2174, heads: [3, 3, 16], ..small },
        Case { name: "all shares", capacity: 2048, past: 2045, heads: [6, 1, 32], ..small },
        Case {
            name: "28 heads over 4",
            width: 256,
            inner: 256,
            heads: [28, 4, 128],
            formats: SAME(Format::Q4K),
            layers: 1,
            capacity: 200,
            past: 127,
            ..small
        },
    ]
}

/// Of sizes for which all kernels multiply bytes.
fn cases_by_bytes() -> Vec<Case> {
    let (k4, k6) = (Format::Q4K, Format::Q6K);
    let small = Case {
        name: "Q4_K_M by bytes",
        width: 1024,
        inner: 1536,
        heads: [14, 2, 128],
        vocab: 333,
        layers: 1,
        formats: [k4, k4, k6, k4, k4, k6, k6],
        capacity: 130,
        past: 126,
        tokens: 3,
    };
    let layers = 2;
    vec![
        Case {
            name: "Q6_K by bytes",
            width: 512,
            inner: 512,
            heads: [8, 1, 64],
            layers,
            formats: SAME(k6),
            ..small
        },
        Case {
            name: "Q6_K with rows of whole 16 bytes",
            width: 512,
            inner: 4096,
            heads: [8, 1, 64],
            vocab: 50,
            formats: SAME(k6),
            past: 3,
            tokens: 1,
            ..small
        },
        Case {
            name: "Q8_0 by bytes",
            width: 256,
            inner: 768,
            heads: [8, 4, 32],
            layers,
            formats: SAME(Format::Q8_0),
            past: 63,
            ..small
        },
        // A warp has several tiles of keys, the last token is the only one of its share, and blocks have several shares, also two
        // with the last token one after the other (of five multiprocessors).
        Case {
            name: "Q4_K by bytes, many keys",
            width: 256,
            inner: 256,
            heads: [12, 6, 64],
            vocab: 50,
            layers,
            formats: SAME(k4),
            capacity: 1540,
            past: 1534,
            ..small
        },
        Case {
            name: "Q8_0 and Q4_K by bytes",
            width: 512,
            inner: 256,
            heads: [4, 2, 64],
            formats: [Format::Q8_0, k4, k6, k4, k4, Format::Q8_0, k4],
            past: 0,
            ..small
        },
        small,
    ]
}

pub(super) fn check(suite: &mut Suite) {
    let by_bytes = cases_by_bytes().into_iter().map(|case| (case, true));
    for (case, by_bytes) in cases().into_iter().map(|case| (case, false)).chain(by_bytes) {
        let name = format!("{}, {} tokens after {}", case.name, case.tokens, case.past);
        let decoder = match Decoder::new(suite, &case, by_bytes) {
            Ok(decoder) => decoder,
            Err(error) => {
                suite.judge("decode", &name, Err(error), vec![Ok(super::empty())]);
                continue;
            }
        };
        let expected = decoder.by_definition(DType::F64, Ok).and_then(|exact| {
            let plain =
                super::super::not_emulated(|| decoder.by_definition(DType::F32, |x| rounded(&x)));
            Ok((exact, plain?))
        });
        let orders = suite.orders.clone();
        // By one kernel, where one fits, and by several.
        for (starts, how) in
            [(DecodeStarts::Whole, "by one kernel"), (DecodeStarts::Overlapping, "by kernels")]
        {
            let kernels =
                orders.iter().map(|order| suite.on_kernels(*order, || decoder.by_kernels(starts)));
            let kernels = kernels.collect();
            let expected = expected.as_ref().map(Clone::clone).map_err(candle_core::Error::msg);
            suite.judge("decode", &format!("{name}, {how}"), expected, kernels);
        }
    }
}

/// A matrix as kernels read it, and the numbers it holds.
struct Matrix {
    linear: PackedLinear,
    numbers: Tensor,
    bias: Option<Tensor>,
}

struct Layer {
    norms: [Tensor; 2],
    /// Queries, keys, values, attention's end, gate, up, down.
    matrices: Vec<Matrix>,
    /// Keys and values of earlier tokens `[past, kv_heads, d]`.
    cache: [Tensor; 2],
}

struct Decoder {
    device: Device,
    heads: [usize; 3],
    capacity: usize,
    past: usize,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Matrix,
    /// Rows of the embedding of each token, and its angles' cosines and sines.
    rows: Vec<Tensor>,
    angles: Vec<[Tensor; 2]>,
    /// Whether all products are to multiply bytes.
    by_bytes: bool,
}

const EPS: f64 = 1e-5;

impl Decoder {
    fn new(suite: &mut Suite, case: &Case, by_bytes: bool) -> Result<Self> {
        let Case { width, inner, heads: [heads, kv_heads, d], formats, .. } = *case;
        let device = suite.device.clone();
        let mut matrix = |[outs, depth]: [usize; 2], format, biased: bool| {
            #[expect(clippy::cast_precision_loss, reason = "a width is small")]
            let share = (depth as f64).sqrt().recip();
            let numbers = (suite.random(&[outs, depth]) * share)?;
            let (stored, numbers) = stored(&numbers, format, &device)?;
            let bias = biased.then(|| suite.random(&[outs]));
            let near = |bias: &Tensor| bias.to_dtype(DType::BF16)?.to_device(&device);
            let linear = PackedLinear::stored(stored, bias.as_ref().map(near).transpose()?);
            Ok::<Matrix, candle_core::Error>(Matrix { linear, numbers, bias })
        };
        let mut layers = Vec::new();
        for _ in 0..case.layers {
            let shapes = [
                ([heads * d, width], formats[0], true),
                ([kv_heads * d, width], formats[1], true),
                ([kv_heads * d, width], formats[2], true),
                ([width, heads * d], formats[3], false),
                ([inner, width], formats[4], false),
                ([inner, width], formats[4], false),
                ([width, inner], formats[5], false),
            ];
            let matrices = shapes.map(|(shape, format, biased)| matrix(shape, format, biased));
            let matrices = matrices.into_iter().collect::<Result<Vec<_>>>()?;
            layers.push(matrices);
        }
        let head = matrix([case.vocab, width], formats[6], false)?;
        let layers = layers.into_iter().map(|matrices| Layer {
            norms: [suite.random(&[width]), suite.random(&[width])],
            matrices,
            cache: [(); 2].map(|()| suite.random(&[case.past, kv_heads, d])),
        });
        let layers = layers.collect();
        let norm = suite.random(&[width]);
        let row = |_| suite.random(&[width]).to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let rows = (0..case.tokens).map(row).collect::<Result<_>>()?;
        let angles = (0..case.tokens).map(|_| suite.angles(1, d >> 1)).collect::<Result<_>>()?;
        Ok(Self {
            device,
            heads: case.heads,
            capacity: case.capacity,
            past: case.past,
            layers,
            norm,
            head,
            rows,
            angles,
            by_bytes,
        })
    }

    /// Logits `[tokens, vocab]` of the kernels.
    fn by_kernels(&self, starts: DecodeStarts) -> Result<Tensor> {
        let near = |x: &Tensor| x.to_dtype(DType::BF16)?.to_device(&self.device);
        let [_, kv_heads, d] = self.heads;
        let room = |filled: &Tensor| -> Result<Tensor> {
            // What comes later must not be seen, whatever it is.
            let all = Tensor::full(f32::NAN, (1, self.capacity, kv_heads, d), &self.device)?;
            let all = all.to_dtype(DType::BF16)?;
            if self.past > 0 {
                all.slice_set(&near(filled)?.unsqueeze(0)?, 1, 0)?;
            }
            Ok(all)
        };
        let rooms: Result<Vec<[Tensor; 2]>> = self
            .layers
            .iter()
            .map(|layer| Ok([room(&layer.cache[0])?, room(&layer.cache[1])?]))
            .collect();
        let rooms = rooms?;
        let norms: Result<Vec<[Tensor; 2]>> = self
            .layers
            .iter()
            .map(|layer| Ok([near(&layer.norms[0])?, near(&layer.norms[1])?]))
            .collect();
        let (norms, norm) = (norms?, near(&self.norm)?);
        let layers = self.layers.iter().zip(&norms).zip(&rooms);
        let layers = layers.map(|((layer, norms), room)| {
            let matrix = |i: usize| &layer.matrices[i].linear;
            DecodeLayer {
                norm: &norms[0],
                qkv: [matrix(0), matrix(1), matrix(2)],
                out: matrix(3),
                mlp_norm: &norms[1],
                gate_up: [matrix(4), matrix(5)],
                down: matrix(6),
                cache: room.each_ref(),
            }
        });
        // Rows come from the device where all products multiply bytes, and elsewhere from the host.
        let rows = self.by_bytes.then(|| near(&Tensor::stack(&self.rows, 0)?)).transpose()?;
        let embedding = rows.map(LinearWeight::Dense);
        let model = DecodeModel {
            embedding: embedding.as_ref(),
            layers: layers.collect(),
            norm: &norm,
            head: &self.head.linear,
            eps: EPS,
            heads: self.heads,
        };
        let Some(mut plan) = DecodePlan::started(&model, starts)? else {
            candle_core::bail!("no kernel fits");
        };
        if self.by_bytes && super::super::ffi::limits(&self.device)?.is_hopper {
            let one = starts == DecodeStarts::Whole
                && matches!(d, 64 | 128)
                && self.heads[0] <= 8 * kv_heads;
            if plan.is_whole() != one {
                candle_core::bail!("one kernel: {}, expected: {one}", plan.is_whole());
            }
            let others = ["decode_qkv,", "decode_add,", "decode_gate_up,", "decode_logits,"];
            let parts = plan.parts()?;
            let other = parts.iter().find(|part| others.iter().any(|it| part.name.starts_with(it)));
            if let Some(other) = other {
                candle_core::bail!("{} where bytes are to be multiplied", other.name);
            }
        }
        self.write(&mut plan)
    }

    /// Logits `[tokens, vocab]` of all tokens.
    fn write(&self, plan: &mut DecodePlan) -> Result<Tensor> {
        let mut logits = Vec::new();
        for (i, (row, angles)) in self.rows.iter().zip(&self.angles).enumerate() {
            let row = row.to_vec1::<f32>()?;
            let [cos, sin] = angles;
            let [cos, sin] = [cos, sin].map(|x| x.flatten_all()?.to_vec1::<f32>());
            let (cos, sin) = (cos?, sin?);
            let token = u32::try_from(i).map_err(candle_core::Error::wrap)?;
            let (row, past) = ((!plan.embeds()).then_some(row.as_slice()), self.past + i);
            let token = DecodeToken { token, row, past, angles: [&cos, &sin] };
            logits.push(plan.logits(token)?.to_vec());
        }
        let dims = (logits.len(), logits.first().map_or(0, Vec::len));
        Tensor::from_vec(logits.concat(), dims, &Device::Cpu)
    }

    /// Logits `[tokens, vocab]` in a type, with each intermediate result through `round`.
    fn by_definition(
        &self,
        dtype: DType,
        round: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let as_type = |x: &Tensor| x.to_dtype(dtype);
        let linear = |x: &Tensor, matrix: &Matrix| -> Result<Tensor> {
            let y = round(x.matmul(&round(as_type(&matrix.numbers)?)?.t()?)?)?;
            match &matrix.bias {
                Some(bias) => round(y.broadcast_add(&as_type(bias)?)?),
                None => Ok(y),
            }
        };
        let norm = |x: &Tensor, weight: &Tensor| -> Result<Tensor> {
            let mean = (x.sqr()?.mean_keepdim(D::Minus1)? + EPS)?.sqrt()?;
            round(round(x.broadcast_div(&mean)?)?.broadcast_mul(&as_type(weight)?)?)
        };
        let mut caches: Vec<[Tensor; 2]> = Vec::new();
        for layer in &self.layers {
            caches.push([as_type(&layer.cache[0])?, as_type(&layer.cache[1])?]);
        }
        let [heads, kv_heads, d] = self.heads;
        let mut all = Vec::new();
        for (row, angles) in self.rows.iter().zip(&self.angles) {
            let mut x = as_type(row)?.unsqueeze(0)?; // (1, width)
            let turn = |x: Tensor, heads: usize| -> Result<Tensor> {
                let x = x.reshape((heads, d))?; // (h, d)
                let [cos, sin] = [as_type(&angles[0])?, as_type(&angles[1])?];
                let (cos, sin) = (round(cos)?, round(sin)?);
                let (a, b) = (x.narrow(1, 0, d >> 1)?, x.narrow(1, d >> 1, d >> 1)?);
                let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
                let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
                round(Tensor::cat(&[first, second], 1)?)
            };
            for (layer, cache) in self.layers.iter().zip(&mut caches) {
                let m = &layer.matrices;
                let y = norm(&x, &layer.norms[0])?;
                let q = turn(linear(&y, &m[0])?, heads)?;
                let k = turn(linear(&y, &m[1])?, kv_heads)?.unsqueeze(0)?;
                let v = linear(&y, &m[2])?.reshape((1, kv_heads, d))?; // (1, h_kv, d)
                *cache = [Tensor::cat(&[&cache[0], &k], 0)?, Tensor::cat(&[&cache[1], &v], 0)?];
                let y = attended(&q, cache, &round)?;
                x = round((x + linear(&y, &m[3])?)?)?;
                let y = norm(&x, &layer.norms[1])?;
                let (gate, up) = (linear(&y, &m[4])?, linear(&y, &m[5])?);
                let gate = round((&gate / ((gate.neg()?.exp()? + 1.0)?))?)?;
                x = round((x + linear(&round((gate * up)?)?, &m[6])?)?)?;
            }
            all.push(linear(&norm(&x, &self.norm)?, &self.head)?);
        }
        Tensor::cat(&all, 0)
    }
}

/// Attention of one token's queries `[h, d]` over keys and values `[n, h_kv, d]`, as `[1, h · d]`.
fn attended(
    q: &Tensor,
    [keys, values]: &[Tensor; 2],
    round: &impl Fn(Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (heads, d) = q.dims2()?;
    let group = heads.checked_div(keys.dim(1)?).unwrap_or(1);
    #[expect(clippy::cast_precision_loss, reason = "a head is narrow")]
    let scale = (d as f64).sqrt().recip();
    let mut out = Vec::with_capacity(heads);
    for head in 0..heads {
        let own = |x: &Tensor| {
            x.narrow(1, head.checked_div(group).unwrap_or(0), 1)?.squeeze(1)?.contiguous()
        };
        let (k, v) = (own(keys)?, own(values)?); // (n, d) twice
        let scores = round((round(q.narrow(0, head, 1)?.matmul(&k.t()?)?)? * scale)?)?; // (1, n)
        let weights = scores.broadcast_sub(&scores.max_keepdim(1)?)?.exp()?;
        let weights = round(weights.broadcast_div(&weights.sum_keepdim(1)?)?)?;
        out.push(round(weights.matmul(&v)?)?); // (1, d)
    }
    Tensor::cat(&out, 1)
}
