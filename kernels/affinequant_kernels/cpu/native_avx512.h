// The arithmetic of native.c with AVX512-VNNI.
//
// Sixteen output features lie in the lanes of a vector, four columns in the bytes of a lane: sums never go across lanes, so
// that a group costs a scale and no more.

#define IN_LANES 1
#define VECTORS 2             // of sixteen output features, that come together
#define FEATURES (16 * VECTORS)
#define NEAR (1 << 19)
#define AHEAD 2048            // bytes of codes that are asked for before their turn

static __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << (count < 0 ? 0 : count)) - 1); }

// Sixteen numbers of any type, as fp32.
static __m512 load(const void *x, enum type type, int64_t at, __mmask16 mask)
{
    if (type == FLOAT32)
        return _mm512_maskz_loadu_ps(mask, (const float *)x + at);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + at);
    if (type == FLOAT16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static __m256i to_bfloat16(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc0)));
}

static void store(void *out, enum type type, int64_t at, __mmask16 mask, __m512 value)
{
    if (type == FLOAT32)
        _mm512_mask_storeu_ps((float *)out + at, mask, value);
    else
        _mm256_mask_storeu_epi16((uint16_t *)out + at, mask, type == BFLOAT16 ? to_bfloat16(value)
                                 : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// `count` numbers of any type from `at` on, as fp32.
static void to_floats(const void *x, enum type type, int64_t at, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i += 16)
        _mm512_mask_storeu_ps(out + i, first(count - i), load(x, type, at + i, first(count - i)));
}

static void round_to(float *x, enum type type, int64_t count)
{
    for (int64_t i = 0; type != FLOAT32 && i < count; i += 16) {
        uint16_t half[16];
        __mmask16 mask = first(count - i);
        store(half, type, 0, mask, _mm512_maskz_loadu_ps(mask, x + i));
        _mm512_mask_storeu_ps(x + i, mask, load(half, type, 0, mask));
    }
}

// c [rows, columns] = a [rows, inner] b [inner, columns]: `height` rows and up to 64 columns of it.
static inline __attribute__((always_inline)) void product_tile(
    int height, const float *a, int64_t a_row, int64_t a_column, const float *b, float *c, int64_t inner, int64_t columns,
    int64_t at)
{
    __mmask16 mask[4];
    __m512 sum[4][4];
    for (int v = 0; v < 4; v++)
        mask[v] = first(columns - at - 16 * v);
    for (int i = 0; i < height; i++)
        for (int v = 0; v < 4; v++)
            sum[i][v] = _mm512_setzero_ps();
    for (int64_t j = 0; j < inner; j++)
        for (int v = 0; v < 4; v++) {
            __m512 row = _mm512_maskz_loadu_ps(mask[v], b + j * columns + at + 16 * v);
            for (int i = 0; i < height; i++)
                sum[i][v] = _mm512_fmadd_ps(_mm512_set1_ps(a[i * a_row + j * a_column]), row, sum[i][v]);
        }
    for (int i = 0; i < height; i++)
        for (int v = 0; v < 4; v++)
            _mm512_mask_storeu_ps(c + i * columns + at + 16 * v, mask[v], sum[i][v]);
}

static void product(const float *a, int64_t a_row, int64_t a_column, const float *b, float *c, int64_t rows, int64_t inner,
                    int64_t columns)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
        for (int64_t at = 0; at < columns; at += 64)
            product_tile(4, a + i * a_row, a_row, a_column, b, c + i * columns, inner, columns, at);
    for (; i < rows; i++)
        for (int64_t at = 0; at < columns; at += 64)
            product_tile(1, a + i * a_row, a_row, a_column, b, c + i * columns, inner, columns, at);
}

// Bits of a float as integers in the order of the numbers: NaNs lie outside of the infinities.
static __m512i ordered(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x);
    return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)));
}

// The least and the greatest of k numbers, in that order.
static void extremes(const float *x, int64_t k, int32_t *low, int32_t *high)
{
    __m512i least = _mm512_set1_epi32(INT32_MAX), most = _mm512_set1_epi32(INT32_MIN);
    for (int64_t i = 0; i < k; i += 16) {
        __mmask16 mask = first(k - i);
        __m512i value = ordered(_mm512_maskz_loadu_ps(mask, x + i));
        least = _mm512_mask_min_epi32(least, mask, least, value);
        most = _mm512_mask_max_epi32(most, mask, most, value);
    }
    *low = _mm512_reduce_min_epi32(least);
    *high = _mm512_reduce_max_epi32(most);
}

// q = clamp(round(x inverse) + shift, -half, half - 1), and its sum.
static int32_t to_codes(const float *x, int64_t k, float inverse, float shift, float half, int8_t *q)
{
    const __m512 smallest = _mm512_set1_ps(-half), largest = _mm512_set1_ps(half - 1.0f);
    const __m512 by = _mm512_set1_ps(inverse), add = _mm512_set1_ps(shift);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 16) {
        __mmask16 mask = first(k - i);
        __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), by);
        value = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        value = _mm512_max_ps(_mm512_min_ps(_mm512_add_ps(value, add), largest), smallest);
        __m512i code = _mm512_cvtps_epi32(value);
        sum = _mm512_mask_add_epi32(sum, mask, sum, code);
        _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(code));
    }
    return _mm512_reduce_add_epi32(sum);
}

// Sums of products and of outputs: of at most 8 rows, FEATURES output features each.
typedef __m512i Sums[8][VECTORS];
typedef __m512 Outputs[8][VECTORS];

// Columns that share a scale, of the weight or of rows: all where neither has groups.
static int64_t group_size(const Layer *layer) { return layer->group ? layer->group : whole(layer->k); }

// Two numbers of 16 bits in 32.
static inline int32_t pair(int32_t low, int32_t high) { return (low & 0xffff) | (int32_t)((uint32_t)high << 16); }

// What the columns of a group add to the sums of `height` rows: acc += codes q.
static inline __attribute__((always_inline)) void add_group(int height, enum kind kind, const uint8_t *const codes[VECTORS],
                                                            Rows rows, int64_t row, int64_t begin, int64_t end, Sums acc)
{
    const __m512i nibble = _mm512_set1_epi8(0x0f);
    Sums more; // of few rows, whose sums would wait for each other
    for (int i = 0; i < height; i++)
        for (int v = 0; v < VECTORS; v++)
            acc[i][v] = more[i][v] = _mm512_setzero_si512();
    for (int64_t c = begin; c < end; c += 8) {
        __m512i low[VECTORS], high[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            if (kind == NIBBLE_LANES) {
                const uint8_t *here = codes[v] + 8 * c;
                _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T0);
                __m512i two = _mm512_loadu_si512(here);
                low[v] = _mm512_and_si512(two, nibble);
                high[v] = _mm512_and_si512(_mm512_srli_epi16(two, 4), nibble);
            } else {
                const uint8_t *here = codes[v] + 16 * c;
                _mm_prefetch((const char *)here + AHEAD, _MM_HINT_T0);
                _mm_prefetch((const char *)here + AHEAD + 64, _MM_HINT_T0);
                low[v] = _mm512_loadu_si512(here);
                high[v] = _mm512_loadu_si512(here + 64);
            }
        for (int i = 0; i < height; i++) {
            const int8_t *q = rows.q + (row + i) * rows.stride + c;
            int32_t first_four, next_four; // apart: eight bytes would be loaded at once, and then taken apart
            memcpy(&first_four, q, 4);
            memcpy(&next_four, q + 4, 4);
            for (int v = 0; v < VECTORS; v++)
                acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], low[v], _mm512_set1_epi32(first_four));
            for (int v = 0; v < VECTORS; v++)
                if (height <= 2)
                    more[i][v] = _mm512_dpbusd_epi32(more[i][v], high[v], _mm512_set1_epi32(next_four));
                else
                    acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], high[v], _mm512_set1_epi32(next_four));
        }
    }
    for (int i = 0; height <= 2 && i < height; i++)
        for (int v = 0; v < VECTORS; v++)
            acc[i][v] = _mm512_add_epi32(acc[i][v], more[i][v]);
}

// Takes off sums of group g what zero points are worth: offset * sum of the row's codes + column sum * zero point of the row.
static inline __attribute__((always_inline)) void take_off(int height, enum kind kind, const Layer *layer, Rows rows,
                                                           int64_t row, int64_t at, int64_t g, Sums acc)
{
    const int64_t n = layer->n, size = group_size(layer), groups = layer->group ? layer->k / size : 1;
    const int by_row = layer->row_groups || !layer->group;
    const int32_t *sums = by_row ? rows.sum : rows.groups;
    __m512i off[VECTORS], colsum[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
        const int64_t place = at + 16 * v;
        const __mmask16 mask = first(n - place);
        off[v] = _mm512_set1_epi32(kind == NIBBLE_LANES ? 8 : 128);
        if (layer->zero) {
            const int8_t *zero = layer->zero + (layer->weight_groups ? g * n : 0);
            off[v] = _mm512_add_epi32(off[v], _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, zero + place)));
        }
        colsum[v] = _mm512_setzero_si512();
        if (by_row && layer->colsum)
            colsum[v] = _mm512_maskz_loadu_epi32(mask, layer->colsum + g * n + place);
    }
    if (kind == NIBBLE_LANES && size <= BLOCK) { // all fit 16 bits: both products are one instruction
        for (int v = 0; v < VECTORS; v++)
            off[v] = _mm512_or_si512(off[v], _mm512_slli_epi32(colsum[v], 16));
        for (int i = 0; i < height; i++) {
            const int64_t place = (row + i) * groups + g;
            const __m512i less = _mm512_set1_epi32(pair(-sums[place], by_row ? -rows.zero[place] : 0));
            for (int v = 0; v < VECTORS; v++)
                acc[i][v] = _mm512_dpwssd_epi32(acc[i][v], off[v], less);
        }
    } else
        for (int i = 0; i < height; i++) {
            const int64_t place = (row + i) * groups + g;
            const __m512i sum = _mm512_set1_epi32(sums[place]), zero = _mm512_set1_epi32(by_row ? rows.zero[place] : 0);
            for (int v = 0; v < VECTORS; v++) {
                __m512i less = _mm512_add_epi32(_mm512_mullo_epi32(off[v], sum), _mm512_mullo_epi32(colsum[v], zero));
                acc[i][v] = _mm512_sub_epi32(acc[i][v], less);
            }
        }
}

// y += acc scaled: each scale that is a group's, or that there is one of.
static inline __attribute__((always_inline)) void add_scaled(int height, const Layer *layer, Rows rows, int64_t row, int64_t at,
                                                             int64_t g, Sums acc, Outputs y)
{
    const int64_t groups = layer->group ? layer->k / layer->group : 1;
    const int by_row = layer->row_groups || !layer->group, by_weight = layer->weight_groups || !layer->group;
    __m512 scale[VECTORS]; // 1 where there is none: that rounds nothing
    for (int v = 0; v < VECTORS; v++) {
        const int64_t place = at + 16 * v;
        scale[v] = by_weight ? _mm512_maskz_loadu_ps(first(layer->n - place), layer->scale + g * layer->n + place) : _mm512_set1_ps(1);
    }
    for (int i = 0; i < height; i++) {
        const __m512 by = _mm512_set1_ps(by_row ? rows.scale[(row + i) * groups + g] : 1);
        for (int v = 0; v < VECTORS; v++)
            y[i][v] = _mm512_add_ps(y[i][v], _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][v]), scale[v]), by));
    }
}

// Outputs, but for what is not a group's: a zero point or a scale of the row, or a scale of the weight; and the bias.
static inline __attribute__((always_inline)) void store_outputs(int height, const Layer *layer, Rows rows, int64_t row,
                                                                int64_t at, const float *bias, void *out, enum type type,
                                                                Outputs y)
{
    for (int v = 0; v < VECTORS; v++) {
        const int64_t place = at + 16 * v;
        const __mmask16 mask = first(layer->n - place);
        for (int i = 0; i < height; i++) {
            if (layer->group && !layer->row_groups) {
                __m512 colsum = _mm512_maskz_loadu_ps(mask, (const float *)layer->colsum + place);
                __m512 less = _mm512_mul_ps(_mm512_set1_ps((float)rows.zero[row + i]), colsum);
                y[i][v] = _mm512_mul_ps(_mm512_sub_ps(y[i][v], less), _mm512_set1_ps(rows.scale[row + i]));
            } else if (layer->group && !layer->weight_groups)
                y[i][v] = _mm512_mul_ps(y[i][v], _mm512_maskz_loadu_ps(mask, layer->scale + place));
            if (bias)
                y[i][v] = _mm512_add_ps(y[i][v], _mm512_maskz_loadu_ps(mask, bias + place));
            store(out, type, (row + i) * layer->n + place, mask, y[i][v]);
        }
    }
}

// FEATURES output features from `at` on, of `height` rows from `row` on.
static inline __attribute__((always_inline)) void multiply_tile(
    int height, enum kind kind, const Layer *layer, Rows rows, int64_t row, int64_t at, const float *bias, void *out,
    enum type type)
{
    const int64_t n = layer->n, size = group_size(layer), panel = whole(layer->k) * (kind == NIBBLE_LANES ? 8 : 16);
    const uint8_t *codes[VECTORS];
    Sums acc;
    Outputs y;
    for (int v = 0; v < VECTORS; v++) {
        codes[v] = (const uint8_t *)layer->codes + (at / 16 + (at + 16 * v < n ? v : 0)) * panel;
        for (int i = 0; i < height; i++)
            y[i][v] = _mm512_setzero_ps();
    }
    for (int64_t g = 0; g * size < layer->k; g++) {
        add_group(height, kind, codes, rows, row, g * size, (g + 1) * size, acc);
        take_off(height, kind, layer, rows, row, at, g, acc);
        if (type != INTEGER)
            add_scaled(height, layer, rows, row, at, g, acc, y);
    }
    if (type != INTEGER)
        store_outputs(height, layer, rows, row, at, bias, out, type, y);
    else
        for (int i = 0; i < height; i++)
            for (int v = 0; v < VECTORS; v++)
                _mm512_mask_storeu_epi32((int32_t *)out + (row + i) * n + at + 16 * v, first(n - at - 16 * v), acc[i][v]);
}

// FEATURES output features from `at` on, of the rows `row` to `end`.
static inline __attribute__((always_inline)) void multiply_rows(enum kind kind, const Layer *layer, Rows rows, int64_t row,
                                                                int64_t end, int64_t at, const float *bias, void *out, enum type type)
{
    for (; row + 8 <= end; row += 8)
        multiply_tile(8, kind, layer, rows, row, at, bias, out, type);
    if (row + 4 <= end) {
        multiply_tile(4, kind, layer, rows, row, at, bias, out, type);
        row += 4;
    }
    switch (end - row) {
    case 3: multiply_tile(3, kind, layer, rows, row, at, bias, out, type); break;
    case 2: multiply_tile(2, kind, layer, rows, row, at, bias, out, type); break;
    case 1: multiply_tile(1, kind, layer, rows, row, at, bias, out, type); break;
    }
}

static void multiply(const Layer *layer, Rows rows, int64_t row, int64_t end, int64_t at, const float *bias, void *out,
                     enum type type)
{
    if (layer->kind == NIBBLE_LANES)
        multiply_rows(NIBBLE_LANES, layer, rows, row, end, at, bias, out, type);
    else
        multiply_rows(BYTE_LANES, layer, rows, row, end, at, bias, out, type);
}

// One row of affq_epilogue.
static void finish(const float *acc, int64_t n, const float *scale, const int32_t *colsum, float row_scale,
                   const int32_t *zero, const float *bias, void *out, enum type type, int64_t start)
{
    for (int64_t at = 0; at < n; at += 16) {
        __mmask16 mask = first(n - at);
        __m512 y = _mm512_maskz_loadu_ps(mask, acc + at);
        if (zero) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(mask, colsum + at));
            y = _mm512_sub_ps(y, _mm512_mul_ps(sum, _mm512_set1_ps((float)*zero)));
        }
        y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, scale + at)), _mm512_set1_ps(row_scale));
        if (bias)
            y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, bias + at));
        store(out, type, start + at, mask, y);
    }
}
