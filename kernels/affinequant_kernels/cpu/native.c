// A layer on a CPU: transform, quantise and multiply in one call, weights of 4 bits read as the 4 bits that they are.
//
// Compiled by native.py at first use, for x86-64 with AVX512-VNNI or with AVX2. The arithmetic of quantisers and epilogue is
// that of reference.py, bit for bit (so -ffp-contract=off); transforms may add in another order, and use fused multiply-adds.
//
// Letters as in layer.py: m rows (tokens), k input features, n output features.

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 128     // columns of a block of the layout hs128
#define SCALE_FLOOR 1e-8f
#define INFINITE 0x7f800000

// INTEGER: sums of products, neither scaled nor with a bias.
enum type { FLOAT32, BFLOAT16, FLOAT16, INTEGER };

// How codes lie. With AVX2: NIBBLES [n, k / 2] in the layout hs128; SMALL [n, k] unsigned, the code + 16, which is below 32,
// filled up to whole blocks; WIDE [n, k] signed bytes. With AVX512, filled up to whole blocks and sixteen features:
// NIBBLE_LANES [n / 16, k / 8, 16, 4], the code + 8, of eight columns the first four in low nibbles; BYTE_LANES
// [n / 16, k / 4, 16, 4], the code + 128.
enum kind { NIBBLES, SMALL, WIDE, NIBBLE_LANES, BYTE_LANES };

// One factor of a transform: left [rows, rows] and right [columns, columns] of a Kronecker product, or, where left is
// null, `rows` blocks [columns, columns] that act one after the other (one of them on every piece).
typedef struct {
    const float *left, *right;
    int64_t rows, columns;
} Factor;

typedef struct {
    int64_t n, k, factors, kind;
    // Columns that share a scale, of the weight, of rows or of both, where codes are nibbles: 32, 64 or whole blocks; 0: all.
    // Whether those of the weight, and into how many groups rows are quantised; 0: a row has one scale.
    int64_t group, weight_groups, row_groups;
    const void *codes;
    const float *scale;      // [n], or [groups, n]
    const int8_t *zero;      // the same, or null
    const int32_t *colsum;   // [n], in groups of fp32, for rows in groups [groups, n]; null where rows have no zero points
    const Factor *factor;
} Layer;

typedef struct {
    int8_t *q;               // [m, stride], zeros after column k
    int16_t *wide;           // the same, or null where nobody reads it
    int64_t stride;
    float *scale;            // [m], in groups [m, groups]
    int32_t *zero, *sum;     // the same
    int32_t *groups;         // [m, groups]: sums within groups of the weight, or null
} Rows;

static const void *at(const void *x, enum type type, int64_t index)
{
    return (const char *)x + index * (type == FLOAT32 || type == INTEGER ? 4 : 2);
}

static int64_t whole(int64_t k) { return (k + BLOCK - 1) / BLOCK * BLOCK; }

// Each header says whether it reads codes IN_LANES, how many output FEATURES come together, and how many bytes of quantised
// rows are NEAR: held by a core's own cache while the weights go by.
#ifdef __AVX512VNNI__
#include "native_avx512.h"
#else
#include "native_avx2.h"
#endif

// One row times one factor, into `out`; `spare` holds a row too.
static void apply(const Factor *factor, enum type type, int64_t k, const float *x, float *spare, float *out)
{
    int64_t b = factor->columns;
    if (factor->left) {
        product(x, b, 1, factor->right, spare, factor->rows, b, b);
        round_to(spare, type, k);
        product(factor->left, 1, factor->rows, spare, out, factor->rows, factor->rows, b);
    } else if (factor->rows == 1)
        product(x, b, 1, factor->right, out, k / b, b, b);
    else
        for (int64_t i = 0; i < factor->rows; i++)
            product(x + i * b, b, 1, factor->right + i * b * b, out + i * b, 1, b, b);
}

static float from_ordered(int32_t bits)
{
    float x;
    bits ^= (bits >> 31) & 0x7fffffff;
    memcpy(&x, &bits, 4);
    return x;
}

static void widen(Rows rows, int64_t row)
{
    for (int64_t i = row * rows.stride; rows.wide && i < (row + 1) * rows.stride; i++)
        rows.wide[i] = rows.q[i];
}

// How many scales a row has, and sums within groups beside them.
static int64_t scales(const Layer *layer) { return layer->row_groups ? layer->row_groups : 1; }
static int64_t apart(const Layer *layer) { return layer->group && !layer->row_groups ? layer->k / layer->group : 0; }

// As reference.row_quant, for one row of fp32, or a group of it; `at` its place among the scales.
static void quantise(const float *x, int64_t k, int bits, int symmetric, float clip, Rows rows, int8_t *q, int64_t at)
{
    const float half = (float)(1 << (bits - 1));
    int32_t low, high;
    float scale, inverse, shift = 0.0f;
    extremes(x, k, &low, &high);
    if (low < (INFINITE ^ -1) || high > INFINITE) // a NaN
        scale = NAN;
    else {
        float bottom = from_ordered(low), top = from_ordered(high);
        if (symmetric)
            scale = fmaxf(fabsf(bottom), fabsf(top)) * clip / (half - 1.0f);
        else {
            bottom = fminf(bottom, 0.0f) * clip;
            top = fmaxf(top, 0.0f) * clip;
            scale = (top - bottom) / (2.0f * half - 1.0f);
        }
        scale = fmaxf(scale, SCALE_FLOOR);
        inverse = 1.0f / scale;
        if (!symmetric)
            shift = fminf(fmaxf(nearbyintf(-bottom * inverse) - half, -half), half - 1.0f);
    }
    rows.scale[at] = scale;
    rows.zero[at] = rows.sum[at] = 0;
    if (isfinite(scale)) {
        rows.zero[at] = (int32_t)shift;
        rows.sum[at] = to_codes(x, k, inverse, shift, half, q);
    } else
        memset(q, 0, k);
}

// A row that is quantised already.
static void take_row(const int8_t *q, int64_t k, Rows rows, int64_t row)
{
    int8_t *here = memcpy(rows.q + row * rows.stride, q, k);
    memset(here + k, 0, rows.stride - k);
    rows.sum[row] = rows.zero[row] = 0;
    for (int64_t i = 0; i < k; i++)
        rows.sum[row] += here[i];
    widen(rows, row);
}

static void sum_groups(const Layer *layer, Rows rows, int64_t row)
{
    const int8_t *q = rows.q + row * rows.stride;
    int32_t *sum = rows.groups + row * (layer->k / layer->group);
    for (int64_t start = 0; start < layer->k; start += layer->group, sum++) {
        *sum = 0;
        for (int64_t i = 0; i < layer->group; i++)
            *sum += q[start + i];
    }
}

static void quantise_row(const Layer *layer, const void *x, enum type type, int bits, int symmetric, float clip, Rows rows,
                         int64_t row, float *scratch)
{
    int64_t k = layer->k;
    float *here = scratch, *spare = scratch + k, *next = scratch + 2 * k;
    const float *value = (const float *)x + row * k;
    if (type != FLOAT32) {
        to_floats(x, type, row * k, k, here);
        value = here;
    }
    for (int64_t f = 0; f < layer->factors; f++) {
        apply(&layer->factor[f], type, k, value, spare, next);
        if (f + 1 < layer->factors)
            round_to(next, type, k);
        value = next;
        next = here;
        here = (float *)value;
    }
    const int64_t groups = scales(layer), size = k / groups;
    int8_t *q = rows.q + row * rows.stride;
    for (int64_t g = 0; g < groups; g++)
        quantise(value + g * size, size, bits, symmetric, clip, rows, q + g * size, row * groups + g);
    memset(q + k, 0, rows.stride - k);
    widen(rows, row);
    if (rows.groups)
        sum_groups(layer, rows, row);
}

// Bytes that m rows take for a layer, and where in them what lies.
static int64_t rows_size(const Layer *layer, int64_t m)
{
    return m * (12 * scales(layer) + 4 * apart(layer) + whole(layer->k) * (layer->kind == WIDE ? 3 : 1));
}

static Rows rows_in(const Layer *layer, int64_t m, char *memory)
{
    const int64_t k = whole(layer->k), count = m * scales(layer);
    float *scale = (float *)memory;
    int32_t *sums = (int32_t *)scale + count, *groups = sums + 2 * count, *next = groups + m * apart(layer);
    int16_t *wide = layer->kind == WIDE ? (int16_t *)next : NULL;
    return (Rows){wide ? (int8_t *)(wide + m * k) : (int8_t *)next, wide, k, scale, sums, sums + count,
                  apart(layer) ? groups : NULL};
}

// Rows x [m, k] through the layer's factors and a quantiser, into q [m, k], scale, zero and sum [m, groups]. Returns 0, or 1: no memory.
int affq_rows(const Layer *layer, const void *x, int x_type, int64_t m, int bits, int symmetric, float clip, int threads,
              int8_t *q, float *scale, int32_t *zero, int32_t *sum)
{
    Rows rows = {q, NULL, layer->k, scale, zero, sum, NULL};
    float *scratch = malloc(sizeof(float) * 3 * layer->k * threads + 1);
    if (!scratch)
        return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int64_t thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; row++)
            quantise_row(layer, x, x_type, bits, symmetric, clip, rows, row, scratch + 3 * layer->k * thread);
    }
    free(scratch);
    return 0;
}

// out [m, n] = (acc - zero colsum) scale row_scale + bias, acc [m, n] in fp32 whose integers are exact; zero may be null.
void affq_epilogue(const float *acc, int64_t m, int64_t n, const float *scale, const int32_t *colsum, const float *row_scale,
                   const int32_t *zero, const float *bias, int threads, void *out, int out_type)
{
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < m; row++)
        finish(acc + row * n, n, scale, colsum, row_scale[row], zero ? zero + row : NULL, bias, out, out_type, row * n);
}

// As many of m rows as stay near while the weights go by.
static int64_t together(const Layer *layer, int64_t m)
{
    int64_t count = 4 * (NEAR / (4 * whole(layer->k) * (layer->kind == WIDE ? 2 : 1)) + 1);
    return count < m ? count : m;
}

// The whole layer on x [m, k]: out [m, n]. Returns 0, or 1: no memory.
int affq_linear(const Layer *layer, const void *x, int x_type, int64_t m, int bits, int symmetric, float clip, int threads,
                const float *bias, void *out, int out_type)
{
    const int64_t alone = 3 * sizeof(float) * layer->k, count = together(layer, m);
    char *scratch = malloc(rows_size(layer, count) + alone * threads + 64);
    if (!scratch)
        return 1;
    Rows rows = rows_in(layer, count, scratch + alone * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < m; start += count) {
        const int64_t here = m - start < count ? m - start : count;
        float *own = (float *)(scratch + alone * omp_get_thread_num());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < here; row++)
            quantise_row(layer, at(x, x_type, start * layer->k), x_type, bits, symmetric, clip, rows, row, own);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < layer->n; n += FEATURES)
            multiply(layer, rows, 0, here, n, bias, (char *)at(out, out_type, start * layer->n), out_type);
    }
    free(scratch);
    return 0;
}

int affq_in_lanes(void) { return IN_LANES; }

// The product alone: out int32 [m, n] of q [m, k] and codes of a kind. Returns 0, or 1: no memory.
int affq_product(const void *codes, int kind, int64_t n, int64_t k, const int8_t *q, int64_t m, int threads, int32_t *out)
{
    const Layer layer = {n, k, 0, kind, 0, 0, 0, codes, NULL, NULL, NULL, NULL};
    const int64_t count = together(&layer, m);
    char *scratch = malloc(rows_size(&layer, count) + 64);
    if (!scratch)
        return 1;
    Rows rows = rows_in(&layer, count, scratch);
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < m; start += count) {
        const int64_t here = m - start < count ? m - start : count;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < here; row++)
            take_row(q + (start + row) * k, k, rows, row);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < n; at += FEATURES)
            multiply(&layer, rows, 0, here, at, NULL, out + start * n, INTEGER);
    }
    free(scratch);
    return 0;
}
