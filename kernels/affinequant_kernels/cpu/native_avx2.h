// The arithmetic of native.c with AVX2, FMA and F16C.
//
// maddubs adds pairs of products of unsigned by signed bytes in int16. With weights of at most 31 and activations of at most
// 128 in magnitude four such pairs are at most 31744, so that no sum of four can saturate; wider weights go as int16.

#define IN_LANES 0
#define FEATURES 4
#define NEAR (1 << 17)
#define STRETCH 1024 // columns of four rows that a first-level cache holds while four output features go by

// Eight numbers of any type as fp32; those after `count` are 0.
static __m256 load(const void *x, enum type type, int64_t at, int64_t count)
{
    uint32_t rest[8] = {0};
    const char *from = (const char *)x + at * (type == FLOAT32 ? 4 : 2);
    if (count < 8)
        from = memcpy(rest, from, (count < 0 ? 0 : count) * (type == FLOAT32 ? 4 : 2));
    if (type == FLOAT32)
        return _mm256_loadu_ps((const float *)from);
    __m128i half = _mm_loadu_si128((const __m128i *)from);
    if (type == FLOAT16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

static __m128i to_bfloat16(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}

static __m128i to_half(__m256 x, enum type type)
{
    return type == BFLOAT16 ? to_bfloat16(x) : _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// The first `count` of eight numbers.
static void store(void *out, enum type type, int64_t at, int64_t count, __m256 value)
{
    uint32_t all[8];
    char *to = (char *)out + at * (type == FLOAT32 ? 4 : 2), *here = count < 8 ? (char *)all : to;
    if (type == FLOAT32)
        _mm256_storeu_ps((float *)here, value);
    else
        _mm_storeu_si128((__m128i *)here, to_half(value, type));
    if (count < 8)
        memcpy(to, all, count * (type == FLOAT32 ? 4 : 2));
}

// `count` numbers of any type from `at` on, as fp32.
static void to_floats(const void *x, enum type type, int64_t at, int64_t count, float *out)
{
    for (int64_t i = 0; i < count; i += 8)
        store(out, FLOAT32, i, count - i, load(x, type, at + i, count - i));
}

static void round_to(float *x, enum type type, int64_t count)
{
    for (int64_t i = 0; type != FLOAT32 && i < count; i += 8) {
        uint16_t half[8];
        store(half, type, 0, 8, load(x, FLOAT32, i, count - i));
        store(x, FLOAT32, i, count - i, load(half, type, 0, 8));
    }
}

// c [rows, columns] = a [rows, inner] b [inner, columns]: `height` rows and `vectors` times eight columns of it, of which
// `count` are there.
static inline __attribute__((always_inline)) void product_tile(
    int height, int vectors, int64_t count, const float *a, int64_t a_row, int64_t a_column, const float *b, float *c,
    int64_t inner, int64_t columns)
{
    __m256 sum[4][2], row[2];
    for (int i = 0; i < height; i++)
        sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    for (int64_t j = 0; j < inner; j++) {
        for (int v = 0; v < vectors; v++)
            row[v] = load(b, FLOAT32, j * columns + 8 * v, count - 8 * v);
        for (int i = 0; i < height; i++) {
            __m256 by = _mm256_broadcast_ss(a + i * a_row + j * a_column);
            for (int v = 0; v < vectors; v++)
                sum[i][v] = _mm256_fmadd_ps(by, row[v], sum[i][v]);
        }
    }
    for (int i = 0; i < height; i++)
        for (int v = 0; v < vectors; v++)
            store(c, FLOAT32, i * columns + 8 * v, count - 8 * v, sum[i][v]);
}

static inline __attribute__((always_inline)) void product_rows(int height, const float *a, int64_t a_row, int64_t a_column,
                                                               const float *b, float *c, int64_t inner, int64_t columns)
{
    int64_t at = 0;
    for (; at + 16 <= columns; at += 16)
        product_tile(height, 2, 16, a, a_row, a_column, b + at, c + at, inner, columns);
    for (; at + 8 <= columns; at += 8)
        product_tile(height, 1, 8, a, a_row, a_column, b + at, c + at, inner, columns);
    if (at < columns)
        product_tile(height, 1, columns - at, a, a_row, a_column, b + at, c + at, inner, columns);
}

static void product(const float *a, int64_t a_row, int64_t a_column, const float *b, float *c, int64_t rows, int64_t inner,
                    int64_t columns)
{
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4)
        product_rows(4, a + i * a_row, a_row, a_column, b, c + i * columns, inner, columns);
    for (; i < rows; i++)
        product_rows(1, a + i * a_row, a_row, a_column, b, c + i * columns, inner, columns);
}

// Bits of a float as integers in the order of the numbers: NaNs lie outside of the infinities.
static __m256i ordered(__m256 x)
{
    __m256i bits = _mm256_castps_si256(x);
    return _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(0x7fffffff)));
}

// The least and the greatest of k numbers, in that order.
static void extremes(const float *x, int64_t k, int32_t *low, int32_t *high)
{
    int32_t all[16];
    __m256i least = _mm256_set1_epi32(INT32_MAX), most = _mm256_set1_epi32(INT32_MIN);
    for (int64_t i = 0; i < k; i += 8) { // the last eight may overlap those before
        __m256i value = ordered(k < 8 ? load(x, FLOAT32, 0, k) : _mm256_loadu_ps(x + (i + 8 <= k ? i : k - 8)));
        least = _mm256_min_epi32(least, value);
        most = _mm256_max_epi32(most, value);
    }
    _mm256_storeu_si256((__m256i *)all, least);
    _mm256_storeu_si256((__m256i *)(all + 8), most);
    *low = all[0];
    *high = all[8];
    for (int i = 1; i < (k < 8 ? k : 8); i++) {
        *low = all[i] < *low ? all[i] : *low;
        *high = all[8 + i] > *high ? all[8 + i] : *high;
    }
}

static inline __m256i code_of(__m256 x, __m256 by, __m256 add, __m256 smallest, __m256 largest)
{
    __m256 value = _mm256_round_ps(_mm256_mul_ps(x, by), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(_mm256_add_ps(value, add), largest), smallest));
}

// q = clamp(round(x inverse) + shift, -half, half - 1), and its sum.
static int32_t to_codes(const float *x, int64_t k, float inverse, float shift, float half, int8_t *q)
{
    const __m256 smallest = _mm256_set1_ps(-half), largest = _mm256_set1_ps(half - 1.0f);
    const __m256 by = _mm256_set1_ps(inverse), add = _mm256_set1_ps(shift);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i total = _mm256_setzero_si256(), code[4];
    int32_t all[8], sum = 0;
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        for (int v = 0; v < 4; v++) {
            code[v] = code_of(_mm256_loadu_ps(x + i + 8 * v), by, add, smallest, largest);
            total = _mm256_add_epi32(total, code[v]);
        }
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(code[0], code[1]), _mm256_packs_epi32(code[2], code[3]));
        _mm256_storeu_si256((__m256i *)(q + i), _mm256_permutevar8x32_epi32(bytes, order));
    }
    _mm256_storeu_si256((__m256i *)all, total);
    for (int v = 0; v < 8; v++)
        sum += all[v];
    for (; i < k; i += 8) {
        _mm256_storeu_si256((__m256i *)all, code_of(load(x, FLOAT32, i, k - i), by, add, smallest, largest));
        for (int v = 0; v < 8 && i + v < k; v++) {
            q[i + v] = (int8_t)all[v];
            sum += all[v];
        }
    }
    return sum;
}

// The sums of the elements of four vectors.
static __m128i sums(__m256i a, __m256i b, __m256i c, __m256i d)
{
    __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// 128 columns of codes below 32, in the order of the columns.
static inline __attribute__((always_inline)) void unpack(enum kind kind, const uint8_t *codes, __m256i part[4])
{
    const __m256i nibble = _mm256_set1_epi8(0x0f), flip = _mm256_set1_epi8((char)0x88);
    if (kind == NIBBLES) // code + 8, which the instruction wants unsigned
        for (int v = 0; v < 2; v++) {
            __m256i both = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(codes + 32 * v)), flip);
            part[v] = _mm256_and_si256(both, nibble);
            part[2 + v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
        }
    else
        for (int v = 0; v < 4; v++)
            part[v] = _mm256_loadu_si256((const __m256i *)(codes + 32 * v));
}

// What 128 columns of codes below 32 add to `height` sums, each of a row of q.
static inline __attribute__((always_inline)) void add_narrow(int height, const __m256i part[4], const int8_t *q,
                                                             int64_t stride, __m256i *acc, int next)
{
    const __m256i one = _mm256_set1_epi16(1);
    for (int i = 0; i < height; i++) {
        const __m256i *at = (const __m256i *)(q + i * stride);
        __m256i begin = _mm256_add_epi16(_mm256_maddubs_epi16(part[0], _mm256_loadu_si256(at)),
                                         _mm256_maddubs_epi16(part[1], _mm256_loadu_si256(at + 1)));
        __m256i end = _mm256_add_epi16(_mm256_maddubs_epi16(part[2], _mm256_loadu_si256(at + 2)),
                                       _mm256_maddubs_epi16(part[3], _mm256_loadu_si256(at + 3)));
        acc[i * next] = _mm256_add_epi32(acc[i * next], _mm256_madd_epi16(_mm256_add_epi16(begin, end), one));
    }
}

// What `count` columns of signed bytes from `b` on, at most 16, add to sums[height][width].
static inline __attribute__((always_inline)) void add_wide(int height, int width, const char *const codes[], int64_t b,
                                                           int64_t count, const int16_t *q, int64_t stride, __m256i sum[4][4])
{
    __m256i by[4];
    for (int i = 0; i < height; i++)
        by[i] = _mm256_loadu_si256((const __m256i *)(q + i * stride + b));
    for (int r = 0; r < width; r++) {
        const char *here = codes[r] + b;
        char rest[16] = {0};
        if (count < 16)
            here = memcpy(rest, here, count);
        __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)here));
        for (int i = 0; i < height; i++)
            sum[i][r] = _mm256_add_epi32(sum[i][r], _mm256_madd_epi16(code, by[i]));
    }
}

// acc[height][width] of the columns `begin` to `end`: whole blocks, but for WIDE codes at the end of a row.
static inline __attribute__((always_inline)) void add_columns(int height, int width, enum kind kind, const char *const codes[],
                                                              Rows rows, int64_t row, int64_t begin, int64_t end,
                                                              __m256i acc[4][4], int first)
{
    const int64_t stride = rows.stride;
    __m256i sum[4][4];
    for (int i = 0; i < height; i++)
        for (int r = 0; r < width; r++)
            sum[i][r] = acc[i][first + r];
    int64_t b = begin;
    for (; b + BLOCK <= end; b += BLOCK) {
        for (int r = 0; r < width; r++) { // eight rows on
            const char *there = codes[first + r] + (kind == NIBBLES ? b / 2 + 4 * stride : b + 8 * stride);
            for (int line = 0; line < (kind == NIBBLES ? 1 : 2); line++)
                _mm_prefetch(there + 64 * line, _MM_HINT_T0);
        }
        if (kind == WIDE)
            for (int j = 0; j < BLOCK; j += 16)
                add_wide(height, width, codes + first, b + j, 16, rows.wide + row * stride, stride, sum);
        else
            for (int r = 0; r < width; r++) {
                __m256i part[4];
                unpack(kind, (const uint8_t *)codes[first + r] + (kind == NIBBLES ? b / 2 : b), part);
                add_narrow(height, part, rows.q + row * stride + b, stride, &sum[0][r], 4);
            }
    }
    for (; kind == WIDE && b < end; b += 16)
        add_wide(height, width, codes + first, b, end - b, rows.wide + row * stride, stride, sum);
    for (int i = 0; i < height; i++)
        for (int r = 0; r < width; r++)
            acc[i][first + r] = sum[i][r];
}

// total[height] of four output features from `at` on, two at a time where more would not fit the registers.
static inline __attribute__((always_inline)) void tile_sums(
    int height, enum kind kind, const Layer *layer, Rows rows, int64_t row, int64_t at, __m128i total[4])
{
    const int width = height > 1 ? 2 : 4;
    const int64_t k = kind == WIDE ? layer->k : whole(layer->k), bytes = kind == NIBBLES ? k / 2 : k;
    const int64_t left = layer->n - at < 4 ? layer->n - at : 4;
    __m256i acc[4][4];
    const char *codes[4];
    for (int r = 0; r < 4; r++)
        codes[r] = (const char *)layer->codes + (at + (r < left ? r : left - 1)) * bytes;
    for (int i = 0; i < height; i++)
        for (int r = 0; r < 4; r++)
            acc[i][r] = _mm256_setzero_si256();
    for (int64_t begin = 0; begin < k; begin += STRETCH)
        for (int r = 0; r < 4; r += width)
            add_columns(height, width, kind, codes, rows, row, begin, begin + STRETCH < k ? begin + STRETCH : k, acc, r);
    for (int i = 0; i < height; i++)
        total[i] = sums(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
}

static __m128i mask_of(int64_t left)
{
    return _mm_cmpgt_epi32(_mm_set1_epi32((int)left), _mm_setr_epi32(0, 1, 2, 3));
}

// What was added to codes, and their zero points.
static __m128i offset(const Layer *layer, const int8_t *zero, int64_t at, int64_t left)
{
    __m128i off = _mm_set1_epi32(layer->kind == NIBBLES ? 8 : layer->kind == SMALL ? 16 : 0);
    if (zero) {
        int32_t zeros = 0;
        if (left == 4) // a size that is known needs no call
            memcpy(&zeros, zero + at, 4);
        else
            memcpy(&zeros, zero + at, left);
        off = _mm_add_epi32(off, _mm_cvtepi8_epi32(_mm_cvtsi32_si128(zeros)));
    }
    return off;
}

// y plus bias to four places of the output.
static inline void store_four(__m128 y, const Layer *layer, int64_t row, int64_t at, int64_t left,
                              const float *bias, void *out, enum type type)
{
    if (bias)
        y = _mm_add_ps(y, _mm_maskload_ps(bias + at, mask_of(left)));
    at += row * layer->n;
    if (left == 4 && type == FLOAT32)
        _mm_storeu_ps((float *)out + at, y);
    else if (left == 4)
        _mm_storel_epi64((__m128i *)((uint16_t *)out + at), to_half(_mm256_castps128_ps256(y), type));
    else
        store(out, type, at, left, _mm256_castps128_ps256(y));
}

// Four output features from `at` on, of `height` rows from `row` on.
static inline __attribute__((always_inline)) void channel_tile(
    int height, const Layer *layer, Rows rows, int64_t row, int64_t at, const float *bias, void *out, enum type type)
{
    const int64_t n = layer->n, left = n - at < 4 ? n - at : 4;
    const __m128i mask = mask_of(left), off = offset(layer, layer->zero, at, left);
    __m128i total[4];
    switch (layer->kind) {
    case NIBBLES: tile_sums(height, NIBBLES, layer, rows, row, at, total); break;
    case SMALL: tile_sums(height, SMALL, layer, rows, row, at, total); break;
    default: tile_sums(height, WIDE, layer, rows, row, at, total);
    }
    __m128i colsum = layer->colsum ? _mm_maskload_epi32(layer->colsum + at, mask) : _mm_setzero_si128();
    __m128 scale = type == INTEGER ? _mm_setzero_ps() : _mm_maskload_ps(layer->scale + at, mask);
    for (int i = 0; i < height; i++) {
        __m128i value = _mm_sub_epi32(total[i], _mm_mullo_epi32(off, _mm_set1_epi32(rows.sum[row + i])));
        value = _mm_sub_epi32(value, _mm_mullo_epi32(colsum, _mm_set1_epi32(rows.zero[row + i])));
        if (type == INTEGER)
            _mm_maskstore_epi32((int32_t *)out + (row + i) * n + at, mask, value);
        else {
            __m128 y = _mm_mul_ps(_mm_mul_ps(_mm_cvtepi32_ps(value), scale), _mm_set1_ps(rows.scale[row + i]));
            store_four(y, layer, row + i, at, left, bias, out, type);
        }
    }
}

// 32 columns from `column` on of a row of NIBBLES, plus 8.
static inline __attribute__((always_inline)) __m256i piece(const uint8_t *codes, int64_t column)
{
    const __m128i half = _mm_cvtsi64_si128(column % BLOCK / (BLOCK / 2) * 4); // by how many bits to shift
    __m256i both = _mm256_loadu_si256((const __m256i *)(codes + column / BLOCK * (BLOCK / 2) + column % (BLOCK / 2)));
    both = _mm256_srl_epi16(_mm256_xor_si256(both, _mm256_set1_epi8((char)0x88)), half);
    return _mm256_and_si256(both, _mm256_set1_epi8(0x0f));
}

// The sums of four vectors of int16, each of `step` columns. 17 products of 15 by 128 fit int16: of 64 columns, 16 come
// together here; of 128 they would be 32, so those go on as int32.
static inline __attribute__((always_inline)) __m128i sums_of_16(int step, const __m256i v[4])
{
    const __m256i one = _mm256_set1_epi16(1);
    if (step == BLOCK)
        return sums(_mm256_madd_epi16(v[0], one), _mm256_madd_epi16(v[1], one), _mm256_madd_epi16(v[2], one),
                    _mm256_madd_epi16(v[3], one));
    __m256i all = _mm256_hadd_epi16(_mm256_hadd_epi16(v[0], v[1]), _mm256_hadd_epi16(v[2], v[3]));
    all = _mm256_madd_epi16(all, one);
    return _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

// The same with a scale per group of the weight, of the rows or of both, of NIBBLES; `step` columns of a group at a time, which is all of it up to a block.
static inline __attribute__((always_inline)) void group_tile(
    int height, int step, const Layer *layer, Rows rows, int64_t row, int64_t at, const float *bias, void *out, enum type type)
{
    const int64_t n = layer->n, left = n - at < 4 ? n - at : 4, stride = rows.stride, groups = layer->k / layer->group;
    const __m128i mask = mask_of(left);
    const int by_row = layer->row_groups > 0;
    const int32_t *sum_of = by_row ? rows.sum : rows.groups;
    const uint8_t *codes[4];
    __m128 y[4];
    for (int r = 0; r < 4; r++)
        codes[r] = (const uint8_t *)layer->codes + (at + (r < left ? r : left - 1)) * (stride / 2);
    for (int i = 0; i < height; i++)
        y[i] = _mm_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        __m128i total[4];
        for (int i = 0; i < height; i++)
            total[i] = _mm_setzero_si128();
        for (int64_t c = g * layer->group; c < (g + 1) * layer->group; c += step) {
            __m256i sum[4][4];
            for (int r = 0; r < 4; r++) {
                __m256i part[4];
                if (step == BLOCK)
                    unpack(NIBBLES, codes[r] + c / 2, part);
                else
                    for (int s = 0; s < step / 32; s++)
                        part[s] = piece(codes[r], c + 32 * s);
                for (int i = 0; i < height; i++) {
                    const __m256i *q = (const __m256i *)(rows.q + (row + i) * stride + c);
                    sum[i][r] = _mm256_maddubs_epi16(part[0], _mm256_loadu_si256(q));
                    for (int s = 1; s < step / 32; s++)
                        sum[i][r] = _mm256_add_epi16(sum[i][r], _mm256_maddubs_epi16(part[s], _mm256_loadu_si256(q + s)));
                }
            }
            for (int i = 0; i < height; i++)
                total[i] = _mm_add_epi32(total[i], sums_of_16(step, sum[i]));
        }
        const int64_t here = layer->weight_groups ? g * n : 0;
        __m128i off = offset(layer, layer->zero ? layer->zero + here : NULL, at, left);
        __m128i colsum = by_row ? _mm_maskload_epi32(layer->colsum + g * n + at, mask) : _mm_setzero_si128();
        __m128 scale = _mm_maskload_ps(layer->scale + here + at, mask);
        for (int i = 0; i < height; i++) {
            const int64_t place = (row + i) * groups + g;
            __m128i value = _mm_sub_epi32(total[i], _mm_mullo_epi32(off, _mm_set1_epi32(sum_of[place])));
            if (by_row)
                value = _mm_sub_epi32(value, _mm_mullo_epi32(colsum, _mm_set1_epi32(rows.zero[place])));
            __m128 part = _mm_cvtepi32_ps(value);
            if (!by_row || layer->weight_groups)
                part = _mm_mul_ps(part, scale);
            if (by_row)
                part = _mm_mul_ps(part, _mm_set1_ps(rows.scale[place]));
            y[i] = _mm_add_ps(y[i], part);
        }
    }
    for (int i = 0; i < height; i++) {
        if (!by_row) {
            __m128 zero = _mm_set1_ps((float)rows.zero[row + i]), colsum = _mm_maskload_ps((const float *)layer->colsum + at, mask);
            y[i] = _mm_mul_ps(_mm_sub_ps(y[i], _mm_mul_ps(zero, colsum)), _mm_set1_ps(rows.scale[row + i]));
        } else if (!layer->weight_groups)
            y[i] = _mm_mul_ps(y[i], _mm_maskload_ps(layer->scale + at, mask));
        store_four(y[i], layer, row + i, at, left, bias, out, type);
    }
}

static inline __attribute__((always_inline)) void multiply_tile(
    int height, const Layer *layer, Rows rows, int64_t row, int64_t at, const float *bias, void *out, enum type type)
{
    switch (layer->group) {
    case 0: channel_tile(height, layer, rows, row, at, bias, out, type); break;
    case 32: group_tile(height, 32, layer, rows, row, at, bias, out, type); break;
    case 64: group_tile(height, 64, layer, rows, row, at, bias, out, type); break;
    default: group_tile(height, BLOCK, layer, rows, row, at, bias, out, type);
    }
}

// Four output features from `at` on, of the rows `row` to `end`.
static void multiply(const Layer *layer, Rows rows, int64_t row, int64_t end, int64_t at, const float *bias, void *out,
                     enum type type)
{
    for (; row + 4 <= end; row += 4)
        multiply_tile(4, layer, rows, row, at, bias, out, type);
    switch (end - row) {
    case 3: multiply_tile(3, layer, rows, row, at, bias, out, type); break;
    case 2: multiply_tile(2, layer, rows, row, at, bias, out, type); break;
    case 1: multiply_tile(1, layer, rows, row, at, bias, out, type); break;
    }
}

// One row of affq_epilogue.
static void finish(const float *acc, int64_t n, const float *scale, const int32_t *colsum, float row_scale,
                   const int32_t *zero, const float *bias, void *out, enum type type, int64_t start)
{
    for (int64_t at = 0; at < n; at += 8) {
        __m256 y = load(acc, FLOAT32, at, n - at);
        if (zero) {
            __m256i whole_sum = _mm256_castps_si256(load(colsum, FLOAT32, at, n - at));
            y = _mm256_sub_ps(y, _mm256_mul_ps(_mm256_cvtepi32_ps(whole_sum), _mm256_set1_ps((float)*zero)));
        }
        y = _mm256_mul_ps(_mm256_mul_ps(y, load(scale, FLOAT32, at, n - at)), _mm256_set1_ps(row_scale));
        if (bias)
            y = _mm256_add_ps(y, load(bias, FLOAT32, at, n - at));
        store(out, type, start + at, n - at, y);
    }
}
