// One number in, one out: activations, rotation, norms over a picture's channels, one step of the
// sampler. bf16 unless said otherwise, computed in float32 and rounded once.
//
// activate: f(x), f of Activation below; with `up`, f(x) * up. Each thread has two pieces of 8 numbers.
//   Grid: (pieces / 512, 1, 1); 256 threads. Bound by reading and writing: 3924 GB/s for GELU and 4176 for
//   SwiGLU on an H200, 1986 for the GELU by erf. Tried: one number at a time, 866.
// rotate: pairs (x0, x1), (x2, x3), .. or halves (x[i], x[i + d / 2]) of x: [b * n][h][d], turned by the
//   angles [n][d / 2], which are float32 or bf16. Grid: (pairs / 256, 1, 1); 256 threads.
// channel_norm: x / max(|x|, 1e-12) * sqrt(channels) * gamma over the channels of [b][channels][pixels],
//   and SiLU of it if asked. Grid: (pixels / 32, 1, b); 256 threads: 32 pixels, 8 shares of channels.
// guided_step: latents + step * v in float32, [b * n][width] with width at most 64 * 32. Without a
//   negative prediction v is the positive one. With it, v = negative + scale * (positive - negative),
//   rescaled in each row to the length of the positive one. Grid: (rows / 4, 1, 1); 128 threads: a
//   warp for each row.
#include "device.cuh"

enum Activation { GELU_TANH = 1, GELU_ERF = 2, SILU = 3 };

DEVICE float activated(float x, int64_t kind) {
  switch (kind) {
    case GELU_TANH:
      // x (1 + tanh u) / 2 = x sigmoid(2 u), which does not cancel for negative x.
      return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
    case GELU_ERF:
      return 0.5f * x * erfcf(-0.7071067811865476f * x);
    case SILU:
      return x * sigmoid(x);
    default:
      return x;
  }
}

struct ActivateArgs {
  const bf16* x;   // [count], at a multiple of 16 bytes, as the others
  const bf16* up;  // [count], or null
  bf16* out;
  int64_t count;
  int64_t kind;
};

template <int KIND, bool GATED>
DEVICE void activate_pieces(const ActivateArgs& args) {
  constexpr int PIECES = 2;
  int64_t at[PIECES];
  Words x[PIECES], up[PIECES];
  UNROLL
  for (int i = 0; i < PIECES; ++i) {
    at[i] = 8 * ((PIECES * block_x() + i) * block_threads() + thread_index());
    if (at[i] + 8 > args.count) continue;
    x[i] = load_words(args.x + at[i]);
    if (GATED) up[i] = load_words(args.up + at[i]);
  }
  UNROLL
  for (int i = 0; i < PIECES; ++i) {
    if (at[i] + 8 <= args.count) {
      Words out;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        float low = activated(low_float(x[i].at[j]), KIND);
        float high = activated(high_float(x[i].at[j]), KIND);
        if (GATED) {
          low *= low_float(up[i].at[j]);
          high *= high_float(up[i].at[j]);
        }
        out.at[j] = pack_bf16(low, high);
      }
      store_words(args.out + at[i], out);
      continue;
    }
    for (int64_t j = at[i]; j < args.count; ++j) {
      const float y = activated(to_float(args.x[j]), KIND);
      args.out[j] = from_float<bf16>(GATED ? y * to_float(args.up[j]) : y);
    }
  }
}

KERNEL(activate, ActivateArgs, 256, 6) {
  // The same for all threads, so that each kind has a loop of its own.
  const bool gated = args.up != nullptr;
  switch (args.kind) {
    case GELU_TANH:
      return gated ? activate_pieces<GELU_TANH, true>(args) : activate_pieces<GELU_TANH, false>(args);
    case GELU_ERF:
      return gated ? activate_pieces<GELU_ERF, true>(args) : activate_pieces<GELU_ERF, false>(args);
    case SILU:
      return gated ? activate_pieces<SILU, true>(args) : activate_pieces<SILU, false>(args);
  }
}

struct RotateArgs {
  const bf16* x;
  bf16* out;
  const void* cos;
  const void* sin;
  int64_t angles_are_float;
  int64_t count;         // b * n * h * d
  int64_t tokens, heads, width;
  int64_t halves;
};

KERNEL(rotate, RotateArgs, 256, 1) {
  const int64_t i = block_x() * block_threads() + thread_index();
  if (i >= args.count / 2) return;
  const int64_t half = args.width / 2, pair = i % half, head = i / half;
  const int64_t token = head / args.heads % args.tokens, angle = token * half + pair;
  const int64_t first = head * args.width + (args.halves ? pair : 2 * pair);
  const int64_t second = first + (args.halves ? half : 1);
  float cos, sin;
  if (args.angles_are_float) {
    cos = static_cast<const float*>(args.cos)[angle];
    sin = static_cast<const float*>(args.sin)[angle];
  } else {
    cos = to_float(static_cast<const bf16*>(args.cos)[angle]);
    sin = to_float(static_cast<const bf16*>(args.sin)[angle]);
  }
  const float a = to_float(args.x[first]), b = to_float(args.x[second]);
  args.out[first] = from_float<bf16>(a * cos - b * sin);
  args.out[second] = from_float<bf16>(b * cos + a * sin);
}

struct ChannelArgs {
  const bf16* x;      // [b][channels][pixels]
  const void* gamma;  // [channels]
  int64_t gamma_is_float;
  bf16* out;
  int64_t channels, pixels;
  int64_t silu;
};

KERNEL(channel_norm, ChannelArgs, 256, 1) {
  constexpr int SHARES = 8;
  float* sums = reinterpret_cast<float*>(shared_memory());  // [share][32]
  const int64_t pixel = block_x() * 32 + lane();
  const bool there = pixel < args.pixels;
  const int64_t at = block_z() * args.channels * args.pixels + pixel;
  float squares = 0.0f;
  for (int64_t c = warp(); there && c < args.channels; c += SHARES) {
    const float x = to_float(args.x[at + c * args.pixels]);
    squares += x * x;
  }
  sums[32 * warp() + lane()] = squares;
  block_barrier();
  if (!there) return;
  float sum = 0.0f;
  for (int i = 0; i < SHARES; ++i) sum += sums[32 * i + lane()];
  const float length = sqrtf(sum);
  // Not a maximum, which would hide NaN.
  const float factor = sqrtf(float(args.channels)) / (length < 1e-12f ? 1e-12f : length);
  for (int64_t c = warp(); c < args.channels; c += SHARES) {
    const float gamma = args.gamma_is_float ? static_cast<const float*>(args.gamma)[c]
                                            : to_float(static_cast<const bf16*>(args.gamma)[c]);
    const float y = to_float(args.x[at + c * args.pixels]) * factor * gamma;
    args.out[at + c * args.pixels] = from_float<bf16>(args.silu ? y * sigmoid(y) : y);
  }
}

struct StepArgs {
  const float* latents;
  const float* positive;
  const float* negative;  // or null
  float* out;
  int64_t rows, width;
  double scale, step;
};

KERNEL(guided_step, StepArgs, 128, 1) {
  const int64_t row = block_x() * 4 + warp();
  if (row >= args.rows) return;
  const float scale = float(args.scale), step = float(args.step);
  const int64_t at = row * args.width;
  float ratio = 1.0f;
  auto velocity = [&](int64_t i) {
    const float positive = args.positive[at + i];
    if (!args.negative) return positive;
    return args.negative[at + i] + scale * (positive - args.negative[at + i]);
  };
  if (args.negative) {
    float wanted = 0.0f, found = 0.0f;
    for (int64_t i = lane(); i < args.width; i += 32) {
      const float v = velocity(i);
      wanted += args.positive[at + i] * args.positive[at + i];
      found += v * v;
    }
    wanted = sum_lanes(wanted, 32);
    found = sum_lanes(found, 32);
    ratio = sqrtf(wanted) / sqrtf(found);
  }
  for (int64_t i = lane(); i < args.width; i += 32) {
    args.out[at + i] = args.latents[at + i] + step * (velocity(i) * ratio);
  }
}
