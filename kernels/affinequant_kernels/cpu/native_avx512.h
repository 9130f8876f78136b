// The arithmetic of native.c with AVX512-VNNI.

#define MULTIPLIES 0

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

// The sums of the elements of four vectors.
static __m128i sums(const __m512i v[4])
{
    __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

// Four output features from `at` on, of `height` rows from `row` on; codes are 4 bits.
static inline __attribute__((always_inline)) void multiply_tile(
    int height, const Layer *layer, Rows rows, int64_t row, int64_t at, const float *bias, void *out, enum type type)
{
    const int64_t k = whole(layer->k), n = layer->n, left = n - at < 4 ? n - at : 4;
    const __m512i nibble = _mm512_set1_epi8(0x0f), flip = _mm512_set1_epi8((char)0x88);
    const uint8_t *codes[4];
    __m512i acc[4][4];
    for (int r = 0; r < 4; r++)
        codes[r] = (const uint8_t *)layer->codes + (at + (r < left ? r : left - 1)) * (k / 2);
    for (int i = 0; i < height; i++)
        for (int r = 0; r < 4; r++)
            acc[i][r] = _mm512_setzero_si512();
    for (int64_t b = 0; b < k; b += BLOCK) {
        __m512i low[4], high[4];
        for (int r = 0; r < 4; r++) { // code + 8, which the instruction wants unsigned
            _mm_prefetch((const char *)codes[r] + b / 2 + 4 * k, _MM_HINT_T0); // eight rows on
            __m512i both = _mm512_xor_si512(_mm512_loadu_si512(codes[r] + b / 2), flip);
            low[r] = _mm512_and_si512(both, nibble);
            high[r] = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
        }
        for (int i = 0; i < height; i++) {
            const int8_t *q = rows.q + (row + i) * rows.stride + b;
            __m512i begin = _mm512_loadu_si512(q), end = _mm512_loadu_si512(q + BLOCK / 2);
            for (int r = 0; r < 4; r++)
                acc[i][r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[i][r], low[r], begin), high[r], end);
        }
    }
    const __mmask8 mask = (__mmask8)((1 << left) - 1);
    __m128i off = _mm_set1_epi32(8);
    if (layer->zero) {
        int32_t zeros = 0;
        memcpy(&zeros, layer->zero + at, left);
        off = _mm_add_epi32(off, _mm_cvtepi8_epi32(_mm_cvtsi32_si128(zeros)));
    }
    __m128i colsum = _mm_maskz_loadu_epi32(mask, layer->colsum + at);
    __m128 scale = _mm_maskz_loadu_ps(mask, layer->scale + at);
    for (int i = 0; i < height; i++) {
        __m128i value = _mm_sub_epi32(sums(acc[i]), _mm_mullo_epi32(off, _mm_set1_epi32(rows.sum[row + i])));
        value = _mm_sub_epi32(value, _mm_mullo_epi32(colsum, _mm_set1_epi32(rows.zero[row + i])));
        __m128 y = _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(value), scale), _mm_set1_ps(rows.scale[row + i]));
        if (bias)
            y = _mm_add_ps(y, _mm_maskz_loadu_ps(mask, bias + at));
        store(out, type, (row + i) * n + at, mask, _mm512_castps128_ps512(y));
    }
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
