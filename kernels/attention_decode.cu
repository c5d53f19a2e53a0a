// Attention of a few queries to the keys and values in a cache, as a step of decoding needs it:
// y = softmax(scale * query key^T + bias) value, for each row of a batch and each of its heads.
//
// query (B, H, T, D) and key, value (B, H_kv, S, D) Element, D = HEAD_DIM, a multiple of 8 up to 256;
// heads of queries that follow one another, `group` of them, share a head of keys. Strides are given
// in units of 8 elements, the same for key and value; D is contiguous and aligned to 16 bytes.
// lengths (B): the keys of a row that count, of S; null is all.   starts (B): where a row begins, in
// tokens behind key + batch * k_batch; null is 0.   With is_causal the queries are the last of the
// keys, and each sees those up to its own. A query that sees none gives 0.
// What is added to scores, each of these or null: bias (B, H, T, S) Element, by strides in elements;
// slopes (H) float, times the distance from the query back to the key (ALiBi); table (num_buckets, H)
// Element, at the bucket that `buckets` (max_distance + 1) has for that distance (T5).
// y (B, T, H, D) Element.   partial (B, H, T, chunks, D + 2) float, where there are several chunks.
//
// A block of 256 threads takes CHUNK keys of a head of keys, for ROWS of the queries that share it:
// x of the grid is the chunk and, in its low tile_bits, which of these queries; y the head, z the batch.
// A query's number is its head in the group, then its token in token_bits: nothing is divided.
// 8 columns of a key are a thread's, and LANES threads have a key: a warp reads 512 contiguous bytes.
// STREAMS keys are side by side, each thread has DEPTH of them in flight, and each stream goes through
// its keys with a maximum, a sum and a weighted value of its own (online softmax), all in float. These
// are merged in a warp, in the block, and over chunks in attention_decode_merge.cu. Which stream
// has a key depends on its position alone, so a result does not depend on how far S is padded.
//
// Bytes moved: keys and values once for ROWS queries; 2 in 65 more for the partial results.
// Source: Milakov & Gimelshein 2018, arXiv:1805.02867, section 3; the split of keys: Dao et al. 2023,
// "Flash-Decoding for long-context inference". Press et al. 2021, arXiv:2108.12409 (ALiBi); Raffel et
// al. 2020, arXiv:1910.10683, section 2.1 (buckets).

#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int LANES = HEAD_DIM <= 8 ? 1 : HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4
                    : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
constexpr int STREAMS = THREADS / LANES;
constexpr int MOST_DEPTH = ROWS == 1 && sizeof(Element) == 2 ? 4 : 2;
constexpr int DEPTH = CHUNK / STREAMS < MOST_DEPTH ? CHUNK / STREAMS : MOST_DEPTH;
constexpr int LOADS = sizeof(Element) / 2;  // of 16 bytes, for 8 elements
// Blocks a multiprocessor shall hold: the compiler may then take registers enough not to spill.
constexpr int BLOCKS = ROWS == 4 ? 1 : 2;
constexpr float LOG2_E = 1.4426950408889634f;

struct Eight {
    uint4 words[LOADS];
};

DEVICE Eight load_eight(const Element* place) {
    Eight loaded;
#pragma unroll
    for (int i = 0; i < LOADS; ++i) loaded.words[i] = __ldg(reinterpret_cast<const uint4*>(place) + i);
    return loaded;
}

DEVICE void to_floats(const Eight& loaded, float values[8]) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const u32 words[4] = {loaded.words[i].x, loaded.words[i].y, loaded.words[i].z, loaded.words[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#if ELEMENT == 32
            values[4 * i + j] = __uint_as_float(words[j]);
#else
            values[2 * j] = to_float(u16(words[j]));
            values[2 * j + 1] = to_float(u16(words[j] >> 16));
#endif
        }
    }
}

DEVICE float no_score() { return __uint_as_float(0xFF800000u); }  // minus infinity

// exp(score - most); `most` is no_score() where nothing was seen, and then this is 0.
DEVICE float weight_of(float score, float most) {
    return exp2f((score - (most == no_score() ? 0.0f : most)) * LOG2_E);
}

// Of the keys that were seen: the largest score, the sum of weights, and of weighted values.
struct Seen {
    float most, total, values[8];
};

DEVICE void merge(Seen& own, const Seen& other) {
    const float most = fmaxf(own.most, other.most);
    const float factor = weight_of(own.most, most), other_factor = weight_of(other.most, most);
    own.most = most;
    own.total = own.total * factor + other.total * other_factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) own.values[i] = own.values[i] * factor + other.values[i] * other_factor;
}

DEVICE Seen of_lane(const Seen& own, int distance) {
    Seen other;
    other.most = __shfl_xor_sync(ALL_LANES, own.most, distance);
    other.total = __shfl_xor_sync(ALL_LANES, own.total, distance);
#pragma unroll
    for (int i = 0; i < 8; ++i) other.values[i] = __shfl_xor_sync(ALL_LANES, own.values[i], distance);
    return other;
}

// One of the queries of a block.   num_seen: the keys that it sees.
struct Query {
    int head, token, num_seen;
    bool is_there;
    float slope, values[8];
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_decode(const Element* query, const Element* key, const Element* value, const int* lengths,
                 const int* starts, const Element* bias, const float* slopes, const Element* table,
                 const int* buckets, Element* y, float* partial, int S, int T, int group,
                 int token_bits, int tile_bits, int is_causal, int max_distance, int q_batch,
                 int q_head, int q_token, int k_batch, int k_head, int k_token, int b_batch,
                 int b_head, int b_token, int b_key, float scale) {
    const int batch = blockIdx.z, H = gridDim.y * group;
    const int chunk = blockIdx.x >> tile_bits, num_chunks = gridDim.x >> tile_bits;
    const int first_query = (blockIdx.x & ((1u << tile_bits) - 1)) * ROWS;
    const int length = lengths ? min(lengths[batch], S) : S;
    const int lane = threadIdx.x % WARP, column = 8 * (threadIdx.x % LANES);
    const int begin = chunk * CHUNK;

    Query rows[ROWS];
    int end = begin;  // of the keys in this chunk that any of the queries sees
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const int in_group = (first_query + r) >> token_bits;
        const int token = (first_query + r) & ((1 << token_bits) - 1);
        rows[r].is_there = in_group < group && token < T;
        rows[r].head = blockIdx.y * group + min(in_group, group - 1);
        rows[r].token = min(token, T - 1);
        rows[r].num_seen = rows[r].is_there ? length - (is_causal ? T - 1 - token : 0) : 0;
        rows[r].slope = slopes ? slopes[rows[r].head] : 0.0f;
        end = max(end, min(rows[r].num_seen, begin + CHUNK));
        const Element* place = query + 8 * (size_t(batch) * q_batch + size_t(rows[r].head) * q_head
                                            + size_t(rows[r].token) * q_token);
        load8_or_zeros(place, column, HEAD_DIM, rows[r].values);
#pragma unroll
        for (int i = 0; i < 8; ++i) rows[r].values[i] *= scale;
    }
    if (num_chunks > 1 && end == begin) return;  // the merge does not ask for it

    Seen seen[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) seen[r] = {no_score(), 0.0f, {}};
    // Threads beyond the end of a head read columns of others, and their queries are zeros.
    const size_t place = 8 * (size_t(batch) * k_batch + size_t(blockIdx.y) * k_head
                              + size_t(starts ? starts[batch] : 0) * k_token)
                       + min(column, HEAD_DIM - 8);
#pragma unroll 1
    for (int first = begin; first < end; first += DEPTH * STREAMS) {
        Eight keys[DEPTH], values[DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {  // beyond the end the last one again, which no query sees
            const int position = min(first + i * STREAMS + int(threadIdx.x / LANES), end - 1);
            keys[i] = load_eight(key + place + 8 * size_t(position) * k_token);
            values[i] = load_eight(value + place + 8 * size_t(position) * k_token);
        }
        float scores[ROWS][DEPTH];
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            const int position = first + i * STREAMS + int(threadIdx.x / LANES);
            float own[8];
            to_floats(keys[i], own);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                float score = 0.0f;
#pragma unroll
                for (int j = 0; j < 8; ++j) score += rows[r].values[j] * own[j];
#pragma unroll
                for (int distance = LANES / 2; distance > 0; distance /= 2) {
                    score += __shfl_xor_sync(ALL_LANES, score, distance);
                }
                const int back = rows[r].num_seen - 1 - position;  // from the query to the key
                scores[r][i] = back >= 0 ? score - rows[r].slope * float(back) : no_score();
                if (bias && back >= 0) {
                    scores[r][i] += to_float(bias[size_t(batch) * b_batch
                                                  + size_t(rows[r].head) * b_head
                                                  + size_t(rows[r].token) * b_token
                                                  + size_t(position) * b_key]);
                }
                if (table && back >= 0) {
                    const int bucket = buckets[min(back, max_distance)];
                    scores[r][i] += to_float(table[size_t(bucket) * H + rows[r].head]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float most = seen[r].most;
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) most = fmaxf(most, scores[r][i]);
            const float factor = weight_of(seen[r].most, most);
            seen[r].most = most;
            seen[r].total *= factor;
#pragma unroll
            for (int j = 0; j < 8; ++j) seen[r].values[j] *= factor;
#pragma unroll
            for (int i = 0; i < DEPTH; ++i) {
                scores[r][i] = weight_of(scores[r][i], most);
                seen[r].total += scores[r][i];
            }
        }
#pragma unroll
        for (int i = 0; i < DEPTH; ++i) {
            float own[8];
            to_floats(values[i], own);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
#pragma unroll
                for (int j = 0; j < 8; ++j) seen[r].values[j] += scores[r][i] * own[j];
            }
        }
    }

    __shared__ float most_of[WARPS], total_of[WARPS];
    __shared__ float values_of[WARPS][HEAD_DIM];
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (!rows[r].is_there) continue;  // for all threads alike
#pragma unroll
        for (int distance = WARP / 2; distance >= LANES; distance /= 2) {
            merge(seen[r], of_lane(seen[r], distance));
        }
        if (lane < LANES && column < HEAD_DIM) {
#pragma unroll
            for (int i = 0; i < 8; ++i) values_of[warp][column + i] = seen[r].values[i];
        }
        if (lane == 0) most_of[warp] = seen[r].most, total_of[warp] = seen[r].total;
        __syncthreads();
        if (threadIdx.x < HEAD_DIM) {
            float most = no_score(), total = 0.0f, sum = 0.0f;
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, most_of[w]);
            for (int w = 0; w < WARPS; ++w) {
                const float factor = weight_of(most_of[w], most);
                total += factor * total_of[w];
                sum += factor * values_of[w][threadIdx.x];
            }
            if (num_chunks == 1) {
                const size_t row = (size_t(batch) * T + rows[r].token) * H + rows[r].head;
                y[row * HEAD_DIM + threadIdx.x] = from_float(total == 0.0f ? 0.0f : sum / total);
            } else {
                const size_t row = (size_t(batch) * H + rows[r].head) * T + rows[r].token;
                float* own = partial + (row * num_chunks + chunk) * (HEAD_DIM + 2);
                own[threadIdx.x] = sum;
                if (threadIdx.x == 0) own[HEAD_DIM] = most, own[HEAD_DIM + 1] = total;
            }
        }
        __syncthreads();
    }
}
