// The core of matrix products on tensor cores: a block owns 128 rows by 128 columns of the result and
// walks along the depth in steps of 64, with two tiles of each operand in shared memory: while one pair is
// multiplied, the next arrives. Eight warps own 64 by 32 numbers each, in registers, in float32.
//
// The operands come from a type with: rows(), columns(), depth(); copy_rows, which brings 128 rows by
// 64 of the left operand as asynchronous copies; fetch_columns and place_columns, which bring the right
// one by way of registers; and store, which takes two neighbouring numbers of the result. Tiles are
// filled with zeros where the matrices end.
#pragma once
#include "attention.cuh"

constexpr int PRODUCT_ROWS = 128, PRODUCT_COLUMNS = 128, PRODUCT_DEPTH = 64, PRODUCT_THREADS = 256;
constexpr int PRODUCT_TILE_BYTES = 128 * PRODUCT_DEPTH * 2;
constexpr int PRODUCT_SHARED_BYTES = 4 * PRODUCT_TILE_BYTES;

// Rows `first..` of a matrix [rows][depth], numbers `k..k + 64` of each.
DEVICE void copy_row_tile(unsigned char* to, const bf16* matrix, int64_t depth, int64_t first,
                          int64_t rows, int k) {
  constexpr int CHUNKS = PRODUCT_DEPTH / 8;
  for (int i = thread_index(); i < PRODUCT_ROWS * CHUNKS; i += PRODUCT_THREADS) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool there = first + row < rows && k + 8 * chunk < depth;
    const bf16* from = there ? matrix + (first + row) * depth + k + 8 * chunk : matrix;
    copy_async(SharedRows<PRODUCT_DEPTH>::at(to, row, chunk), from, there);
  }
}

template <class Operands>
DEVICE void product_block(const Operands& operands) {
  using Rows = SharedRows<PRODUCT_DEPTH>;
  using Deep = SharedRows<PRODUCT_COLUMNS>;
  unsigned char* row_tiles = shared_memory();
  unsigned char* column_tiles = row_tiles + 2 * PRODUCT_TILE_BYTES;
  const int64_t first_row = block_x() * PRODUCT_ROWS, first_column = block_y() * PRODUCT_COLUMNS;
  const int warp_row = (warp() & 1) * 64, warp_column = (warp() >> 1) * 32;

  float sums[4][4][4];
  UNROLL
  for (int m = 0; m < 4; ++m) {
    UNROLL
    for (int n = 0; n < 4; ++n) {
      UNROLL
      for (int part = 0; part < 4; ++part) sums[m][n][part] = 0.0f;
    }
  }

  typename Operands::Held held;
  operands.copy_rows(row_tiles, first_row, 0);
  copy_commit();
  operands.fetch_columns(held, first_column, 0);
  operands.place_columns(column_tiles, held);
  int current = 0;
  const int depth = int(operands.depth());
  for (int k = 0; k < depth; k += PRODUCT_DEPTH) {
    copy_wait<0>();
    block_barrier();  // this pair of tiles is there, and nobody reads the other any more
    unsigned char* rows = row_tiles + current * PRODUCT_TILE_BYTES;
    unsigned char* columns = column_tiles + current * PRODUCT_TILE_BYTES;
    const int next = 1 - current;
    const bool more = k + PRODUCT_DEPTH < depth;
    if (more) {
      operands.copy_rows(row_tiles + next * PRODUCT_TILE_BYTES, first_row, k + PRODUCT_DEPTH);
      copy_commit();
      operands.fetch_columns(held, first_column, k + PRODUCT_DEPTH);
    }
    UNROLL
    for (int step = 0; step < PRODUCT_DEPTH / 16; ++step) {
      uint32_t a[4][4], b[2][4];
      UNROLL
      for (int m = 0; m < 4; ++m) {
        const int row = warp_row + 16 * m + (lane() & 15);
        load_matrices(a[m], Rows::at(rows, row, 2 * step + (lane() >> 4)));
      }
      UNROLL
      for (int n = 0; n < 2; ++n) {
        if constexpr (Operands::COLUMNS_BY_DEPTH) {
          const int row = 16 * step + (lane() & 15);
          const int chunk = (warp_column + 16 * n) / 8 + (lane() >> 4);
          load_matrices_transposed(b[n], Deep::at(columns, row, chunk));
        } else {
          const int row = warp_column + 16 * n + (lane() & 7) + 8 * (lane() >> 4);
          load_matrices(b[n], Rows::at(columns, row, 2 * step + ((lane() >> 3) & 1)));
        }
      }
      UNROLL
      for (int m = 0; m < 4; ++m) {
        UNROLL
        for (int n = 0; n < 2; ++n) {
          multiply_add(sums[m][2 * n], a[m], b[n][0], b[n][1]);
          multiply_add(sums[m][2 * n + 1], a[m], b[n][2], b[n][3]);
        }
      }
    }
    if (more) operands.place_columns(column_tiles + next * PRODUCT_TILE_BYTES, held);
    current = next;
  }

  UNROLL
  for (int m = 0; m < 4; ++m) {
    UNROLL
    for (int n = 0; n < 4; ++n) {
      UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + warp_row + 16 * m + 8 * half + (lane() >> 2);
        const int64_t column = first_column + warp_column + 8 * n + 2 * (lane() & 3);
        operands.store(row, column, sums[m][n][2 * half], sums[m][n][2 * half + 1]);
      }
    }
  }
}
