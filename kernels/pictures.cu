// What an autoencoder does to pictures between its convolutions, with channels side by side as conv.cuh has
// them.
//
// pixel_norm: x / max(|x|, 1e-12) * sqrt(channels) * gamma over the channels of each pixel, and SiLU of it
//   if asked. Neighbouring lanes share a pixel, so that each has at most three pieces of 16 bytes, which it
//   keeps between the sum and the result; of more than 768 channels the others are read twice. Bound by
//   reading and writing: 2800 to 3600 GB/s on an H200. Grid: (pixels / (256 / lanes), 1, 1); 256 threads.
// pixels_of_planes: [b][channels][pixels] to [b][pixels][channels up to a multiple of 8], zeros there.
// planes_of_pixels: the way back. A thread moves 8 channels of a pixel.
//   Grid: (pixels / 256, groups of 8 channels, b); 256 threads.
#include "conv.cuh"

struct PixelNormArgs {
  const bf16* x;      // [pixels][stored], zeros after `channels`
  const void* gamma;  // [stored], likewise
  int64_t gamma_is_float;
  bf16* out;          // [pixels][stored]
  int64_t channels, stored, pixels;
  int64_t lanes;      // that share a pixel
  int64_t silu;
};

KERNEL(pixel_norm, PixelNormArgs, 256, 4) {
  constexpr int HELD = 3;
  const int lanes = int(args.lanes), own = thread_index() & (lanes - 1);
  const int pieces = int(args.stored) / 8;
  const int64_t pixel = block_x() * (block_threads() / lanes) + thread_index() / lanes;
  const bool there = pixel < args.pixels;
  const bf16* x = args.x + (there ? pixel : 0) * args.stored;
  Words held[HELD];
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    const int piece = own + i * lanes;
    held[i] = {{0, 0, 0, 0}};
    if (piece < pieces) held[i] = load_words(x + 8 * piece);
  }
  float squares = 0.0f;
  auto add = [&](const Words& words) {
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const float low = low_float(words.at[j]), high = high_float(words.at[j]);
      squares += low * low + high * high;
    }
  };
  UNROLL
  for (int i = 0; i < HELD; ++i) add(held[i]);
  for (int piece = own + HELD * lanes; piece < pieces; piece += lanes) add(load_words(x + 8 * piece));
  const float factor = channel_factor(sum_lanes(squares, lanes), args.channels);
  if (!there) return;
  auto finish = [&](const Words& words, int piece) {
    float gamma[8];
    if (args.gamma_is_float) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const Words from = load_words(static_cast<const float*>(args.gamma) + 8 * piece + 4 * half);
        UNROLL
        for (int j = 0; j < 4; ++j) gamma[4 * half + j] = bits_to_float(from.at[j]);
      }
    } else {
      const Words from = load_words(static_cast<const bf16*>(args.gamma) + 8 * piece);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        gamma[2 * j] = low_float(from.at[j]);
        gamma[2 * j + 1] = high_float(from.at[j]);
      }
    }
    Words out;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      float y[2] = {low_float(words.at[j]) * factor * gamma[2 * j],
                    high_float(words.at[j]) * factor * gamma[2 * j + 1]};
      UNROLL
      for (int i = 0; i < 2; ++i) y[i] = args.silu ? y[i] * sigmoid(y[i]) : y[i];
      out.at[j] = pack_bf16(y[0], y[1]);
    }
    store_words(args.out + pixel * args.stored + 8 * piece, out);
  };
  UNROLL
  for (int i = 0; i < HELD; ++i) {
    const int piece = own + i * lanes;
    if (piece < pieces) finish(held[i], piece);
  }
  for (int piece = own + HELD * lanes; piece < pieces; piece += lanes) {
    finish(load_words(x + 8 * piece), piece);
  }
}

struct PlanesArgs {
  const bf16* from;
  bf16* to;
  int64_t channels, pixels;
};

KERNEL(pixels_of_planes, PlanesArgs, 256, 1) {
  const int64_t pixel = block_x() * block_threads() + thread_index();
  if (pixel >= args.pixels) return;
  const int64_t stored = (args.channels + 7) / 8 * 8;
  uint32_t words[4] = {0, 0, 0, 0};
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const int64_t channel = 8 * block_y() + i;
    if (channel >= args.channels) continue;
    const bf16 x = args.from[(block_z() * args.channels + channel) * args.pixels + pixel];
    words[i / 2] |= uint32_t(x.bits) << (16 * (i & 1));
  }
  store_words(args.to + (block_z() * args.pixels + pixel) * stored + 8 * block_y(),
              {{words[0], words[1], words[2], words[3]}});
}

KERNEL(planes_of_pixels, PlanesArgs, 256, 1) {
  const int64_t pixel = block_x() * block_threads() + thread_index();
  if (pixel >= args.pixels) return;
  const int64_t stored = (args.channels + 7) / 8 * 8;
  const Words words =
      load_words(args.from + (block_z() * args.pixels + pixel) * stored + 8 * block_y());
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const int64_t channel = 8 * block_y() + i;
    if (channel >= args.channels) continue;
    args.to[(block_z() * args.channels + channel) * args.pixels + pixel] = {
        uint16_t(words.at[i / 2] >> (16 * (i & 1)))};
  }
}
