// What stands at the ends of the transformer: the timestep's sinusoids, and pictures of latents as
// tokens.
//
// timestep_embedding: [n] float32 -> [n][width] bf16, width even, half = width / 2:
//   angle[i] = scale * (t * exp(log * i / divisor)), log = -ln(longest period), divisor = half - shift.
//   Sines fill the first half and cosines the second, or the other way round with `flip`. Every
//   operation is float32 in the reference's order, since an angle of 1000 shows the last bit; each
//   result is rounded once. Grid: (n * half / 256, 1, 1); 256 threads, one pair of results each.
// pack_patches_T, unpack_patches_T: latents [b][c][2 * height][2 * width] <-> tokens
//   [b][height * width][c * 4], a token's numbers in the order of channel, row, column; T: bf16, f32.
//   Grid: (b * c * height * width / 256, 1, 1); 256 threads, one channel's 2 x 2 square each.
//
// Tried: neighbouring threads take neighbouring tokens, so that reading (packing) or writing (unpacking)
// the picture's rows is in one piece, and the token's side in pieces of four numbers. The other order
// turns that round and is no better: either way both sides move each sector once through the cache. All
// of these run once an edit or once a schedule, so the launch is what they cost.
#include "device.cuh"

struct TimestepArgs {
  const float* timesteps;  // [n]
  bf16* out;               // [n][width]
  int64_t n, width;
  int64_t flip;
  double log, divisor, scale;
};

KERNEL(timestep_embedding, TimestepArgs, 256, 1) {
  const int64_t i = block_x() * block_threads() + thread_index();
  const int64_t half = args.width / 2;
  if (i >= args.n * half) return;
  const int64_t row = i / half, at = i % half;
  const float frequency = expf(float(args.log) * float(at) / float(args.divisor));
  const float angle = float(args.scale) * (args.timesteps[row] * frequency);
  bf16* out = args.out + row * args.width + at;
  out[args.flip ? half : 0] = from_float<bf16>(sinf(angle));
  out[args.flip ? 0 : half] = from_float<bf16>(cosf(angle));
}

struct PatchArgs {
  const void* from;
  void* to;
  int64_t batches, channels, height, width;  // in patches
};

// Calls move(place of the square's first number in the picture, place in the tokens).
template <class Move>
DEVICE void each_patch(const PatchArgs& args, Move move) {
  const int64_t i = block_x() * block_threads() + thread_index();
  const int64_t tokens = args.height * args.width;
  if (i >= args.batches * args.channels * tokens) return;
  const int64_t token = i % tokens, plane = i / tokens;  // plane: entry and channel
  const int64_t batch = plane / args.channels, channel = plane % args.channels;
  const int64_t y = token / args.width, x = token % args.width;
  move((plane * args.height + y) * 4 * args.width + 2 * x,
       ((batch * tokens + token) * args.channels + channel) * 4);
}

template <class T>
DEVICE void pack_patches(const PatchArgs& args) {
  each_patch(args, [&](int64_t picture, int64_t token) {
    const T* from = static_cast<const T*>(args.from) + picture;
    T* to = static_cast<T*>(args.to) + token;
    to[0] = from[0];
    to[1] = from[1];
    to[2] = from[2 * args.width];
    to[3] = from[2 * args.width + 1];
  });
}

template <class T>
DEVICE void unpack_patches(const PatchArgs& args) {
  each_patch(args, [&](int64_t picture, int64_t token) {
    const T* from = static_cast<const T*>(args.from) + token;
    T* to = static_cast<T*>(args.to) + picture;
    to[0] = from[0];
    to[1] = from[1];
    to[2 * args.width] = from[2];
    to[2 * args.width + 1] = from[3];
  });
}

KERNEL(pack_patches_bf16, PatchArgs, 256, 1) { pack_patches<bf16>(args); }
KERNEL(pack_patches_f32, PatchArgs, 256, 1) { pack_patches<float>(args); }
KERNEL(unpack_patches_bf16, PatchArgs, 256, 1) { unpack_patches<bf16>(args); }
KERNEL(unpack_patches_f32, PatchArgs, 256, 1) { unpack_patches<float>(args); }
