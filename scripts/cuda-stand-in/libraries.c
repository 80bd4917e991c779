// cuBLAS, cuBLASLt and cuRAND that do nothing and succeed, and count what they are asked for (driver.c). A small product
// is computed, since the program multiplies numbers it knows before it trusts a library.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct counter {
  const char *name;
  long count;
  struct counter *next;
} counter;
void stand_in_count(counter *of);

#define COUNTED                          \
  do {                                   \
    static counter of_this = {__func__}; \
    stand_in_count(&of_this);            \
  } while (0)
#define SUCCEEDS(NAME) \
  int NAME(void) { COUNTED; return 0; }

static char handle;
int cublasCreate_v2(void **to) { COUNTED; *to = &handle; return 0; }
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasDgemmStridedBatched)
SUCCEEDS(cublasGemmStridedBatchedEx)

int curandCreateGenerator(void **to, int kind) { COUNTED; *to = &handle; return 0; }
SUCCEEDS(curandDestroyGenerator)
SUCCEEDS(curandSetPseudoRandomGeneratorSeed)
SUCCEEDS(curandSetStream)
SUCCEEDS(curandGenerateNormal)
SUCCEEDS(curandGenerateNormalDouble)
SUCCEEDS(curandGenerateUniform)
SUCCEEDS(curandGenerateUniformDouble)

// The attributes of a product's description that the program sets, by their number.
enum { EPILOGUE = 7, BIAS_POINTER = 8, SCALES_OF_A = 17, SCALES_OF_B = 18, ATTRIBUTES = 64 };
enum { GELU = 32, BIAS = 4, BF16 = 14, E4M3 = 28 };
typedef struct { uint64_t of[ATTRIBUTES]; } description;
typedef struct { int type; uint64_t rows, columns; int64_t apart; } layout;

int cublasLtCreate(void **to) { COUNTED; *to = &handle; return 0; }
SUCCEEDS(cublasLtDestroy)
int cublasLtMatmulDescCreate(void **to, int sums, int scale) { COUNTED; *to = calloc(1, sizeof(description)); return 0; }
int cublasLtMatmulDescDestroy(void *of) { COUNTED; free(of); return 0; }
int cublasLtMatmulDescSetAttribute(description *of, int attribute, const void *value, size_t bytes) {
  COUNTED;
  if (attribute < 0 || attribute >= ATTRIBUTES || bytes > 8) return 7;
  memcpy(of->of + attribute, value, bytes);
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **to) { COUNTED; *to = malloc(8); return 0; }
int cublasLtMatmulPreferenceDestroy(void *of) { COUNTED; free(of); return 0; }
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
int cublasLtMatrixLayoutCreate(void **to, int type, uint64_t rows, uint64_t columns, int64_t apart) {
  COUNTED;
  layout *made = malloc(sizeof(layout));
  *made = (layout){type, rows, columns, apart};
  *to = made;
  return 0;
}
int cublasLtMatrixLayoutDestroy(void *of) { COUNTED; free(of); return 0; }

// As the header has it: the algorithm, its workspace, its state, waves and four more.
typedef struct { uint64_t algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *on, void *of, void *a, void *b, void *c, void *d, void *preference, int wanted,
                                   heuristic *found, int *count) {
  COUNTED;
  memset(found, 0, sizeof(heuristic));
  *count = 1;
  return 0;
}

static float widened(const uint16_t *at) {
  uint32_t bits = (uint32_t)*at << 16;
  float number;
  memcpy(&number, &bits, 4);
  return number;
}

static uint16_t rounded(float number) {
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static float number(const void *of, int type, uint64_t at) {
  if (type == BF16) return widened((const uint16_t *)of + at);
  uint8_t code = ((const uint8_t *)of)[at];
  float size = code & 0x78 ? ldexpf(8 + (code & 7), (code >> 3 & 15) - 10) : ldexpf(code & 7, -9);
  return code & 0x80 ? -size : size;
}

// D = A^T B with bias and GELU, columns first, in bf16; A and B in bf16, or in e4m3 with scales.
int cublasLtMatmul(void *on, description *of, const float *alpha, const void *a, layout *la, const void *b, layout *lb,
                   const float *beta, const void *c, layout *lc, uint16_t *d, layout *ld, const void *algorithm,
                   void *workspace, size_t bytes, void *stream) {
  COUNTED;
  if (ld->rows * ld->columns * la->rows > 1 << 20) return 0;
  int epilogue = of->of[EPILOGUE];
  const uint16_t *bias = (const uint16_t *)of->of[BIAS_POINTER];
  const float *of_a = (const float *)of->of[SCALES_OF_A], *of_b = (const float *)of->of[SCALES_OF_B];
  for (uint64_t column = 0; column < ld->columns; column++)
    for (uint64_t row = 0; row < ld->rows; row++) {
      double sum = 0;
      for (uint64_t k = 0; k < la->rows; k++)
        sum += number(a, la->type, row * la->apart + k) * number(b, lb->type, column * lb->apart + k);
      sum *= *alpha;
      if (la->type == E4M3) sum *= of_a[row] * of_b[column];
      if (epilogue & BIAS) sum += widened(bias + row);
      if (epilogue & GELU) sum *= 0.5 * (1 + tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
      d[column * ld->apart + row] = rounded(sum);
    }
  return 0;
}
