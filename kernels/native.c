/* Merged products on a CPU: tiles of merged weights are made in cache and multiplied from there.

       C[m, j] += sum_k A[m, k] W[k, j],    W = sum_t w_t S_t

   A tile of the stack S is gathered once and merged for a group of samples; the weights of a sample exist for a tile at a
   time, in panels: NR columns of W, row after row. One product serves all: forward (A = x, W = weight transposed), the
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
#define NB 60 /* tokens that are multiplied at once */
#define GROUP 6 /* samples that are merged at once: their sums fit in the registers */
#define LONG 1024 /* numbers of a row of the stack that are merged at once for a sample by itself */
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

/* c[m, NR] += a[m, K] p[K, NR], m known when compiled; where c is `fresh` nothing is in it yet. */
INLINE void block(const int m, long K, const real *a, long row, long column, const real *p, long ps, real *c,
                  long cs, int fresh) {
  vec low[MR], high[MR];
#pragma GCC unroll 12
  for (int i = 0; i < m; i++) {
    low[i] = high[i] = (vec){0};
    __builtin_prefetch(c + i * cs, 1);
    __builtin_prefetch(c + i * cs + NR - 1, 1);
  }
  for (long k = 0; k < K; k++) {
    const vec p0 = LOAD(p), p1 = LOAD(p + VL);
#pragma GCC unroll 12
    for (int i = 0; i < m; i++) {
      const vec ai = a[i * row] - (vec){0};
      low[i] += ai * p0;
      high[i] += ai * p1;
    }
    a += column;
    p += ps;
  }
#pragma GCC unroll 12
  for (int i = 0; i < m; i++) {
    if (!fresh) {
      low[i] += LOAD(c + i * cs);
      high[i] += LOAD(c + i * cs + VL);
    }
    STORE(c + i * cs, low[i]);
    STORE(c + i * cs + VL, high[i]);
  }
}

#define CASE(m) \
  case m: block(m, K, a, row, column, p, ps, c, cs, fresh); break;

/* The same for c[M, NR], in blocks of nearly equal height. */
static void product(long M, long K, const real *a, long row, long column, const real *p, long ps, real *c,
                    long cs, int fresh) {
  for (long left = M, blocks = (M + MR - 1) / MR; blocks > 0; blocks--) {
    const long m = (left + blocks - 1) / blocks;
    switch (m) {
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR > 6
      CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
    a += m * row;
    c += m * cs;
    left -= m;
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
  real *workspace;
  long xb, xn, x_kind, stack_kind, T1, J, K, lies, yb, yn, B, N;
  long first, last, across; /* columns of y, and how many make a part */
  long panels, depth, most; /* see `columns` */
  long room;                /* numbers of workspace for a thread */
  long threads, parts;      /* how many have come, and how many have been taken */
} product_task;

/* Numbers of a row of x, or of the stack, that are used at once: for samples together, or for one by itself. */
INLINE long reach(long depth, int alone) { return alone ? LONG / depth * depth : depth; }

/* Numbers of workspace that `columns` needs: a tile and what is merged from it, or rows merged at once; sums; x. */
long product_room(long T1, long N, long across, long panels, long depth, long most) {
  const long full = panels * NR, pitch = (across + NR - 1) / NR * NR;
  const long tile = depth * full * (T1 + GROUP), rows = NR * (LONG + NR) + full * LONG;
  return (tile > rows ? tile : rows) + most * N * (pitch + reach(depth, most == 1));
}

/* to[b][n][0:rows] = x[b0 + b, n, k:k + rows] for `samples`: close together, and as they are computed with. */
INLINE void gather_x(const product_task *task, long b0, long samples, long k, long rows, real *to) {
  for (long b = b0; b < b0 + samples; b++)
    for (long n = 0; n < task->N; n++, to += rows)
      widen(to, task->x, b * task->xb + n * task->xn + k, rows, task->x_kind);
}

/* sums[n][0:pitch] += x[n, 0:rows] P for the tokens n of a sample and `here` panels P, `far` numbers apart; `fresh` as
   in `block`. */
INLINE void multiply(long N, const real *x, long rows, const real *panel, long far, long here, real *sums, long pitch,
                     int fresh) {
  for (long n = 0; n < N; n += NB)
    for (long p = 0; p < here; p++)
      product(least(NB, N - n), rows, x + n * rows, rows, 1, panel + p * far, NR, sums + n * pitch + p * NR, pitch, fresh);
}

/* The sums of samples b0 to b0 + samples for columns `first` to `last`: tile by tile, the tiles beside each other using
   the same numbers of x. */
static void sum_tiles(const product_task *task, long b0, long samples, long first, long last, real *s, real *merged,
                      real *sums, long pitch, real *x) {
  const long T1 = task->T1, J = task->J, K = task->K, full = task->panels * NR;
  const int once = !task->lies && samples > T1; /* the tile is turned, not what is merged from it */
  for (long k = 0; k < K; k += task->depth) {
    const long rows = least(task->depth, K - k), height = (rows + NR - 1) / NR * NR;
    gather_x(task, b0, samples, k, rows, x);
    for (long j = first; j < last; j += full) {
      const long width = least(full, last - j), here = (width + NR - 1) / NR, blocks = here * height / NR;
      if (task->lies)
        gather_tile(s, task->stack, task->stack_kind, T1, J * K, J, k * J + j, rows, width, 1);
      else
        gather_tile(s, task->stack, task->stack_kind, T1, J * K, K, j * K + k, width, rows, 0);
      if (once) turn_tile(s, T1, blocks);
      for (long b = 0; b < samples; b += GROUP) {
        const long count = least(GROUP, samples - b);
        merge_tile(count, T1, task->w + (b0 + b) * T1, s, blocks, !task->lies && !once, merged);
        for (long g = b; g < b + count; g++)
          multiply(task->N, x + g * task->N * rows, rows, merged + (g - b) * blocks * NR * NR, height * NR, here,
                   sums + g * task->N * pitch + j - first, pitch, k == 0);
      }
    }
  }
}

/* The same for one sample by itself, for which a tile is not worth gathering: rows of the stack are merged where they lie,
   as far as memory is read in one go. */
static void sum_rows(const product_task *task, long first, long last, real *merged, real *panels, real *sums, long pitch,
                     real *x) {
  const long T1 = task->T1, K = task->K, far = LONG + NR, full = task->panels * NR, depth = task->depth;
  const long most = reach(depth, 1);
  memset(merged, 0, NR * far * sizeof(real)); /* what is beyond the last row is multiplied as well */
  for (long k = 0; k < K; k += most) {
    const long rows = least(most, K - k);
    for (long c = 0; c < rows; c += depth) gather_x(task, 0, 1, k + c, least(depth, rows - c), x + c * task->N);
    for (long j = first; j < last; j += full) {
      const long here = (least(full, last - j) + NR - 1) / NR;
      for (long p = 0; p < here; p++) {
        const long at = j + p * NR, count = least(NR, last - at);
        for (long r = 0; r < count; r++)
          merge_rows(merged + r * far, (const real *)task->stack + (at + r) * K + k, task->J * K, task->w, T1, rows);
        for (long c = 0; c < rows; c += NR) transpose(merged + c, far, panels + (p * most + c) * NR);
      }
      for (long c = 0; c < rows; c += depth) {
        const long some = least(depth, rows - c);
        multiply(task->N, x + c * task->N, some, panels + c * NR, most * NR, here, sums + j - first, pitch, k + c == 0);
      }
    }
  }
}

/* Columns `first` to `last` of y. A tile of W has `panels` * NR columns and `depth` rows, a multiple of NR and at most LONG;
   the sums of `most` samples are under way at once. */
static void columns(const product_task *task, long first, long last, real *workspace) {
  const long T1 = task->T1, N = task->N, span = last - first, pitch = (span + NR - 1) / NR * NR;
  const long tile = task->depth * task->panels * NR;
  const int alone = task->B == 1 && !task->lies && task->stack_kind == REAL;
  real *sums = workspace, *x = sums + task->most * N * pitch, shift[span];
  real *s = x + task->most * N * reach(task->depth, alone);
  for (long b0 = 0; b0 < task->B; b0 += task->most) {
    const long samples = least(task->most, task->B - b0);
    if (alone)
      sum_rows(task, first, last, s, s + NR * (LONG + NR), sums, pitch, x);
    else
      sum_tiles(task, b0, samples, first, last, s, s + tile * T1, sums, pitch, x);
    for (long b = b0; b < b0 + samples; b++) {
      if (task->bias) {
        memset(shift, 0, span * sizeof(real));
        for (long t = 0; t < T1; t++)
          for (long c = 0; c < span; c++) shift[c] += task->w[b * T1 + t] * task->bias[t * task->J + first + c];
      }
      for (long n = 0; n < N; n++) {
        real *sum = sums + ((b - b0) * N + n) * pitch;
        if (task->bias)
          for (long c = 0; c < span; c++) sum[c] += shift[c];
        narrow(task->y, b * task->yb + n * task->yn + first, sum, span, task->x_kind);
      }
    }
  }
}

/* The next part of a task, and a thread's number among those that have come. */
INLINE long next(long *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

/* y[b, n, j] = sum_k x[b, n, k] W_b[k, j] + sum_t w[b, t] bias[t, j] for j from `first` to `last`.

   x [B, N, K] with strides xb, xn; y [B, N, J] with strides yb, yn, both stored as x_kind; stack [T1, J, K], or
   [T1, K, J] where `lies`, as stack_kind; w [B, T1]; bias [T1, J] or null. */
void merged_product(product_task *task) {
  real *workspace = task->workspace + next(&task->threads) * task->room;
  for (long j; (j = task->first + next(&task->parts) * task->across) < task->last;)
    columns(task, j, least(j + task->across, task->last), workspace);
}

/* sums[t] += <o, s[t]> over a block: o [NR, NR] with rows OUTER_COLUMNS apart, s [NR, T1, NR] from some t on. */
INLINE void inner(const int count, long T1, const real *o, const real *s, vec *sums) {
  vec low[5], high[5];
#pragma GCC unroll 5
  for (int i = 0; i < count; i++) low[i] = high[i] = (vec){0};
  for (long r = 0; r < NR; r++, o += OUTER_COLUMNS, s += T1 * NR) {
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

/* to[p][n][0:width] = from[n, p * width:(p + 1) * width] for N tokens, `pitch` apart, and as many p as hold the columns; padded
   with zeros. */
INLINE void gather_panels(real *to, const void *from, long at, long pitch, long N, long columns, const long width,
                          int kind) {
  for (long n = 0; n < N; n++)
    for (long p = 0; p * width < columns; p++) {
      real *here = to + (p * N + n) * width;
      const long begin = at + n * pitch + p * width, count = columns - p * width;
      if (count >= width) {
        widen(here, from, begin, width, kind);
      } else {
        memset(here, 0, width * sizeof(real));
        widen(here, from, begin, count, kind);
      }
    }
}

/* outer [rows, OUTER_COLUMNS] = dy^T x of one sample for columns of dy [N, OUTER_ROWS] and panels of x [panels, N, NR]. */
static void outer_product(real *outer, const real *dy, const real *x, long rows, long panels, long N) {
  if (rows < OUTER_ROWS) memset(outer, 0, OUTER_ROWS * OUTER_COLUMNS * sizeof(real));
  for (long p = 0; p < panels; p++)
    product(rows, N, dy, 1, OUTER_ROWS, x + p * N * NR, NR, outer + p * NR, OUTER_COLUMNS, 1);
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
      gather_panels(dy + b * part, task->dy, (b0 + b) * task->yb + first, task->yn, N, span, OUTER_ROWS, task->x_kind);
    for (long k = 0; k < K; k += OUTER_COLUMNS) {
      const long columns = least(OUTER_COLUMNS, K - k), wide = (columns + NR - 1) / NR;
      for (long b = 0; b < samples; b++)
        gather_panels(x + b * N * OUTER_COLUMNS, task->x, (b0 + b) * task->xb + k, task->xn, N, columns, NR, task->x_kind);
      for (long j = 0; j < span; j += OUTER_ROWS) {
        const long rows = least(OUTER_ROWS, span - j), high = (rows + NR - 1) / NR;
        gather_tile(s, task->stack, task->stack_kind, T1, J * K, K, (first + j) * K + k, rows, columns, 0);
        for (long b = 0; b < samples; b += GROUP) {
          const long count = least(GROUP, samples - b);
          for (long g = 0; g < count; g++)
            outer_product(outer + g * tile, dy + (b + g) * part + j * N, x + (b + g) * N * OUTER_COLUMNS, rows, wide, N);
          memset(sums, 0, sizeof sums);
          for (long r = 0; r < high; r++)
            for (long c = 0; c < wide; c++)
              for (long g = 0; g < count; g++)
                inner_products(T1, outer + g * tile + r * NR * OUTER_COLUMNS + c * NR, s + (r * wide + c) * NR * T1 * NR,
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

/* What a caller must know: {NR, GROUP, LONG, OUTER_ROWS, OUTER_COLUMNS, whether FLOAT16 is known} */
void constants(long *out) {
#ifdef __FLT16_MAX__
  const long known = 1;
#else
  const long known = 0;
#endif
  const long values[] = {NR, GROUP, LONG, OUTER_ROWS, OUTER_COLUMNS, known};
  memcpy(out, values, sizeof values);
}
