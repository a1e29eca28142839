/* Merged products on a CPU: tiles of merged weights are made in cache and multiplied from there.

       C[m, j] += sum_k A[m, k] W[k, j],    W = sum_t w_t S_t

   A tile of the stack S is gathered once and merged for a group of samples; the weights of a sample exist for a tile at a
   time, in panels: NR columns of W, row after row. A is packed in blocks of MR rows, column after column, so that the
   product reads both as they lie. One product serves all: forward (A = x, W = weight transposed), the
   gradient of x (A = dy, W = weight) and the outer products in the gradient of the routing weights (A = dy transposed,
   W = x). The sums over k run in an order that depends on nothing but K: what comes out for a token depends neither on
   the batch nor on the other tokens.

   Every thread that takes part calls the same function with the same task; they share out its parts.

   Numbers are computed with as `real`: float, or double where DOUBLE is defined. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR 64
#define MR 12 /* rows of a block of the product: the sums fit in the registers */
#elif defined(__AVX__)
#define VECTOR 32
#define MR 6
#elif defined(__aarch64__)
#define VECTOR 16
#define MR 12
#else
#define VECTOR 16
#define MR 6
#endif
#ifdef DOUBLE
typedef double real;
typedef int64_t integer;
#else
typedef float real;
typedef int32_t integer;
#endif
#define VL (VECTOR / (int)sizeof(real))
#define NR (2 * VL)
#define RUN 16 /* tokens whose sums are stored together */
#define GROUP 6 /* samples that are merged at once: their sums fit in the registers */
#define OUTER_ROWS (3 * NR) /* of an outer product, with its columns and those of the samples under way in cache */
#define OUTER_COLUMNS (10 * NR)

typedef real vec __attribute__((vector_size(VECTOR), aligned(4), may_alias));
typedef real vec4 __attribute__((vector_size(4 * sizeof(real)), aligned(4), may_alias));
typedef integer int4 __attribute__((vector_size(4 * sizeof(real))));

#define INLINE static inline __attribute__((always_inline))
#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))
#if defined(__clang__)
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (int4){i, j, k, l})
#endif

/* How numbers are stored. */
enum { REAL, BFLOAT16, FLOAT16 };
#define BYTES(kind) ((kind) == REAL ? (long)sizeof(real) : 2L)

INLINE long least(long a, long b) { return a < b ? a : b; }

typedef union {
  float value;
  uint32_t bits;
} both;

INLINE real from_bfloat16(uint16_t number) { return ((both){.bits = (uint32_t)number << 16}).value; }

/* Rounded to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(real number) {
  const uint32_t bits = ((both){.value = (float)number}).bits;
  return number != number ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* to[0:count] = from[at:at + count] */
INLINE void widen(real *to, const void *from, long at, long count, int kind) {
  if (kind == REAL) {
    memcpy(to, (const real *)from + at, count * sizeof(real));
  } else if (kind == BFLOAT16) {
    const uint16_t *numbers = (const uint16_t *)from + at;
    for (long i = 0; i < count; i++) to[i] = from_bfloat16(numbers[i]);
#ifdef __FLT16_MAX__
  } else {
    const _Float16 *numbers = (const _Float16 *)from + at;
    for (long i = 0; i < count; i++) to[i] = numbers[i];
#endif
  }
}

/* to[at:at + count] = from[0:count] */
INLINE void narrow(void *to, long at, const real *from, long count, int kind) {
  if (kind == REAL) {
    memcpy((real *)to + at, from, count * sizeof(real));
  } else if (kind == BFLOAT16) {
    uint16_t *numbers = (uint16_t *)to + at;
    for (long i = 0; i < count; i++) numbers[i] = to_bfloat16(from[i]);
#ifdef __FLT16_MAX__
  } else {
    _Float16 *numbers = (_Float16 *)to + at;
    for (long i = 0; i < count; i++) numbers[i] = (_Float16)from[i];
#endif
  }
}

/* What the sums of a linear go through. */
enum { NONE, RELU, GELU, GELU_TANH, QUICK_GELU, SILU };

#ifndef DOUBLE
typedef integer mask __attribute__((vector_size(VECTOR), may_alias));

INLINE vec where(mask chosen, vec a, vec b) { return (vec)(((mask)a & chosen) | ((mask)b & ~chosen)); }

INLINE vec absolute(vec x) { return (vec)((mask)x & 0x7FFFFFFF); }

/* e^v for v <= 0, where it is below the normal numbers 0: the power of two next to it times a polynomial, fitted to
   3e-9. */
INLINE vec exponential(vec v) {
  const vec shifted = v * 1.44269504f + 12582912.f, n = shifted - 12582912.f; /* 1.5 2^23 leaves no room for a fraction */
  const vec r = v - n * 0.693145752f - n * 1.42860682e-6f;                    /* ln 2 in two parts */
  const vec q = r * (r * (r * (r * 0.00138144619f + 0.00836877618f) + 0.0416683894f) + 0.166665196f) + 0.499999927f;
  const vec power = (vec)(((mask)shifted + 127) << 23);
  return (vec)((mask)((r * r * q + r + 1) * power) & ~(v < -87));
}

/* x / (1 + e^-u) */
INLINE vec gated(vec x, vec u) {
  const vec e = exponential(-absolute(u)), y = x / (1 + e);
  return where(u < 0, y * e, y);
}

/* x times the normal distribution's Phi(x). Beyond |x| lies e^(-x^2 / 2) times a polynomial in 1 / (1 + 0.26 |x|), fitted to
   6e-9 of it. */
INLINE vec gelu(vec x) {
  static const float fitted[] = {0.0339092184f, -0.170423205f, 0.290748186f, -0.200484567f, 0.199831629f,
                                 0.0313700549f, 0.109421741f,  0.101729192f, 0.103904821f,  -7.06639875e-06f};
  const vec t = 1 / (1 + absolute(x) * 0.26f);
  vec q = fitted[0] - (vec){0};
#pragma GCC unroll 9
  for (int i = 1; i < 10; i++) q = q * t + fitted[i];
  const vec beyond = q * exponential(x * x * -0.5f);
  return x * where(x < 0, beyond, 1 - beyond);
}

INLINE vec activated(const int activation, vec x) {
  switch (activation) {
    case RELU: return (vec)((mask)x & ~(x < 0));
    case GELU: return gelu(x);
    case GELU_TANH: return gated(x, x * (x * x * 0.0713548163f + 1.59576912f)); /* 2 sqrt(2 / pi) (x + 0.044715 x^3) */
    case QUICK_GELU: return gated(x, x * 1.702f);
    case SILU: return gated(x, x);
    default: return x;
  }
}

#define EACH(activation)                                                                              \
  case activation:                                                                                    \
    for (real *x = numbers; x < numbers + count; x += VL) STORE(x, activated(activation, LOAD(x)));   \
    break;

/* Numbers in place, a multiple of VL. */
static void activate(int activation, real *numbers, long count) {
  switch (activation) { EACH(RELU) EACH(GELU) EACH(GELU_TANH) EACH(QUICK_GELU) EACH(SILU) }
}
#else
/* A caller asks for none: what is exact in float32 is not here. */
INLINE void activate(int activation, real *numbers, long count) {}
#endif

/* c[m, NR] = start[m, NR] + a[K, m]^T p[K, NR], m known when compiled; rows of `start` lie `step` apart. */
INLINE void block(const int m, long K, const real *a, const real *p, real *c, const real *start, long step) {
  vec low[MR], high[MR];
#pragma GCC unroll 12
  for (int i = 0; i < m; i++) {
    low[i] = high[i] = (vec){0};
    __builtin_prefetch(c + i * NR, 1);
  }
  for (long k = 0; k < K; k++, a += m, p += NR) {
    const vec p0 = LOAD(p), p1 = LOAD(p + VL);
#pragma GCC unroll 12
    for (int i = 0; i < m; i++) {
      const vec ai = a[i] - (vec){0};
      low[i] += ai * p0;
      high[i] += ai * p1;
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < m; i++, c += NR, start += step) {
    STORE(c, low[i] + LOAD(start));
    STORE(c + VL, high[i] + LOAD(start + VL));
  }
}

/* How many of M rows make the next block, where so many blocks of nearly equal height are left. */
INLINE long height(long M, long blocks) { return (M + blocks - 1) / blocks; }

#define CASE(m) \
  case m: block(m, K, a, p, c, start, step); break;

/* c[M, NR] = start[M, NR] + A p[K, NR], A [M, K] in blocks as `pack` leaves them. */
static void product(long M, long K, const real *a, const real *p, real *c, const real *start, long step) {
  for (long blocks = (M + MR - 1) / MR; blocks > 0; blocks--) {
    const long m = height(M, blocks);
    switch (m) {
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR > 6
      CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
    a += m * K;
    c += m * NR;
    start += m * step;
    M -= m;
  }
}

/* A tile of the stack [T1, rows, columns], its rows `pitch` apart, in blocks s[NR rows][T1][NR columns]: what is used
   together lies together, and is padded with zeros. Blocks follow each other along the columns, or where `down` along the
   rows. */
static void gather_tile(real *s, const void *stack, int kind, long T1, long size, long pitch, long at, long rows,
                        long columns, int down) {
  const long high = (rows + NR - 1) / NR, wide = (columns + NR - 1) / NR;
  for (long r = 0; r < high * NR; r++)
    for (long c = 0; c < wide; c++) {
      real *to = s + ((down ? c * high + r / NR : r / NR * wide + c) * NR + r % NR) * T1 * NR;
      const long from = at + r * pitch + c * NR, count = r < rows ? least(NR, columns - c * NR) : 0;
      for (long t = 0; t < T1; t++) {
        __builtin_prefetch((const char *)stack + (t * size + from + pitch) * BYTES(kind));
        if (count == NR) {
          widen(to + t * NR, stack, t * size + from, NR, kind);
        } else {
          memset(to + t * NR, 0, NR * sizeof(real));
          widen(to + t * NR, stack, t * size + from, count, kind);
        }
      }
    }
}

/* out[g][0:NR] = sum_t w[g][t] s[t][0:NR] for `count` samples. */
INLINE void merge_few(const int count, long T1, const real *w, const real *s, real *out, long os) {
  vec low[GROUP], high[GROUP];
#pragma GCC unroll 6
  for (int g = 0; g < count; g++) low[g] = high[g] = (vec){0};
  for (long t = 0; t < T1; t++) {
    const vec s0 = LOAD(s + t * NR), s1 = LOAD(s + t * NR + VL);
#pragma GCC unroll 6
    for (int g = 0; g < count; g++) {
      const vec wg = w[g * T1 + t] - (vec){0};
      low[g] += wg * s0;
      high[g] += wg * s1;
    }
  }
#pragma GCC unroll 6
  for (int g = 0; g < count; g++) {
    STORE(out + g * os, low[g]);
    STORE(out + g * os + VL, high[g]);
  }
}

/* The same for a block: out[g][r][0:NR], samples `os` apart. */
INLINE void merge_block(const int count, long T1, const real *w, const real *s, real *out, long os) {
  for (long r = 0; r < NR; r++) merge_few(count, T1, w, s + r * T1 * NR, out + r * NR, os);
}

static void merge(long count, long T1, const real *w, const real *s, real *out, long os) {
  switch (count) {
    case 1: merge_block(1, T1, w, s, out, os); break;
    case 2: merge_block(2, T1, w, s, out, os); break;
    case 3: merge_block(3, T1, w, s, out, os); break;
    case 4: merge_block(4, T1, w, s, out, os); break;
    case 5: merge_block(5, T1, w, s, out, os); break;
    default: merge_block(6, T1, w, s, out, os);
  }
}

typedef struct {
  vec4 row[4];
} square;

INLINE square load(const real *from, long pitch) {
  return (square){{*(const vec4 *)from, *(const vec4 *)(from + pitch), *(const vec4 *)(from + 2 * pitch),
                   *(const vec4 *)(from + 3 * pitch)}};
}

/* Store the transpose. */
INLINE void turn(square a, real *to, long pitch) {
  const vec4 low01 = SHUFFLE(a.row[0], a.row[1], 0, 4, 1, 5), low23 = SHUFFLE(a.row[2], a.row[3], 0, 4, 1, 5);
  const vec4 high01 = SHUFFLE(a.row[0], a.row[1], 2, 6, 3, 7), high23 = SHUFFLE(a.row[2], a.row[3], 2, 6, 3, 7);
  *(vec4 *)to = SHUFFLE(low01, low23, 0, 1, 4, 5);
  *(vec4 *)(to + pitch) = SHUFFLE(low01, low23, 2, 3, 6, 7);
  *(vec4 *)(to + 2 * pitch) = SHUFFLE(high01, high23, 0, 1, 4, 5);
  *(vec4 *)(to + 3 * pitch) = SHUFFLE(high01, high23, 2, 3, 6, 7);
}

/* to[K, m] = from[m, K]^T, rows `pitch` apart; the next m rows are asked for. */
INLINE void pack(const long m, long K, const real *from, long pitch, real *to) {
  long k = 0;
  if (m >= 4)
    for (; k + NR <= K; k += NR) {
      for (long i = 0; i < m; i++) __builtin_prefetch(from + (m + i) * pitch + k);
      for (long c = k; c < k + NR; c += 4)
        for (long i = 0; i < m; i += 4) {
          const long r = least(i, m - 4);
          turn(load(from + r * pitch + c, pitch), to + c * m + r, m);
        }
    }
  for (; k < K; k++)
    for (long i = 0; i < m; i++) to[k * m + i] = from[i * pitch + k];
}

/* to[c][r] = from[r][c] for NR rows, `pitch` apart, and columns. */
INLINE void transpose(const real *from, long pitch, real *to) {
  for (long c = 0; c < NR; c += 4)
    for (long r = 0; r < NR; r += 4) turn(load(from + r * pitch + c, pitch), to + c * NR + r, NR);
}

/* Rows and columns of the blocks of a tile change places. */
static void turn_tile(real *s, long T1, long blocks) {
  const long pitch = T1 * NR;
  for (; blocks > 0; blocks--, s += NR * pitch)
    for (real *block = s; block < s + pitch; block += NR)
      for (long r = 0; r < NR; r += 4)
        for (long c = r; c < NR; c += 4) {
          real *upper = block + r * pitch + c, *lower = block + c * pitch + r;
          const square a = load(upper, pitch), b = load(lower, pitch);
          turn(a, lower, pitch);
          turn(b, upper, pitch);
        }
}

/* Panels out[g][panel][k][NR] of a tile of `blocks` blocks, merged with w [count, T1]; `turned` where the columns of the
   panels run along the rows of the stack. */
static void merge_tile(long count, long T1, const real *w, const real *s, long blocks, int turned, real *out) {
  real merged[GROUP][NR * NR];
  const long sample = blocks * NR * NR;
  for (long i = 0; i < blocks; i++, s += NR * T1 * NR, out += NR * NR)
    if (turned) {
      merge(count, T1, w, s, merged[0], NR * NR);
      for (long g = 0; g < count; g++) transpose(merged[g], NR, out + g * sample);
    } else {
      merge(count, T1, w, s, out, sample);
    }
}

#define ROW (4 * VL)

/* to[0:ROW] = sum_t w[t] s_t[0:ROW], the s_t `size` numbers apart. */
INLINE void merge_row(real *to, const real *s, long size, const real *w, long T1) {
  vec sums[4] = {{0}, {0}, {0}, {0}};
  for (long t = 0; t < T1; t++) {
    const vec wt = w[t] - (vec){0};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] += wt * LOAD(s + t * size + i * VL);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) STORE(to + i * VL, sums[i]);
}

/* The same for `count` numbers. */
static void merge_rows(real *to, const real *s, long size, const real *w, long T1, long count) {
  long k = 0;
  for (; k + ROW <= count; k += ROW) merge_row(to + k, s + k, size, w, T1);
  if (k == count) return;
  real edge[T1 * ROW], sums[ROW];
  memset(edge, 0, sizeof edge);
  for (long t = 0; t < T1; t++) memcpy(edge + t * ROW, s + t * size + k, (count - k) * sizeof(real));
  merge_row(sums, edge, ROW, w, T1);
  memcpy(to + k, sums, (count - k) * sizeof(real));
}

typedef struct {
  const void *x, *stack;
  const real *w, *bias;
  void *y;
  real *packed, *sums, *workspace;
  long B, N, K, T1;
  long xb, xn, x_kind, size, pitch, stack_kind, lies, yb, yn, y_kind, bt;
  long first, last;                /* columns */
  long panels, depth, reach, adds; /* see `merged_product` */
  long activation;                 /* what these sums go through in the end */
  long room;                       /* numbers of workspace for a thread */
  long threads, parts;             /* how many have come, and how many have been taken */
} product_task;

/* The next part of a task, and a thread's number among those that have come. */
INLINE long next(long *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

/* Where numbers k to k + rows of the tokens of sample b are packed. */
INLINE real *packed_at(const product_task *task, long b, long k, long rows) {
  return task->packed + task->N * (task->B * k + b * rows);
}

/* Where the sums of a panel are for the tokens of sample b: [panel][b][n][0:NR]. */
INLINE real *sums_at(const product_task *task, long panel, long b) {
  return task->sums + (panel * task->B + b) * task->N * NR;
}

/* Pack what lies in memory as `real`, or is in sums. */
INLINE void pack_block(long m, long K, const real *from, long pitch, real *to) {
  if (m == MR)
    pack(MR, K, from, pitch, to);
  else
    pack(m, K, from, pitch, to);
}

/* Tokens as the product takes them: for `depth` numbers after the other the tokens of each sample in blocks. From x
   [B, N, K] with strides xb, xn, stored as x_kind; where x is null, from sums of K columns. */
void pack_tokens(product_task *task) {
  const long steps = (task->K + task->depth - 1) / task->depth;
  for (long part; (part = next(&task->parts)) < task->B * steps;) {
    const long b = part / steps, k = part % steps * task->depth, rows = least(task->depth, task->K - k);
    real *to = packed_at(task, b, k, rows), wide[MR * rows];
    for (long n = 0, blocks = (task->N + MR - 1) / MR; blocks > 0; blocks--) {
      const long m = height(task->N - n, blocks), from = b * task->xb + n * task->xn + k;
      if (!task->x) {
        for (long c = 0; c < rows; c += NR)
          pack_block(m, least(NR, rows - c), sums_at(task, (k + c) / NR, b) + n * NR, NR, to + c * m);
      } else if (task->x_kind == REAL) {
        pack_block(m, rows, (const real *)task->x + from, task->xn, to);
      } else {
        for (long i = 0; i < m; i++) widen(wide + i * rows, task->x, from + i * task->xn, rows, task->x_kind);
        pack_block(m, rows, wide, rows, to);
      }
      n += m;
      to += m * rows;
    }
  }
}

/* Numbers of workspace that `merged_product` needs: a tile and what is merged from it, or rows merged at once. */
long product_room(long T1, long panels, long reach) {
  const long tile = reach * panels * NR * (T1 + GROUP), rows = NR * (reach + NR) + panels * NR * reach;
  return tile > rows ? tile : rows;
}

/* Add the product of numbers k to k + rows of sample b with panels of W, `far` numbers apart, to the sums of columns j to
   j + width. They begin with the merged bias. */
INLINE void multiply(const product_task *task, long b, long k, long rows, const real *merged, long far, long j,
                     long width) {
  for (long c = 0; c < rows; c += task->depth) {
    const long some = least(task->depth, rows - c);
    for (long p = 0; p * NR < width; p++) {
      real *sums = sums_at(task, (j - task->first) / NR + p, b), shift[NR] = {0};
      const int first = !task->adds && k + c == 0;
      if (first && task->bias)
        for (long t = 0; t < task->T1; t++)
          for (long i = 0; i < least(NR, width - p * NR); i++)
            shift[i] += task->w[b * task->T1 + t] * task->bias[t * task->bt + j + p * NR + i];
      product(task->N, some, packed_at(task, b, k + c, some), merged + p * far + c * NR, sums, first ? shift : sums,
              first ? 0 : NR);
      if (task->activation && k + c + some == task->K) activate(task->activation, sums, task->N * NR);
    }
  }
}

/* `width` columns from j on: a tile of the stack after the other. */
static void product_of_tiles(const product_task *task, long j, long width, real *s) {
  const long T1 = task->T1, B = task->B, here = (width + NR - 1) / NR, size = task->size, pitch = task->pitch;
  const int once = !task->lies && B > T1; /* the tile is turned, not what is merged from it */
  real *merged = s + task->reach * task->panels * NR * T1;
  for (long k = 0; k < task->K; k += task->reach) {
    const long rows = least(task->reach, task->K - k), high = (rows + NR - 1) / NR, blocks = here * high;
    if (task->lies)
      gather_tile(s, task->stack, task->stack_kind, T1, size, pitch, k * pitch + j, rows, width, 1);
    else
      gather_tile(s, task->stack, task->stack_kind, T1, size, pitch, j * pitch + k, width, rows, 0);
    if (once) turn_tile(s, T1, blocks);
    for (long b = 0, groups = (B + GROUP - 1) / GROUP; groups > 0; groups--) {
      const long count = height(B - b, groups);
      merge_tile(count, T1, task->w + b * T1, s, blocks, !task->lies && !once, merged);
      for (long g = 0; g < count; g++, b++)
        multiply(task, b, k, rows, merged + g * blocks * NR * NR, high * NR * NR, j, width);
    }
  }
}

/* The same for one sample by itself, for which a tile is not worth gathering: rows of the stack are merged where they
   lie. */
static void product_of_rows(const product_task *task, long j, long width, real *merged) {
  const long far = task->reach + NR, here = (width + NR - 1) / NR;
  real *panels = merged + NR * far;
  memset(merged, 0, NR * far * sizeof(real)); /* what is beyond the last row is multiplied as well */
  for (long k = 0; k < task->K; k += task->reach) {
    const long rows = least(task->reach, task->K - k);
    for (long p = 0; p < here; p++) {
      const long at = j + p * NR, count = least(NR, width - p * NR);
      for (long r = 0; r < count; r++)
        merge_rows(merged + r * far, (const real *)task->stack + (at + r) * task->pitch + k, task->size, task->w, task->T1,
                   rows);
      for (long c = 0; c < rows; c += NR) transpose(merged + c, far, panels + (p * task->reach + c) * NR);
    }
    multiply(task, 0, k, rows, panels, task->reach * NR, j, width);
  }
}

/* sums[b, n, j - first] += sum_k x[b, n, k] W_b[k, j] for j from `first` to `last`; unless it `adds` they begin with
   sum_t w[b, t] bias[t, j], or without bias with nothing. In the end they go through the activation.

   x [B, N, K] has been packed; w [B, T1]; bias [T1, J] with strides bt, 1, or null; stack [T1, J, K], or [T1, K, J]
   where it `lies`, with strides size, pitch, 1, stored as stack_kind. A tile of W has `panels` * NR columns and `reach`
   rows; a sum is added to every `depth` numbers, of which `reach` is a multiple. Both are multiples of NR. */
void merged_product(product_task *task) {
  const long across = task->panels * NR;
  real *workspace = task->workspace + next(&task->threads) * task->room;
  for (long j; (j = task->first + next(&task->parts) * across) < task->last;)
    if (task->B == 1 && !task->lies && task->stack_kind == REAL)
      product_of_rows(task, j, least(across, task->last - j), workspace);
    else
      product_of_tiles(task, j, least(across, task->last - j), workspace);
}

/* y[b, n, j] = sums[b, n, j]: y [B, N, last - first] with strides yb, yn, 1, stored as y_kind. */
void store_sums(product_task *task) {
  const long N = task->N, runs = (N + RUN - 1) / RUN, span = task->last - task->first;
  for (long part; (part = next(&task->parts)) < task->B * runs;) {
    const long b = part / runs, n = part % runs * RUN;
    for (long j = 0; j < span; j += NR)
      for (long i = n; i < least(n + RUN, N); i++)
        narrow(task->y, b * task->yb + i * task->yn + j, sums_at(task, j / NR, b) + i * NR, least(NR, span - j),
               task->y_kind);
  }
}

/* sums[t] += <o, s[t]> over a block: o [NR, NR], s [NR, T1, NR] from some t on. */
INLINE void inner(const int count, long T1, const real *o, const real *s, vec *sums) {
  vec low[5], high[5];
#pragma GCC unroll 5
  for (int i = 0; i < count; i++) low[i] = high[i] = (vec){0};
  for (long r = 0; r < NR; r++, o += NR, s += T1 * NR) {
    const vec o0 = LOAD(o), o1 = LOAD(o + VL);
#pragma GCC unroll 5
    for (int i = 0; i < count; i++) {
      low[i] += o0 * LOAD(s + i * NR);
      high[i] += o1 * LOAD(s + i * NR + VL);
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < count; i++) sums[i] += low[i] + high[i];
}

/* sums[t] += <o, s[t]> for all t, up to five at a time. */
static void inner_products(long T1, const real *o, const real *s, vec *sums) {
  for (long t = 0, parts = (T1 + 4) / 5; parts > 0; parts--) {
    const long some = (T1 - t + parts - 1) / parts;
    switch (some) {
      case 1: inner(1, T1, o, s + t * NR, sums + t); break;
      case 2: inner(2, T1, o, s + t * NR, sums + t); break;
      case 3: inner(3, T1, o, s + t * NR, sums + t); break;
      case 4: inner(4, T1, o, s + t * NR, sums + t); break;
      default: inner(5, T1, o, s + t * NR, sums + t);
    }
    t += some;
  }
}

/* to[p][n][0:width] = from[n, p * width:(p + 1) * width] for N tokens, `pitch` apart, and `panels` panels; zeros beyond the
   columns. */
INLINE void gather_panels(real *to, const void *from, long at, long pitch, long N, long columns, long panels,
                          const long width, int kind) {
  for (long n = 0; n < N; n++)
    for (long p = 0; p < panels; p++) {
      real *here = to + (p * N + n) * width;
      const long begin = at + n * pitch + p * width, count = columns - p * width;
      if (count >= width) {
        widen(here, from, begin, width, kind);
      } else {
        memset(here, 0, width * sizeof(real));
        if (count > 0) widen(here, from, begin, count, kind);
      }
    }
}

/* outer [panels, OUTER_ROWS, NR] = dy^T x of one sample for panels of dy [OUTER_ROWS / MR, N, MR] and of x [panels, N, NR]. */
static void outer_product(real *outer, const real *dy, const real *x, long panels, long N) {
  const real none[NR] = {0};
  for (long p = 0; p < panels; p++, outer += OUTER_ROWS * NR, x += N * NR) product(OUTER_ROWS, N, dy, x, outer, none, 0);
}

typedef struct {
  const void *dy, *x, *stack;
  double *dw;
  real *workspace;
  long yb, yn, xb, xn, x_kind, stack_kind, T1, J, K, B, N;
  long first, last, across; /* columns of dy, and how many make a part */
  long most;                /* samples that are under way at once */
  long room;                /* numbers of workspace for a thread */
  long threads, parts;      /* how many have come, and how many have been taken */
} dw_task;

/* Numbers of workspace that `rows_dw` needs: a tile and what is multiplied with it; dy and x of a sample, `most` times. */
long dw_room(long T1, long N, long across, long most) {
  const long dy = (across + OUTER_ROWS - 1) / OUTER_ROWS * OUTER_ROWS;
  return (T1 + GROUP) * OUTER_ROWS * OUTER_COLUMNS + most * N * (dy + OUTER_COLUMNS);
}

/* dw [B, T1]: the part of columns `first` to `last` of dy. */
static void rows_dw(const dw_task *task, long first, long last, double *dw, real *workspace) {
  const long T1 = task->T1, J = task->J, K = task->K, N = task->N, tile = OUTER_ROWS * OUTER_COLUMNS;
  const long span = last - first, part = (span + OUTER_ROWS - 1) / OUTER_ROWS * OUTER_ROWS * N;
  real *s = workspace, *outer = s + T1 * tile, *dy = outer + GROUP * tile, *x = dy + task->most * part;
  vec sums[GROUP][T1];
  memset(dw, 0, task->B * T1 * sizeof(double));
  for (long b0 = 0; b0 < task->B; b0 += task->most, dw += task->most * T1) {
    const long samples = least(task->most, task->B - b0);
    for (long b = 0; b < samples; b++)
      gather_panels(dy + b * part, task->dy, (b0 + b) * task->yb + first, task->yn, N, span, part / N / MR, MR, task->x_kind);
    for (long k = 0; k < K; k += OUTER_COLUMNS) {
      const long columns = least(OUTER_COLUMNS, K - k), wide = (columns + NR - 1) / NR;
      for (long b = 0; b < samples; b++)
        gather_panels(x + b * N * OUTER_COLUMNS, task->x, (b0 + b) * task->xb + k, task->xn, N, columns, wide,
                      NR, task->x_kind);
      for (long j = 0; j < span; j += OUTER_ROWS) {
        const long rows = least(OUTER_ROWS, span - j), high = (rows + NR - 1) / NR;
        gather_tile(s, task->stack, task->stack_kind, T1, J * K, K, (first + j) * K + k, rows, columns, 0);
        for (long b = 0; b < samples; b += GROUP) {
          const long count = least(GROUP, samples - b);
          for (long g = 0; g < count; g++)
            outer_product(outer + g * tile, dy + (b + g) * part + j * N, x + (b + g) * N * OUTER_COLUMNS, wide, N);
          memset(sums, 0, sizeof sums);
          for (long r = 0; r < high; r++)
            for (long c = 0; c < wide; c++)
              for (long g = 0; g < count; g++)
                inner_products(T1, outer + g * tile + (c * OUTER_ROWS + r * NR) * NR, s + (r * wide + c) * NR * T1 * NR,
                               sums[g]);
          for (long g = 0; g < count; g++)
            for (long t = 0; t < T1; t++)
              for (int i = 0; i < VL; i++) dw[(b + g) * T1 + t] += sums[g][t][i];
        }
      }
    }
  }
}

/* dw[part, b, t] = sum over the part's j of <dy_b[:, j]^T x_b, S_t[j]>, in double.

   dy [B, N, J] with strides yb, yn, x [B, N, K] with strides xb, xn, both stored as x_kind; stack [T1, J, K] as
   stack_kind; dw [parts, B, T1]. */
void merged_product_dw(dw_task *task) {
  real *workspace = task->workspace + next(&task->threads) * task->room;
  for (long part; task->first + (part = next(&task->parts)) * task->across < task->last;) {
    const long j = task->first + part * task->across;
    rows_dw(task, j, least(j + task->across, task->last), task->dw + part * task->B * task->T1, workspace);
  }
}

/* What a caller must know: {NR, GROUP, OUTER_ROWS, OUTER_COLUMNS, whether FLOAT16 is known} */
void constants(long *out) {
#ifdef __FLT16_MAX__
  const long known = 1;
#else
  const long known = 0;
#endif
  const long values[] = {NR, GROUP, OUTER_ROWS, OUTER_COLUMNS, known};
  memcpy(out, values, sizeof values);
}
