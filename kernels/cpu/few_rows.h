// y = x W^T + bias for 1 to 16 rows of x, W packed to 8 or 4 bits: the product of decoding.
//
// Up to four rows of x and, where there is more than one, of W are multiplied together, along K: a
// vector of codes is read once from memory, for further rows of x once more from the nearest cache.
// Codes are words of 16 bits as digits.h says, products of pairs of words are summed as integers along
// a step, the sums of a step become floats, are scaled lane by lane, and are added up as floats. Minima
// are multiplied with the sums of x over their groups.
//
// Each result comes from one sequence of operations, whatever else is computed beside it: it depends
// neither on the other rows of x nor on how the rows of W are shared among threads.
//
// Bytes moved: N * row_bytes and the scales, each once. With AVX-512 and one row of x the instructions
// take half as long as the memory does, if what is next is asked for ahead: a processor does so by
// itself along one stream, in which it does not see that the next row of scales follows. One row of W
// after the other is one stream; with more rows of x there is time to spare.
//
// Source: the matrix-vector product of every textbook; integer activations for packed weights, the
// vec_dot functions of llama.cpp, there with 8 bits, here with 16.

#ifndef BMINF_CPU_FEW_ROWS_H
#define BMINF_CPU_FEW_ROWS_H

enum Scale { OF_ROW, REAL, HALVES, INTEGERS, UNALIGNED };

// x as multiply() reads it; the start of the workspace, to the rest of which it points.
struct Prepared {
    int num_digits, num_plain;  // rows that are multiplied as digits, and as floats
    i64 digit_rows[MAX_ROWS], plain_rows[MAX_ROWS];
    const u8* digits[MAX_ROWS];          // of digit_rows
    const float* group_sums[MAX_ROWS];   // of digit_rows, LANES more than there are groups
    const float* plain[MAX_ROWS];        // of plain_rows
    const i32* first_groups;  // of each step: where its scales are loaded
    const i32* lane_groups;   // of each step and lane: its group, counted from the first
    i64 loaded_groups;
};

inline Scale scale_of(const Product& p) {
    if (p.num_groups == 1 && !p.row_scale) return OF_ROW;
    if (p.group_size % (32 / p.bits)) return UNALIGNED;
    return p.bits == 8 ? REAL : p.row_scale ? INTEGERS : HALVES;
}

// 256 columns with AVX-512: the integers of a lane are made floats once for 16 of them.
constexpr int step_of(int bits, Scale scale) { return scale != OF_ROW ? 1 : bits == 8 ? 4 : 2; }

// ---- preparing x ---------------------------------------------------------------------------------

struct Sizes {
    i64 num_steps, floats, digits, sums, first_groups, lane_groups;  // bytes, of one row for x
};

inline Sizes sizes_of(const Product& p) {
    const Scale scale = scale_of(p);
    const i64 step = step_of(int(p.bits), scale), planes = 16 / p.bits;
    Sizes sizes = {};
    sizes.floats = aligned(p.in_features * 4);
    if (scale == UNALIGNED) return sizes;
    const i64 columns = step * planes * WORDS;
    sizes.num_steps = (p.in_features + columns - 1) / columns;
    sizes.digits = aligned(sizes.num_steps * (step * planes * BYTES + LANES * 4));
    if (p.minimum) sizes.sums = aligned((p.num_groups + LANES) * 4);
    if (scale == OF_ROW) return sizes;
    sizes.first_groups = aligned(sizes.num_steps * 4);
    sizes.lane_groups = aligned(sizes.num_steps * LANES * 4);
    return sizes;
}

inline i64 workspace_bytes(const Product& p) {
    if (p.activation_bits == 8) return bytes_of_rounded(p);
    const Sizes sizes = sizes_of(p);
    const i64 of_row = sizes.floats + sizes.digits + sizes.sums;
    return aligned(sizeof(Prepared)) + p.num_rows * of_row + sizes.first_groups + sizes.lane_groups;
}

TARGET bool write_digits(const Product& p, const float* x, u8* digits) {
    if (p.out_features * p.in_features <= p.float_elements) return false;
    switch (scale_of(p)) {
        case UNALIGNED: return false;
        case OF_ROW:
            return p.bits == 8 ? write_row<8, step_of(8, OF_ROW)>(x, p.in_features, digits)
                               : write_row<4, step_of(4, OF_ROW)>(x, p.in_features, digits);
        default:
            return p.bits == 8 ? write_row<8, 1>(x, p.in_features, digits)
                               : write_row<4, 1>(x, p.in_features, digits);
    }
}

// Of the digits, not of x: what rounding x changes is then multiplied with weights, as elsewhere, and
// not with codes that are all positive.
template <int STEP>
TARGET void write_group_sums(const Product& p, const u8* digits, i64 num_steps, float* sums) {
    typedef Layout<4, STEP> L;
    constexpr int VECTORS = STEP * L::PLANES;
    for (i64 i = 0; i < p.num_groups + LANES; ++i) sums[i] = 0.0f;
    i64 group = 0, left = p.group_size;
    for (i64 step = 0; step < num_steps; ++step, digits += L::BYTES_OF_STEP) {
        const i16* words = reinterpret_cast<const i16*>(digits);
        const float* sizes = reinterpret_cast<const float*>(digits + VECTORS * BYTES);
        i32 word_sums[WORDS] = {};
        for (int v = 0; v < VECTORS; ++v)
            for (int w = 0; w < WORDS; ++w) word_sums[w] += words[v * WORDS + w];
        for (int lane = 0; lane < LANES && group < p.num_groups; ++lane) {
            sums[group] += float(word_sums[2 * lane] + word_sums[2 * lane + 1]) * sizes[lane];
            left -= STEP == 1 ? 8 : 0;  // one group is the whole row where steps are long
            if (left > 0) continue;
            ++group;
            left = p.group_size;
        }
    }
}

TARGET void write_lane_groups(
    const Product& p, i64 num_steps, i32* first_groups, i32* lane_groups) {
    const i64 lane_columns = 32 / p.bits, last = p.num_groups - 1;
    const i64 last_start = p.num_groups > LANES ? p.num_groups - LANES : 0;
    i64 group = 0, next = p.group_size, column = 0;
    for (i64 step = 0; step < num_steps; ++step) {
        const i64 first = group < last_start ? group : last_start;
        first_groups[step] = i32(first);
        for (int lane = 0; lane < LANES; ++lane) {
            const i64 of_lane = group < last ? group : last;  // there are lanes beyond the last column
            lane_groups[step * LANES + lane] = i32(of_lane - first);
            column += lane_columns;
            if (column >= next) {
                ++group;
                next += p.group_size;
            }
        }
    }
}

TARGET void prepare(const Product& p, u8* workspace) {
    if (p.activation_bits == 8) return round_rows(p, workspace);
    const Sizes sizes = sizes_of(p);
    Prepared& x = *reinterpret_cast<Prepared*>(workspace);
    u8* place = workspace + aligned(sizeof(Prepared));
    x.num_digits = x.num_plain = 0;
    for (i64 row = 0; row < p.num_rows; ++row) {
        const float* values = as_floats_of(p, row, reinterpret_cast<float*>(place));
        u8* digits = place + sizes.floats;
        place = digits + sizes.digits + sizes.sums;
        if (!write_digits(p, values, digits)) {
            x.plain[x.num_plain] = values;
            x.plain_rows[x.num_plain++] = row;
            continue;
        }
        float* sums = reinterpret_cast<float*>(digits + sizes.digits);
        if (p.minimum && scale_of(p) == OF_ROW)
            write_group_sums<step_of(4, OF_ROW)>(p, digits, sizes.num_steps, sums);
        else if (p.minimum)
            write_group_sums<1>(p, digits, sizes.num_steps, sums);
        x.digits[x.num_digits] = digits;
        x.group_sums[x.num_digits] = sums;
        x.digit_rows[x.num_digits++] = row;
    }
    i32* first_groups = reinterpret_cast<i32*>(place);
    i32* lane_groups = reinterpret_cast<i32*>(place + sizes.first_groups);
    if (sizes.lane_groups) write_lane_groups(p, sizes.num_steps, first_groups, lane_groups);
    x.first_groups = first_groups;
    x.lane_groups = lane_groups;
    x.loaded_groups = p.num_groups < LANES ? p.num_groups : LANES;
}

// ---- multiplying ---------------------------------------------------------------------------------


constexpr i64 bytes_of(Scale scale) { return scale == REAL ? 4 : scale == HALVES ? 2 : 1; }

template <Scale SCALE>
INLINE Floats scales_of(const void* scale, i64 first, i64 count) {
    if constexpr (SCALE == REAL) return load_floats(static_cast<const float*>(scale) + first, count);
    if constexpr (SCALE == HALVES) return load_halves(static_cast<const u16*>(scale) + first, count);
    return load_bytes(static_cast<const u8*>(scale) + first, count);
}

template <int BITS, bool SIGNED, int PLANE, int X_ROWS>
INLINE void add_planes(Ints codes, const u8* const* digits, i64 offset, Ints* sums) {
    const Ints words = plane_of<BITS, SIGNED, PLANE>(codes);
    for (int m = 0; m < X_ROWS; ++m)
        sums[m] = dot(sums[m], words, load_ints(digits[m] + offset + PLANE * BYTES));
    if constexpr (PLANE + 1 < 16 / BITS)
        add_planes<BITS, SIGNED, PLANE + 1, X_ROWS>(codes, digits, offset, sums);
}

// One step of one weight row: `left` bytes of it, all of them unless it is the last.
template <int BITS, bool SIGNED, int STEP, int X_ROWS, bool IS_WHOLE>
INLINE void add_step(const u8* codes, i64 left, const u8* const* digits, i64 offset, Ints* sums) {
    for (int v = 0; v < STEP; ++v) {
        Ints vector;
        if constexpr (IS_WHOLE) vector = load_ints(codes + v * BYTES);
        else vector = load_some(codes + v * BYTES, left - v * BYTES);
        add_planes<BITS, SIGNED, 0, X_ROWS>(vector, digits, offset + v * (16 / BITS) * BYTES, sums);
    }
}

// X_ROWS rows of x, from the first_x-th of those in digits, times W_ROWS rows of W.
template <int BITS, bool SIGNED, Scale SCALE, int X_ROWS, int W_ROWS>
struct Tile {
    static constexpr int STEP = step_of(BITS, SCALE);
    typedef Layout<BITS, STEP> L;

    const Product& p;
    const Result& y;
    const Prepared& x;
    i64 rows[W_ROWS];
    const u8* codes[W_ROWS];
    const u8* digits[X_ROWS];
    Floats sums[W_ROWS][X_ROWS];

    INLINE void ask_for_scales() {
        if constexpr (SCALE != OF_ROW) {
            const i64 of_row = p.num_groups * bytes_of(SCALE), start = rows[0] * of_row + SCALES_AHEAD;
            ask_for_stream(static_cast<const u8*>(p.scale) + start, W_ROWS * of_row);
            if constexpr (!SIGNED)
                ask_for_stream(static_cast<const u8*>(p.minimum) + start, W_ROWS * of_row);
        }
    }

    // IS_ASKING: these rows of W have not been in a cache.
    template <bool IS_WHOLE, bool IS_ASKING>
    INLINE void add(i64 step) {
        const i64 offset = step * L::BYTES_OF_STEP, start = step * STEP * BYTES;
        for (int r = 0; r < W_ROWS; ++r) {
            if (IS_ASKING) ask_beyond<X_ROWS>(codes[r] + start, p.row_bytes, STEP * BYTES);
            Ints products[X_ROWS];
            for (int m = 0; m < X_ROWS; ++m) products[m] = no_ints();
            add_step<BITS, SIGNED, STEP, X_ROWS, IS_WHOLE>(
                codes[r] + start, p.row_bytes - start, digits, offset, products);
            Floats scale;
            if constexpr (SCALE != OF_ROW) {
                const i64 first = rows[r] * p.num_groups + x.first_groups[step];
                const Floats loaded = scales_of<SCALE>(p.scale, first, x.loaded_groups);
                scale = pick(loaded, x.lane_groups + step * LANES);
            }
            for (int m = 0; m < X_ROWS; ++m) {
                Floats sizes = load_all_floats(digits[m] + offset + STEP * L::PLANES * BYTES);
                if constexpr (SCALE != OF_ROW) sizes = times(sizes, scale);
                sums[r][m] = multiply_add(as_floats(products[m]), sizes, sums[r][m]);
            }
        }
    }

    template <bool IS_ASKING>
    INLINE void add_all() {
        for (int r = 0; r < W_ROWS; ++r)
            for (int m = 0; m < X_ROWS; ++m) sums[r][m] = no_floats();
        const i64 whole = p.row_bytes / (STEP * BYTES);
        for (i64 step = 0; step < whole; ++step) add<true, IS_ASKING>(step);
        if (whole * STEP * BYTES < p.row_bytes) add<false, IS_ASKING>(whole);
    }

    // The product of the minima of a row with the sums of x over their groups.
    INLINE float of_minima(int r, const float* group_sums) {
        Floats sum = no_floats();
        for (i64 group = 0; group < p.num_groups; group += LANES) {
            const i64 first = rows[r] * p.num_groups + group, left = p.num_groups - group;
            const i64 count = left < LANES ? left : LANES;
            const Floats minima = scales_of<SCALE == INTEGERS ? INTEGERS : HALVES>(p.minimum, first, count);
            sum = multiply_add(minima, load_all_floats(group_sums + group), sum);
        }
        return total(sum);
    }

    INLINE void write(i64 num_w, int first_x) {
        for (int r = 0; r < W_ROWS && r < num_w; ++r) {
            const float scale = SCALE == OF_ROW ? stored(p, p.scale, rows[r]) : 1.0f;
            for (int m = 0; m < X_ROWS; ++m) {
                float value = total(sums[r][m]) * scale;
                if constexpr (!SIGNED)
                    value += of_minima(r, x.group_sums[first_x + m]) * minimum_step(p);
                if constexpr (SCALE == INTEGERS) value *= p.row_scale[rows[r]];
                write_result(p, y, rows[r], x.digit_rows[first_x + m], value);
            }
        }
    }
};

// Weight rows first to first + num_w, at most W_ROWS: the last stands for those that are not there.
template <int BITS, bool SIGNED, Scale SCALE, int X_ROWS, int W_ROWS>
TARGET void multiply_tile(const Product& p, const Result& y, const Prepared& x, i64 first, i64 num_w,
                          int first_x) {
    Tile<BITS, SIGNED, SCALE, X_ROWS, W_ROWS> tile = {p, y, x, {}, {}, {}, {}};
    for (int r = 0; r < W_ROWS; ++r) {
        tile.rows[r] = first + (r < num_w ? r : num_w - 1);
        tile.codes[r] = p.codes + tile.rows[r] * p.row_bytes;
    }
    for (int m = 0; m < X_ROWS; ++m) tile.digits[m] = x.digits[first_x + m];
    if (first_x == 0) {
        tile.ask_for_scales();
        tile.template add_all<true>();
    } else {
        tile.template add_all<false>();
    }
    tile.write(num_w, first_x);
}

template <int BITS, bool SIGNED, Scale SCALE, int X_ROWS>
TARGET void multiply_block(const Product& p, const Result& y, const Prepared& x, i64 first, i64 last,
                           int first_x) {
    constexpr int W_ROWS = rows_of_w(X_ROWS);
    for (i64 row = first; row < last; row += W_ROWS)
        multiply_tile<BITS, SIGNED, SCALE, X_ROWS, W_ROWS>(p, y, x, row, last - row, first_x);
}

template <int BITS, bool SIGNED, Scale SCALE>
TARGET void multiply_digits(
    const Product& p, const Result& y, const Prepared& x, i64 first, i64 last) {
    int m = 0;
    for (; m + 4 <= x.num_digits; m += 4)
        multiply_block<BITS, SIGNED, SCALE, 4>(p, y, x, first, last, m);
    for (; m + 2 <= x.num_digits; m += 2)
        multiply_block<BITS, SIGNED, SCALE, 2>(p, y, x, first, last, m);
    for (; m < x.num_digits; ++m) multiply_block<BITS, SIGNED, SCALE, 1>(p, y, x, first, last, m);
}

TARGET void multiply_plain(const Product& p, const Result& y, const Prepared& x, i64 first, i64 last) {
    float totals[MAX_ROWS];
    for (i64 row = first; row < last; ++row) {
        plain_products(p, row, x.plain, x.num_plain, totals);
        for (int m = 0; m < x.num_plain; ++m) write_result(p, y, row, x.plain_rows[m], totals[m]);
    }
}

typedef void (*Multiply)(const Product&, const Result&, const Prepared&, i64 first, i64 last);

inline Multiply multiply_for(const Product& p) {
    const bool has_minimum = p.minimum;
    switch (scale_of(p)) {
        case OF_ROW:
            if (p.bits == 8) return multiply_digits<8, true, OF_ROW>;
            return has_minimum ? multiply_digits<4, false, OF_ROW> : multiply_digits<4, true, OF_ROW>;
        case REAL: return multiply_digits<8, true, REAL>;
        case HALVES:
            return has_minimum ? multiply_digits<4, false, HALVES> : multiply_digits<4, true, HALVES>;
        default:
            return has_minimum ? multiply_digits<4, false, INTEGERS> : multiply_digits<4, true, INTEGERS>;
    }
}

void multiply(const Product& p, const Result& y, const u8* workspace, i64 first, i64 last) {
    if (p.activation_bits == 8) return multiply_rounded(p, y, workspace, first, last);
    const Prepared& x = *reinterpret_cast<const Prepared*>(workspace);
    const Multiply function = multiply_for(p);
    for (i64 row = first; row < last; row += BLOCK_ROWS) {
        const i64 end = row + BLOCK_ROWS < last ? row + BLOCK_ROWS : last;
        if (x.num_digits) function(p, y, x, row, end);
        if (x.num_plain) multiply_plain(p, y, x, row, end);
    }
}

#endif
