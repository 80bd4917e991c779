// Two-dimensional convolution of pictures [b][in][h][w] as a matrix product that never stores its patches:
//   y[out][pixel] = sum over (tap, in) of w[out][tap][in] x[in][pixel moved by the tap] + bias[out]
// with zeros around the picture. Rows of the product are outputs, columns are pixels, the depth runs
// over taps and channels; see product.cuh. Channels are filled up to a multiple of 64 in the weights,
// so that a tile of the depth has one tap.
//
// conv2d: grid (out tiles of 128, pixel tiles of 128, b); 256 threads.
// The weights: [out][taps][channels up to 64] in bf16.
#include "product.cuh"

struct ConvArgs {
  const bf16* x;
  const bf16* weight;
  const bf16* bias;  // [outs], or null
  bf16* y;           // [b][outs][out_height][out_width]
  int64_t channels, channels_padded, outs;
  int64_t height, width, out_height, out_width;
  int64_t kernel_height, kernel_width, stride, pad_top, pad_left;
};

struct ConvOperands {
  const ConvArgs& args;
  // Where the eight pixels begin that this thread brings: they stay the same along the depth.
  int out_y, out_x, pixels_left;

  DEVICE ConvOperands(const ConvArgs& args) : args(args) {
    const int64_t first = block_y() * PRODUCT_COLUMNS + 8 * (thread_index() % (PRODUCT_COLUMNS / 8));
    out_y = int(first / args.out_width);
    out_x = int(first % args.out_width);
    pixels_left = int(min64(8, args.out_height * args.out_width - first));
  }

  DEVICE int64_t depth() const {
    return args.kernel_height * args.kernel_width * args.channels_padded;
  }

  DEVICE void copy_rows(unsigned char* to, int64_t first, int k) const {
    copy_row_tile(to, args.weight, depth(), first, args.outs, k);
  }

  static constexpr bool COLUMNS_BY_DEPTH = true;  // a channel's pixels lie side by side
  // A thread brings 8 neighbouring pixels of four channels.
  static constexpr int HELD = PRODUCT_COLUMNS * PRODUCT_DEPTH / 8 / PRODUCT_THREADS;
  struct Held {
    Words words[HELD];
  };

  DEVICE void fetch_columns(Held& held, int64_t, int k) const {
    const int padded = int(args.channels_padded), kernel_width = int(args.kernel_width);
    const int height = int(args.height), width = int(args.width), stride = int(args.stride);
    const int tap = k / padded, channel_first = k % padded;
    const int move_y = tap / kernel_width - int(args.pad_top);
    const int move_x = tap % kernel_width - int(args.pad_left);
    const int64_t plane = args.height * args.width;
    int places[8];  // within a plane, or -1
    int y = out_y, x = out_x;
    UNROLL
    for (int j = 0; j < 8; ++j) {
      const int in_y = y * stride + move_y, in_x = x * stride + move_x;
      const bool there =
          j < pixels_left && in_y >= 0 && in_y < height && in_x >= 0 && in_x < width;
      places[j] = there ? in_y * width + in_x : -1;
      if (++x == int(args.out_width)) {
        x = 0;
        ++y;
      }
    }
    UNROLL
    for (int i = 0; i < HELD; ++i) {
      const int row = (thread_index() + i * PRODUCT_THREADS) / (PRODUCT_COLUMNS / 8);
      const int channel = channel_first + row;
      held.words[i] = {{0, 0, 0, 0}};
      if (channel >= args.channels) continue;
      const bf16* from = args.x + (block_z() * args.channels + channel) * plane;
      UNROLL
      for (int j = 0; j < 8; ++j) {
        const uint32_t bits = places[j] < 0 ? 0 : from[places[j]].bits;
        held.words[i].at[j / 2] |= bits << (16 * (j & 1));
      }
    }
  }

  DEVICE void place_columns(unsigned char* to, const Held& held) const {
    UNROLL
    for (int i = 0; i < HELD; ++i) {
      const int at = thread_index() + i * PRODUCT_THREADS;
      const int row = at / (PRODUCT_COLUMNS / 8), chunk = at % (PRODUCT_COLUMNS / 8);
      store_words(SharedRows<PRODUCT_COLUMNS>::at(to, row, chunk), held.words[i]);
    }
  }

  DEVICE void store(int64_t out, int64_t pixel, float first, float second) const {
    const int64_t pixels = args.out_height * args.out_width;
    if (out >= args.outs) return;
    const float bias = args.bias ? to_float(args.bias[out]) : 0.0f;
    bf16* y = args.y + (block_z() * args.outs + out) * pixels + pixel;
    if (pixel + 1 < pixels && pixels % 2 == 0) {
      *reinterpret_cast<uint32_t*>(y) = pack_bf16(first + bias, second + bias);
      return;
    }
    if (pixel < pixels) y[0] = from_float<bf16>(first + bias);
    if (pixel + 1 < pixels) y[1] = from_float<bf16>(second + bias);
  }
};

KERNEL(conv2d, ConvArgs, 256, 2) { product_block(ConvOperands(args)); }
